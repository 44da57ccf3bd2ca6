"""Logits to tokens. A row's token depends on its logits and its own random number, never on its batch.

A random number belongs to a place of a sequence, so a drafted token is verified by drawing what plain decoding would
draw there: output is the same with and without a draft, sampled or greedy.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila2.engine.scheduler import Chunk
from vila2.engine.sequence import Sequence
from vila2.model.decoder import Decoder
from vila2.ops.head import MOST_TOP
from vila2.types import SamplingParams

_MASK = (1 << 64) - 1
_HEAD = 512  # tokens
_BELOW_ONE = np.float32(1 - 2**-24)  # the largest float32 below 1: a draw must not round to 1


def uniform(key: int, step: int) -> float:
    """A number in [0, 1) that depends on (key, step) alone: SplitMix64 (Steele et al., 2014), counter-based."""
    state = (key + (step + 1) * 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return float(((state ^ (state >> 31)) >> 11) / (1 << 53))


def choose_tokens(
    decoder: Decoder, hidden: Tensor, chunks: Seq[Chunk], eos_ids: frozenset[int]
) -> list[list[int]]:
    """`sample_tokens` of the scores of `hidden` (rows, hidden), which are made only where they are wanted.

    Greedy and top-k decoding want a few of the best. Which way a sequence goes depends on its own request alone, so
    its tokens do not depend on who else is in the batch.
    """
    if not decoder.finds_top:
        return sample_tokens(decoder.logits(hidden).float(), chunks, eos_ids)
    spans = _spans(chunks)
    some = [i for i, chunk in enumerate(chunks) if _num_wanted(chunk.sequence.request.sampling)]
    every = [i for i in range(len(chunks)) if not _num_wanted(chunks[i].sequence.request.sampling)]
    chosen: list[list[int]] = [[] for _ in chunks]
    if some:
        rows = [row for i in some for row in spans[i]]
        here = hidden if len(some) == len(chunks) else hidden[rows]
        for i, tokens in zip(some, _from_top(decoder, here, [chunks[i] for i in some], eos_ids), strict=True):
            chosen[i] = tokens
    if every:
        logits = decoder.logits(hidden[[row for i in every for row in spans[i]]]).float()
        for i, tokens in zip(every, sample_tokens(logits, [chunks[i] for i in every], eos_ids), strict=True):
            chosen[i] = tokens
    return chosen


def best_tokens(decoder: Decoder, hidden: Tensor) -> list[int]:
    """The greedy choice of each row of `hidden`."""
    if not decoder.finds_top:
        return list(decoder.logits(hidden).argmax(-1).tolist())
    none = torch.empty(0, dtype=torch.int64)
    _, tokens = decoder.top(hidden, 1, none, torch.zeros(len(hidden), dtype=torch.uint8))
    return list(tokens[:, 0].tolist())


def _num_wanted(sampling: SamplingParams) -> int:
    """How many of the best scores decide the next token; 0 if all may."""
    if sampling.temperature == 0:
        return 1
    return sampling.top_k if sampling.top_k <= MOST_TOP else 0


def _spans(chunks: Seq[Chunk]) -> list[range]:
    """The rows of each chunk: one for each drafted token, and one more."""
    ends = list(accumulate(1 + len(chunk.draft) for chunk in chunks))
    return [range(end - 1 - len(chunk.draft), end) for chunk, end in zip(chunks, ends, strict=True)]


def _num_held_back(chunk: Chunk) -> int:
    """Rows of the chunk, the first ones, after which the sequence must not end."""
    sampling, count = chunk.sequence.request.sampling, 1 + len(chunk.draft)
    early = sampling.min_new_tokens - chunk.sequence.num_new_tokens
    return count if sampling.ignore_eos else min(max(early, 0), count)


def _from_top(
    decoder: Decoder, hidden: Tensor, chunks: Seq[Chunk], eos_ids: frozenset[int]
) -> list[list[int]]:
    size = decoder.config.vocab_size
    held_back = torch.zeros(len(hidden), dtype=torch.uint8)
    spans = _spans(chunks)
    wanted = 1
    for chunk, span in zip(chunks, spans, strict=True):
        held_back[span.start : span.start + _num_held_back(chunk)] = 1
        wanted = max(wanted, _num_wanted(chunk.sequence.request.sampling))
    values, tokens = decoder.top(hidden, min(wanted, size), torch.tensor(sorted(eos_ids)).long(), held_back)
    best: list[int] = tokens[:, 0].tolist()
    chosen = []
    for chunk, span in zip(chunks, spans, strict=True):
        sampling = chunk.sequence.request.sampling
        if sampling.temperature > 0:
            scaled = (values[span.start : span.stop, : sampling.top_k] / sampling.temperature).double()
            ways = torch.softmax(scaled, dim=-1)
            drawn = (
                _draw(ways[ahead], tokens[row, : sampling.top_k], chunk.sequence, ahead)
                for ahead, row in enumerate(span)
            )
            chosen.append(_agreed(drawn, chunk.draft))
        else:
            chosen.append(_agreed((best[row] for row in span), chunk.draft))
    return chosen


def sample_tokens(logits: Tensor, chunks: Seq[Chunk], eos_ids: frozenset[int]) -> list[list[int]]:
    """The next tokens after each chunk: the start of its draft that the model agrees with, and one more.

    `logits` (sum of the drafts' lengths plus one, vocabulary) may be changed.
    """
    spans = _spans(chunks)
    ends = sorted(eos_ids)
    for chunk, span in zip(chunks, spans, strict=True):
        if ends and (held_back := _num_held_back(chunk)):
            logits[span.start : span.start + held_back, ends] = -torch.inf
    best: list[int] = logits.argmax(-1).tolist()
    chosen = []
    for chunk, span in zip(chunks, spans, strict=True):
        if chunk.sequence.request.sampling.temperature > 0:
            drawn = (sample_row(logits[row], chunk.sequence, ahead) for ahead, row in enumerate(span))
            chosen.append(_agreed(drawn, chunk.draft))
        else:
            chosen.append(_agreed((best[row] for row in span), chunk.draft))
    return chosen


def _agreed(tokens: Iterator[int], draft: Seq[int]) -> list[int]:
    """`tokens` up to the first that is not the draft's, which is still the model's own."""
    agreed = []
    for place, token in enumerate(tokens):
        agreed.append(token)
        if place == len(draft) or token != draft[place]:
            break
    return agreed


def sample_row(logits: Tensor, sequence: Sequence, ahead: int = 0) -> int:
    """The token of `sequence` that comes after `ahead` more: temperature, then top-k, then top-p (the fewest
    tokens that reach `top_p`), then one draw.

    A vocabulary is long and its sort slow, so the likeliest `_HEAD` tokens are tried first: they nearly always
    reach `top_p` by themselves.
    """
    sampling = sequence.request.sampling
    scaled = logits.float() / sampling.temperature
    if not sampling.top_k and sampling.top_p < 1 and len(scaled) > _HEAD:
        values, indices = torch.topk(scaled, _HEAD)
        probabilities = torch.exp(values.double() - torch.logsumexp(scaled.double(), dim=-1))
        if float(probabilities.sum()) >= sampling.top_p:
            return _draw(probabilities, indices, sequence, ahead)
    return sample_row_reference(logits, sequence, ahead)


def sample_row_reference(logits: Tensor, sequence: Sequence, ahead: int = 0) -> int:
    """The same by sorting the whole vocabulary."""
    sampling = sequence.request.sampling
    scaled = logits.float() / sampling.temperature
    count = min(sampling.top_k or len(scaled), len(scaled))
    values, indices = torch.topk(scaled, count)
    return _draw(torch.softmax(values.double(), dim=-1), indices, sequence, ahead)


def _draw(probabilities: Tensor, indices: Tensor, sequence: Sequence, ahead: int) -> int:
    """One of `indices`, whose descending `probabilities` reach the sequence's top_p."""
    cumulative = probabilities.cumsum(-1)
    kept = int((cumulative - probabilities < sequence.request.sampling.top_p).sum())
    target = uniform(sequence.request.rng_key, sequence.num_new_tokens + ahead) * float(cumulative[kept - 1])
    choice = int(torch.searchsorted(cumulative[:kept], target, right=True))
    return int(indices[min(choice, kept - 1)])


def device_choice(sequences: Seq[Sequence], count: int) -> dict[str, NDArray[Any]]:
    """How the device shall choose the next `count` tokens of each sequence: arguments of `vila2.ops.sampling.sample`.

    `draws` and `is_banned` are (count, sequences): they differ from token to token.
    """
    samplings = [sequence.request.sampling for sequence in sequences]
    draws = np.zeros((count, len(sequences)), dtype=np.float32)
    for row, sequence in enumerate(sequences):
        if samplings[row].temperature > 0:
            key, first = sequence.request.rng_key, sequence.num_new_tokens
            numbers = np.array([uniform(key, first + step) for step in range(count)], dtype=np.float32)
            draws[:, row] = np.minimum(numbers, _BELOW_ONE)
    places = np.arange(count)[:, None] + np.array([sequence.num_new_tokens for sequence in sequences])
    early = places < np.array([sampling.min_new_tokens for sampling in samplings])
    ignored = np.array([sampling.ignore_eos for sampling in samplings])
    return {
        "temperature": np.array([sampling.temperature for sampling in samplings], dtype=np.float32),
        "top_k": np.array([sampling.top_k for sampling in samplings], dtype=np.int32),
        "top_p": np.array([sampling.top_p for sampling in samplings], dtype=np.float32),
        "draws": draws,
        "is_banned": (early | ignored).astype(np.int8),
    }
