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
    tokens: Tensor, slots: Tensor, history: Tensor, lengths: Tensor, runs: Tensor, rules: Tensor
) -> Tensor:
    """Append `tokens` (S,) to the histories of the sequences `slots` (S,) int64, and say which have made a loop.

    `history` (N, room), `lengths` (N,) and `runs` (N, max_period), all int32, hold N sequences; `runs` counts, for each
    period, the newest tokens that equal the one a period before them (see vila2.engine.repetition). A row of `rules`
    (S, 3) int32 holds min_repeats (0: no rule), min_tokens and the longest period. Slots below 0 are skipped; no other
    comes twice. Writes into history, lengths and runs; returns how many tokens at the end repeat what came before,
    (S,) int32, 0 where they make no loop.
    """
    repeated = torch.zeros(len(tokens), dtype=torch.int32, device=tokens.device)
    here = (slots >= 0).nonzero().flatten()
    at, new = slots[here], tokens[here].to(history.dtype)
    min_repeats, min_tokens, longest = rules[here].unbind(1)
    periods = torch.arange(1, runs.shape[1] + 1, device=tokens.device)
    earlier = lengths[at].long()[:, None] - periods
    before = history[at].gather(1, earlier.clamp(min=0))
    same = (earlier >= 0) & (before == new[:, None])
    runs[at] = torch.where(same, runs[at] + 1, 0)
    history[at, lengths[at].long()] = new
    lengths[at] += 1
    needed = torch.maximum(periods * (min_repeats[:, None] - 1), (min_tokens[:, None] - periods).clamp(min=1))
    loops = (runs[at] >= needed) & (min_repeats > 0)[:, None] & (periods <= longest[:, None])
    first = loops.int().argmax(1)
    repeated[here] = torch.where(loops.any(1), runs[at, first], 0)
    return repeated


def append_tokens(
    tokens: Tensor, slots: Tensor, history: Tensor, lengths: Tensor, runs: Tensor, rules: Tensor
) -> Tensor:
    """The same by the fastest path."""
    if is_triton(tokens):
        from vila2.kernels.repetition import append_tokens_triton

        return append_tokens_triton(tokens, slots, history, lengths, runs, rules)
    return append_reference(tokens, slots, history, lengths, runs, rules)
