"""Which document is example n of a mixture: pure arithmetic, so that a run resumes anywhere without a replay.

Examples come in blocks. Each block holds every source in proportion to its weight, spread evenly, in an order drawn
from the seed and the block's number. A source's documents come in the order of its epochs, each epoch a permutation
that is computed and not stored.
"""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vila2.errors import UsageError
from vila2.train.examples import Document

BLOCK = 4096  # examples; a weight is a whole number of them
WINDOW = 16  # stretches that are mixed with one another


class TrainSource(Protocol):
    """Documents by number. `length` None: endless, and every number is a new document.

    A source that reads neighbours together cheaply, and single documents not, has a `stretch`: that many documents
    then stay together, and are mixed with those of a few other stretches only.
    """

    @property
    def name(self) -> str: ...

    @property
    def length(self) -> int | None: ...

    def document(self, index: int) -> Document:
        """The document `index`, the same at every call. Raises SkippedDocument if it cannot be used."""
        ...


class Mixture:
    """`sources` drawn in proportion to `weights` (None: to their lengths)."""

    def __init__(
        self, sources: Sequence[TrainSource], weights: Sequence[float] | None = None, seed: int = 0
    ) -> None:
        if not sources:
            raise UsageError("a mixture needs at least one source of data")
        names = [source.name for source in sources]
        if len(set(names)) < len(names):
            raise UsageError(f"two sources of a mixture have the same name: {', '.join(sorted(names))}")
        empty = next((source.name for source in sources if source.length == 0), None)
        if empty is not None:
            raise UsageError(f"the source {empty} holds no documents")
        if weights is None:
            weights = [_needed_length(source) for source in sources]
        if (
            len(weights) != len(sources)
            or not all(weight >= 0 for weight in weights)
            or not 0 < sum(weights) < float("inf")
        ):
            raise UsageError(
                f"a mixture of {len(sources)} sources needs as many weights of 0 or more, got {weights}"
            )
        self.sources, self.seed = list(sources), seed
        self._counts = _apportion(weights)  # per block
        self._block = lru_cache(maxsize=8)(self._make_block)

    def describe(self) -> list[dict[str, object]]:
        """What decides the order of examples, besides the seed: JSON values to compare when a run goes on."""
        return [
            {"name": source.name, "length": source.length, "share": int(count)}
            for source, count in zip(self.sources, self._counts, strict=True)
        ]

    @property
    def num_examples(self) -> int | None:
        """The examples of one epoch over all sources together; None if one is endless."""
        lengths = [source.length for source in self.sources]
        return None if None in lengths else sum(length for length in lengths if length is not None)

    def place(self, n: int) -> tuple[int, int]:
        """(source, index of its document) of example `n`."""
        block, offset = divmod(n, BLOCK)
        order, ranks = self._block(block)
        number = int(order[offset])
        draw = block * int(self._counts[number]) + int(ranks[offset])
        return number, self._index(number, draw)

    def document(self, n: int) -> Document:
        """The document of example `n`. Raises SkippedDocument."""
        number, index = self.place(n)
        return self.sources[number].document(index)

    def consumed(self, n: int) -> dict[str, int]:
        """How many documents of each source the first `n` examples are."""
        block, offset = divmod(n, BLOCK)
        order, _ = self._block(block)
        inside = np.bincount(order[:offset], minlength=len(self.sources))
        counts = block * self._counts + inside
        return {source.name: int(count) for source, count in zip(self.sources, counts, strict=True)}

    def _index(self, number: int, draw: int) -> int:
        source = self.sources[number]
        if source.length is None:
            return draw
        epoch, place = divmod(draw, source.length)
        key = derived_seed(self.seed, source.name, epoch)
        stretch = getattr(source, "stretch", 1)
        if stretch == 1:
            return permuted(place, source.length, key)
        return permuted_in_stretches(place, source.length, stretch, key)

    def _make_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which source each place of a block belongs to, and which of the source's documents in the block it is."""
        random = np.random.default_rng(derived_seed(self.seed, "block", block))
        times = [(np.arange(count) + random.random(count)) / count for count in self._counts if count]
        owners = np.repeat(np.arange(len(self.sources)), self._counts)
        order = owners[np.argsort(np.concatenate(times), kind="stable")]
        ranks = np.empty(BLOCK, dtype=np.int64)
        for number, count in enumerate(self._counts):
            ranks[order == number] = np.arange(count)
        return order, ranks


def permuted(place: int, length: int, key: int) -> int:
    """Where `place` goes in a permutation of range(length) named by `key`: a Feistel network, walked until inside."""
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for turn in range(4):
            mixed = (right * 0x9E3779B97F4A7C15 + (key >> (16 * turn)) + turn) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((mixed ^ (mixed >> 32)) & mask)
        place = left << half | right
        if place < length:
            return place


def permuted_in_stretches(place: int, length: int, stretch: int, key: int) -> int:
    """Where `place` goes when whole stretches are permuted, and then the places of each WINDOW of stretches.

    What is left beyond the last whole stretch comes last.
    """
    whole = length // stretch
    if place >= whole * stretch:
        return place
    window, inside = divmod(place, WINDOW * stretch)
    first = window * WINDOW
    count = min(WINDOW, whole - first)
    slot, offset = divmod(permuted(inside, count * stretch, derived_seed(key, window)), stretch)
    return permuted(first + slot, whole, key) * stretch + offset


def _needed_length(source: TrainSource) -> int:
    if source.length is None:
        raise UsageError(f"the source {source.name} is endless: give every source of the mixture a weight")
    return source.length


def _apportion(weights: Sequence[float]) -> NDArray[np.int64]:
    """Whole numbers in proportion to the weights with the sum BLOCK, at least 1 where a weight is not 0."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK
    counts = np.where(shares > 0, np.maximum(np.floor(shares), 1), 0).astype(np.int64)
    while counts.sum() != BLOCK:
        missing = shares - counts
        if counts.sum() < BLOCK:
            counts[int(np.argmax(missing))] += 1
        else:
            counts[int(np.argmin(np.where(counts > 1, missing, np.inf)))] -= 1
    return counts


def derived_seed(*parts: object) -> int:
    """64 bits that follow from `parts` alone, on any machine."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little")
