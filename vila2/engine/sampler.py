"""Logits to tokens. A row's token depends on its logits and its own random number, never on its batch."""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from vila2.engine.sequence import Sequence

_MASK = (1 << 64) - 1
_HEAD = 512  # tokens


def uniform(key: int, step: int) -> float:
    """A number in [0, 1) that depends on (key, step) alone: SplitMix64 (Steele et al., 2014), counter-based."""
    state = (key + (step + 1) * 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return float(((state ^ (state >> 31)) >> 11) / (1 << 53))


def sample_tokens(logits: Tensor, sequences: Seq[Sequence], eos_ids: frozenset[int]) -> list[int]:
    """The next token of each sequence from its row of `logits` (sequences, vocabulary), which may be changed."""
    ends = sorted(eos_ids)
    for row, sequence in enumerate(sequences):
        sampling = sequence.request.sampling
        if ends and (sampling.ignore_eos or sequence.num_new_tokens < sampling.min_new_tokens):
            logits[row, ends] = -torch.inf
    tokens: list[int] = logits.argmax(-1).tolist()
    for row, sequence in enumerate(sequences):
        if sequence.request.sampling.temperature > 0:
            tokens[row] = sample_row(logits[row], sequence)
    return tokens


def sample_row(logits: Tensor, sequence: Sequence) -> int:
    """Temperature, then top-k, then top-p (the fewest tokens that reach `top_p`), then one draw.

    A vocabulary is long and its sort slow, so the likeliest `_HEAD` tokens are tried first: they nearly always
    reach `top_p` by themselves.
    """
    sampling = sequence.request.sampling
    scaled = logits.float() / sampling.temperature
    if not sampling.top_k and sampling.top_p < 1 and len(scaled) > _HEAD:
        values, indices = torch.topk(scaled, _HEAD)
        probabilities = torch.exp(values.double() - torch.logsumexp(scaled.double(), dim=-1))
        if float(probabilities.sum()) >= sampling.top_p:
            return _draw(probabilities, indices, sequence)
    return sample_row_reference(logits, sequence)


def sample_row_reference(logits: Tensor, sequence: Sequence) -> int:
    """The same by sorting the whole vocabulary."""
    sampling = sequence.request.sampling
    scaled = logits.float() / sampling.temperature
    count = min(sampling.top_k or len(scaled), len(scaled))
    values, indices = torch.topk(scaled, count)
    return _draw(torch.softmax(values.double(), dim=-1), indices, sequence)


def _draw(probabilities: Tensor, indices: Tensor, sequence: Sequence) -> int:
    """One of `indices`, whose descending `probabilities` reach the sequence's top_p."""
    cumulative = probabilities.cumsum(-1)
    kept = int((cumulative - probabilities < sequence.request.sampling.top_p).sum())
    target = uniform(sequence.request.rng_key, sequence.num_new_tokens) * float(cumulative[kept - 1])
    choice = int(torch.searchsorted(cumulative[:kept], target, right=True))
    return int(indices[min(choice, kept - 1)])
