"""The proof that a run is complete (`verify`), and the rows of a run in the order of its source (`iter_rows`)."""

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila2.data.done import encoded, grouped
from vila2.data.parts import read_columns, read_part
from vila2.data.source import Source

_MAX_EXAMPLES = 5
Place = tuple[str, int, str]  # shard, index, prompt


@dataclass(slots=True)
class Finding:
    """How many rows are wrong in one way, and the first few."""

    count: int = 0
    examples: list[Place] = field(default_factory=list)

    def add(self, shard: str, prompt: str, indices: NDArray[np.int64]) -> None:
        self.count += len(indices)
        room = _MAX_EXAMPLES - len(self.examples)
        self.examples += [(shard, int(index), prompt) for index in indices[: max(room, 0)]]


@dataclass(slots=True)
class VerifyReport:
    """`missing`: samples without a row; `duplicate`: rows beyond the first; `unknown`: rows of no sample."""

    num_samples: int
    prompts: tuple[str, ...]
    num_rows: int = 0
    missing: Finding = field(default_factory=Finding)
    duplicate: Finding = field(default_factory=Finding)
    unknown: Finding = field(default_factory=Finding)
    by_status: Counter[str] = field(default_factory=Counter)
    by_error_kind: Counter[str] = field(default_factory=Counter)

    @property
    def is_complete(self) -> bool:
        """Whether every sample of the source has exactly one row a prompt, and nothing else is there."""
        return not (self.missing.count or self.duplicate.count or self.unknown.count)


def verify(out_dir: Path, source: Source, prompts: Sequence[str] | None = None) -> VerifyReport:
    """Hold the rows of `out_dir` against the samples of `source`. Raises OutputError for an unreadable part.

    `prompts` are those of the run. Without them the ones that occur are taken (a prompt of which no row was written
    then goes unnoticed); where there are no rows at all, each sample counts as one missing row.
    """
    lengths = {shard.name: len(shard) for shard in source.shards}
    counts: dict[tuple[str, str], NDArray[np.uint32]] = {}
    report = VerifyReport(sum(lengths.values()), tuple(prompts or ()))
    columns = ("shard", "index", "prompt", "status", "error_kind")
    for _, table in read_columns(out_dir, columns, ("shard", "prompt", "status", "error_kind")):
        report.num_rows += table.num_rows
        for name, counter in (("status", report.by_status), ("error_kind", report.by_error_kind)):
            values = encoded(table.filter(table[name].is_valid()), name)
            numbers = np.bincount(values.codes, minlength=len(values.values))
            counter.update({v: int(n) for v, n in zip(values.values, numbers, strict=True) if n})
        for shard, prompt, indices in grouped(table):
            length = lengths.get(shard, 0)
            known = (indices >= 0) & (indices < length)
            if prompts is not None and prompt not in prompts:
                known[:] = False
            report.unknown.add(shard, prompt, np.sort(indices[~known]))
            if known.any():
                seen = counts.setdefault((shard, prompt), np.zeros(length, np.uint32))
                np.add.at(seen, indices[known], 1)
    report.prompts = report.prompts or tuple(sorted({prompt for _, prompt in counts}))
    for shard, length in lengths.items():
        for prompt in report.prompts or ("",):
            seen = counts.get((shard, prompt), np.zeros(length, np.uint32))
            report.missing.add(shard, prompt, np.flatnonzero(seen == 0))
            repeated = np.flatnonzero(seen > 1)
            report.duplicate.add(shard, prompt, repeated)
            report.duplicate.count += int((seen[repeated].astype(np.int64) - 2).sum())
    return report


def iter_rows(out_dir: Path) -> Iterator[dict[str, Any]]:
    """Every row of a run, ordered by shard name, index and prompt name. Raises OutputError.

    Parts are sorted in themselves and cover little more than a stretch of the source each, so they are merged
    with only those parts in memory that overlap at the present place.
    """
    waiting = sorted(_first_places(out_dir), reverse=True)
    merged: list[tuple[Place, str, Iterator[dict[str, Any]], dict[str, Any]]] = []
    while waiting or merged:
        while waiting and (not merged or waiting[-1][0] <= merged[0][0]):
            _push(merged, waiting[-1][1].name, _rows(waiting.pop()[1]))
        _, name, rows, row = heapq.heappop(merged)
        yield row
        _push(merged, name, rows)


def _push(
    merged: list[tuple[Place, str, Iterator[dict[str, Any]], dict[str, Any]]],
    name: str,
    rows: Iterator[dict[str, Any]],
) -> None:
    row = next(rows, None)
    if row is not None:
        heapq.heappush(merged, (_place(row), name, rows, row))


def _place(row: dict[str, Any]) -> Place:
    return row["shard"], row["index"], row["prompt"]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    table = read_part(path)
    for batch in table.sort_by([(name, "ascending") for name in ("shard", "index", "prompt")]).to_batches(
        512
    ):
        yield from batch.to_pylist()


def _first_places(out_dir: Path) -> Iterator[tuple[Place, Path]]:
    for path, table in read_columns(out_dir, ("shard", "index", "prompt"), ()):
        if table.num_rows:
            first = table.sort_by([(name, "ascending") for name in ("shard", "index", "prompt")]).slice(0, 1)
            yield _place(first.to_pylist()[0]), path
