"""Examples to flat rows without padding: what a row may see and what it predicts is in `segments` and `labels`.

Invariant: every token of every example is exactly one row, and a label never comes from another segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vila2.train.examples import VISUAL_TOKEN, EncodedExample, Row

if TYPE_CHECKING:
    from vila2.model.images import PreparedImage

NO_LABEL = -100


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """A micro-batch: the rows of its examples one after the other.

    `labels[i]` is the token to predict at row i, -100 where there is none. A segment (start, end, prefix_start,
    prefix_end): rows start..end-1 see one another causally and all rows of prefix_start..prefix_end-1. The visual
    tokens of `images`, concatenated, go to `visual_rows`.
    """

    token_ids: NDArray[np.int64]  # (T,), -1 at visual tokens
    labels: NDArray[np.int64]  # (T,)
    positions: NDArray[np.int64]  # (T,)
    segments: NDArray[np.int64]  # (S, 4)
    images: "list[PreparedImage]"
    visual_rows: NDArray[np.int64]  # (V,)
    keys: list[str]
    num_labels: int

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)


def pack(examples: Sequence[EncodedExample]) -> PackedBatch:
    """One micro-batch of `examples`, in their order. No example at all gives a batch without rows."""
    rows: list[Row] = []
    segments: list[tuple[int, int, int, int]] = []
    positions: list[NDArray[np.int64]] = []
    size = 0
    for example in examples:
        base, shared = size, len(example.prefix)
        alone = len(example.branches) == 1  # then prefix and branch are simply one sequence
        if shared and not alone:
            segments.append((base, base + shared, base, base))
        rows.append(example.prefix)
        positions.append(np.arange(shared))
        size += shared
        for branch in example.branches:
            rows.append(branch)
            positions.append(np.arange(shared, shared + len(branch)))
            start = base if alone else size
            prefix = (base, base) if alone else (base, base + shared)
            segments.append((start, size + len(branch), *prefix))
            size += len(branch)
    token_ids = _joined([row.token_ids for row in rows], np.int64)
    bounds = np.array(segments, dtype=np.int64).reshape(-1, 4)
    labels = _labels(token_ids, _joined([row.in_loss for row in rows], np.bool_), bounds)
    return PackedBatch(
        token_ids=token_ids,
        labels=labels,
        positions=_joined(positions, np.int64),
        segments=bounds,
        images=[image for example in examples for image in example.images],
        visual_rows=np.flatnonzero(token_ids == VISUAL_TOKEN),
        keys=[example.key for example in examples],
        num_labels=int(np.count_nonzero(labels != NO_LABEL)),
    )


def _labels(
    token_ids: NDArray[np.int64], in_loss: NDArray[np.bool_], segments: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Each row's next token where that is in the loss and in the same segment."""
    labels = np.full(len(token_ids), NO_LABEL, dtype=np.int64)
    if len(token_ids):
        labels[:-1] = np.where(in_loss[1:], token_ids[1:], NO_LABEL)
        labels[segments[:, 1] - 1] = NO_LABEL
    return labels


def _joined(parts: Sequence[NDArray], dtype: type) -> NDArray:  # type: ignore[type-arg]
    return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)
