"""What every source offers: shards in a stable order, each with a known number of samples and random access.

Invariant: `(shard name, index)` names the same sample in every run over the same source, so that a run can resume.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from vila2.types import Sample


class Shard(Protocol):
    """Some samples of a source, counted from 0."""

    @property
    def name(self) -> str:
        """Stable and unique in its source, relative to the source's root."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int] | None = None) -> Iterator[Sample]:
        """Yield the samples at `indices` (all when None) in ascending order, without reading the others.

        A bad sample has its `error` set; reading never raises for what is on disk. IndexError for an index
        that the shard does not have.
        """
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """A listed source. `fingerprint` describes it in one line that is the same in every run over it."""

    kind: str
    root: str
    shards: list[Shard]

    @property
    def fingerprint(self) -> str:
        return f"{self.kind} {self.root} ({len(self.shards)} shards)"

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)


@dataclass(frozen=True, slots=True)
class ShardRange:
    """The samples `start <= index < stop` of a shard."""

    shard: Shard
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def assign(source: Source, rank: int, world_size: int) -> list[ShardRange]:
    """The samples that `rank` of `world_size` processes works on: one contiguous run of the source.

    Over all ranks every sample comes exactly once, and the ranks' numbers of samples differ by one at most,
    however the samples are spread over shards.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in [0, world_size), got rank {rank} of {world_size}")
    lengths = [len(shard) for shard in source.shards]
    total = sum(lengths)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    ranges: list[ShardRange] = []
    offset = 0
    for shard, length in zip(source.shards, lengths, strict=True):
        start, stop = max(first - offset, 0), min(last - offset, length)
        if start < stop:
            ranges.append(ShardRange(shard, start, stop))
        offset += length
    return ranges


def pick_indices(length: int, indices: Sequence[int] | None) -> Sequence[int]:
    """The indices to read, ascending. Raises IndexError."""
    if indices is None:
        return range(length)
    chosen = sorted(indices)
    if chosen and (chosen[0] < 0 or chosen[-1] >= length):
        raise IndexError(f"index {chosen[0] if chosen[0] < 0 else chosen[-1]} is not in [0, {length})")
    return chosen
