"""Logits to tokens for a whole batch, and what ends a sequence, without a host round trip: the GPU's sampler.

`vila2.engine.sampler` is the CPU's: it handles one sequence after another and reads Python objects.
"""

import torch
from torch import Tensor

from vila2.ops.triton import is_triton


def sample_reference(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    draws: Tensor,
    banned: Tensor,
    is_banned: Tensor,
) -> Tensor:
    """Tokens (S,) int64 of `logits` (S, vocabulary): temperature, top-k, top-p, one draw; 0 temperature is greedy.

    `temperature`, `top_p`, `draws` (in [0, 1)) are float32 (S,); `top_k` int32 (S,), 0 for all. `banned` (n,) int32
    are tokens that rows with `is_banned` (S,) int8 must not choose (ends of sequence that come too early). Equal
    logits stand in the order of their tokens.
    """
    wide = logits.double().clone()
    rows = is_banned.bool().nonzero().flatten()
    for token in banned.tolist():
        wide[rows, token] = -torch.inf
    tokens = wide.argmax(-1)
    for row in (temperature > 0).nonzero().flatten().tolist():
        values, order = (wide[row] / temperature[row].double()).sort(descending=True, stable=True)
        count = int(top_k[row]) or len(values)
        probabilities = values[:count].softmax(-1)
        cumulative = probabilities.cumsum(-1)
        kept = int((cumulative - probabilities < float(top_p[row])).sum())
        target = float(draws[row]) * float(cumulative[kept - 1])
        choice = int(torch.searchsorted(cumulative[:kept], target, right=True))
        tokens[row] = order[min(choice, kept - 1)]
    return tokens


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    draws: Tensor,
    banned: Tensor,
    is_banned: Tensor,
) -> Tensor:
    """The same by the fastest path; on CUDA nothing waits for the device."""
    if is_triton(logits):
        from vila2.kernels.sample import sample_triton

        return sample_triton(logits, temperature, top_k, top_p, draws, banned, is_banned)
    return sample_reference(logits, temperature, top_k, top_p, draws, banned, is_banned)


def append_reference(
    tokens: Tensor, history: Tensor, lengths: Tensor, runs: Tensor, min_repeats: Tensor, min_tokens: Tensor
) -> Tensor:
    """Append `tokens` (S,) to `history` (S, room) int32 at `lengths` (S,) int32, and say which rows have made a loop.

    `runs` (S, max_period) int32 counts, for each period, the newest tokens that equal the one a period before them
    (see vila2.engine.repetition). A row whose `min_repeats` (S,) is 0 has no rule. Writes into history, lengths and
    runs; returns how many tokens at the end repeat what came before, (S,) int32, 0 where they make no loop.
    """
    periods = torch.arange(1, runs.shape[1] + 1, device=tokens.device)
    rows = torch.arange(len(tokens), device=tokens.device)
    earlier = lengths.long()[:, None] - periods
    before = history.gather(1, earlier.clamp(min=0))
    same = (earlier >= 0) & (before == tokens[:, None])
    runs.copy_(torch.where(same, runs + 1, 0))
    history[rows, lengths.long()] = tokens.to(history.dtype)
    lengths += 1
    needed = torch.maximum(periods * (min_repeats[:, None] - 1), (min_tokens[:, None] - periods).clamp(min=1))
    loops = (runs >= needed) & (min_repeats > 0)[:, None]
    first = loops.int().argmax(1)
    return torch.where(loops.any(1), runs[rows, first], 0).int()


def append_tokens(
    tokens: Tensor, history: Tensor, lengths: Tensor, runs: Tensor, min_repeats: Tensor, min_tokens: Tensor
) -> Tensor:
    """The same by the fastest path."""
    if is_triton(tokens):
        from vila2.kernels.repetition import append_tokens_triton

        return append_tokens_triton(tokens, history, lengths, runs, min_repeats, min_tokens)
    return append_reference(tokens, history, lengths, runs, min_repeats, min_tokens)
