"""Rows become parts: Parquet files that appear whole or not at all.

What is in a committed part is done, and what is not will be done again: there is no other record of progress. A
process that dies between two file operations leaves at most a temporary file, which its rank's next run removes.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vila2.data.files import atomic_write, make_folder, remove_leftovers, write_error
from vila2.data.parts import (
    list_parts,
    part_name,
    part_rank_and_number,
    parts_folder,
    rank_pattern,
    read_part,
)
from vila2.data.rows import DICTIONARY_COLUMNS, Row, from_record, to_table
from vila2.errors import OutputError


class PartWriter:
    """Collects rows and commits a part whenever `rows_per_part` have come. One writer a rank; see RunLock."""

    def __init__(self, out_dir: Path, rank: int = 0, world_size: int = 1, rows_per_part: int = 4096) -> None:
        if rows_per_part < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}, {rows_per_part} rows per part")
        self.folder = parts_folder(out_dir)
        self.rank = rank
        self.rows_per_part = rows_per_part
        self.num_rows_committed = 0
        self._rows: list[Row] = []
        make_folder(self.folder)
        try:
            remove_leftovers(self.folder, rank_pattern(rank))
        except OSError as exc:
            raise write_error(self.folder, exc) from exc
        places = [part_rank_and_number(path.name) for path in list_parts(out_dir)]
        self._number = max((place[1] + 1 for place in places if place and place[0] == rank), default=0)

    @property
    def num_rows_open(self) -> int:
        """Rows that wait for their part; a crash now loses these and they will be captioned again."""
        return len(self._rows)

    def add(self, row: Row) -> Path | None:
        """Take a row; returns the part if this row completed one. Raises OutputError."""
        self._rows.append(row)
        return self.flush() if len(self._rows) >= self.rows_per_part else None

    def flush(self) -> Path | None:
        """Commit the open rows as a part. Raises OutputError; the rows then stay open, and a second try
        writes the same part, so that no row can come twice."""
        if not self._rows:
            return None
        path = self.folder / part_name(self.rank, self._number)
        _write_part(path, self._rows)
        self._number += 1
        self.num_rows_committed += len(self._rows)
        self._rows = []
        return path

    def replace_part(self, name: str, rows: list[Row]) -> None:
        """Put `rows` in place of what the part holds; it must hold the same (shard, index, prompt)s.
        Atomic. Raises OutputError."""
        path = self.folder / name
        if sorted(row.place for row in rows) != sorted(row.place for row in load_part(path)):
            raise ValueError(f"the new rows of {name} are not for the same samples and prompts")
        _write_part(path, rows)


def load_part(path: Path) -> list[Row]:
    """All rows of a part. Raises OutputError."""
    table = read_part(path)
    try:
        return [from_record(record) for record in table.to_pylist()]
    except (KeyError, ValueError) as exc:
        raise OutputError(f"the part {path} was not written by this version: {exc}") from exc


def _write_part(path: Path, rows: list[Row]) -> None:
    """Commit `rows`, sorted by their place."""
    table = to_table(sorted(rows, key=lambda row: row.place))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=DICTIONARY_COLUMNS)
    try:
        atomic_write(path, memoryview(sink.getvalue()))
    except OSError as exc:
        raise write_error(path, exc) from exc
