"""What an output folder holds already, read from the committed parts: the only record of progress there is."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vila2.data.parts import read_columns
from vila2.types import Status

_MARKS = ("shard", "prompt", "status")


@dataclass(frozen=True, slots=True)
class ErrorRows:
    """The rows of a part that have status error: what `--retry-errors` does again."""

    part: Path
    rows: NDArray[np.int64]


@dataclass(slots=True)
class DoneSet:
    """Which (shard, prompt, index) have a row, whatever its status: one byte each. Memory grows with them only."""

    num_rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # rows by status
    errors: list[ErrorRows] = field(default_factory=list)
    _marks: dict[tuple[str, str], NDArray[np.bool_]] = field(default_factory=dict)

    @classmethod
    def load(cls, out_dir: Path) -> "DoneSet":
        """Read all parts of a folder. Raises OutputError naming a part that does not parse."""
        done = cls()
        for path, table in read_columns(out_dir, ("shard", "index", "prompt", "status"), _MARKS):
            done.num_rows += table.num_rows
            for shard, prompt, indices in grouped(table):
                done._mark(shard, prompt, indices)
            statuses = encoded(table, "status")
            numbers = np.bincount(statuses.codes, minlength=len(statuses.values))
            done.counts.update({s: int(n) for s, n in zip(statuses.values, numbers, strict=True) if n})
            if Status.ERROR.value in statuses.values:
                wanted = statuses.values.index(Status.ERROR.value)
                rows = np.flatnonzero(statuses.codes == wanted)
                if len(rows):
                    done.errors.append(ErrorRows(path, rows))
        return done

    def is_done(self, shard: str, prompt: str, index: int) -> bool:
        marks = self._marks.get((shard, prompt))
        return marks is not None and index < len(marks) and bool(marks[index])

    def missing_prompts(self, shard: str, index: int, prompts: Sequence[str]) -> tuple[str, ...]:
        """Those of `prompts` that the sample still lacks."""
        return tuple(prompt for prompt in prompts if not self.is_done(shard, prompt, index))

    def pending(self, shard: str, start: int, stop: int, prompts: Sequence[str]) -> NDArray[np.int64]:
        """The indices in [start, stop) that lack at least one of `prompts`, ascending."""
        complete = np.ones(max(stop - start, 0), np.bool_)
        for prompt in prompts:
            marks = self._marks.get((shard, prompt), np.zeros(0, np.bool_))[start:stop]
            complete[: len(marks)] &= marks
            complete[len(marks) :] = False
        return np.flatnonzero(~complete) + start

    def _mark(self, shard: str, prompt: str, indices: NDArray[np.int64]) -> None:
        marks = self._marks.get((shard, prompt), np.zeros(0, np.bool_))
        needed = int(indices.max()) + 1
        if needed > len(marks):
            marks = np.concatenate([marks, np.zeros(max(needed, len(marks) * 2) - len(marks), np.bool_)])
            self._marks[shard, prompt] = marks
        marks[indices] = True


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text column as numbers: row i holds `values[codes[i]]`."""

    values: list[str]
    codes: NDArray[np.int64]


def encoded(table: pa.Table, name: str) -> Encoded:
    """A dictionary-encoded text column of a table with any number of chunks."""
    column = table[name].unify_dictionaries()
    if column.num_chunks == 0:
        return Encoded([], np.zeros(0, np.int64))
    codes = [chunk.indices.to_numpy(zero_copy_only=False).astype(np.int64) for chunk in column.chunks]
    return Encoded(column.chunk(0).dictionary.to_pylist(), np.concatenate(codes))


def grouped(table: pa.Table) -> Iterator[tuple[str, str, NDArray[np.int64]]]:
    """The `index` values of each (shard, prompt) in a table whose `shard` and `prompt` are dictionary-encoded."""
    if table.num_rows == 0:
        return
    shards, prompts = encoded(table, "shard"), encoded(table, "prompt")
    indices = table["index"].to_numpy()
    pairs = shards.codes * len(prompts.values) + prompts.codes
    order = np.argsort(pairs, kind="stable")
    present, starts = np.unique(pairs[order], return_index=True)
    for pair, chosen in zip(present, np.split(order, starts[1:]), strict=True):
        shard, prompt = divmod(int(pair), len(prompts.values))
        yield shards.values[shard], prompts.values[prompt], indices[chosen]
