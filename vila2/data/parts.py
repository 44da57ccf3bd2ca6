"""The part files of an output folder: their names and how they are read.

`parts/part-r00002-000013.parquet` is the fourteenth part that rank 2 wrote. Numbers only grow.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vila2.errors import OutputError

_NAME = re.compile(r"part-r(\d{5,})-(\d{6,})\.parquet")


def parts_folder(out_dir: Path) -> Path:
    return out_dir / "parts"


def part_name(rank: int, number: int) -> str:
    return f"part-r{rank:05d}-{number:06d}.parquet"


def rank_pattern(rank: int) -> str:
    """A glob for the parts of a rank."""
    return f"part-r{rank:05d}-*.parquet"


def part_rank_and_number(name: str) -> tuple[int, int] | None:
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def part_owner(path: Path, world_size: int) -> int:
    """The rank that may replace a part when `world_size` processes run at the same time: exactly one of them."""
    place = part_rank_and_number(path.name)
    if place is None:
        raise ValueError(f"not a part: {path}")
    return place[0] % world_size


def list_parts(out_dir: Path) -> list[Path]:
    """All committed parts, sorted by name. Raises OutputError if the folder cannot be read."""
    try:
        return sorted(path for path in parts_folder(out_dir).iterdir() if _NAME.fullmatch(path.name))
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise OutputError(f"cannot list {parts_folder(out_dir)}: {exc.strerror}") from exc


def read_part(path: Path, columns: Sequence[str] | None = None, dictionary: Sequence[str] = ()) -> pa.Table:
    """A part, or some columns of it; those in `dictionary` come dictionary-encoded, in one chunk.
    Raises OutputError."""
    try:
        with pq.ParquetFile(path, read_dictionary=list(dictionary)) as file:
            return file.read(columns=list(columns) if columns else None, use_threads=False).combine_chunks()
    except (pa.ArrowException, OSError, ValueError, KeyError) as exc:
        reason = str(exc).partition("\n")[0]
        raise OutputError(
            f"the part {path} cannot be read ({reason}); move it away, and the same run writes its rows again"
        ) from exc


def read_columns(
    out_dir: Path, columns: Sequence[str], dictionary: Sequence[str]
) -> Iterator[tuple[Path, pa.Table]]:
    """Every part with some of its columns, one after the other. Raises OutputError."""
    for path in list_parts(out_dir):
        yield path, read_part(path, columns, dictionary)
