"""Records by number: the lines of JSON Lines files, and a store for what has to be put together first.

Both read a record by its place, so that memory holds places alone.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vila2.data.files import replacing
from vila2.data.local_index import index_path, load_index, save_index
from vila2.errors import SourceError
from vila2.train.examples import SkippedDocument

_CHUNK = 1 << 24
_NEWLINE = ord("\n")
_MAX_RECORD = 1 << 28


class Records(Protocol):
    """Objects by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record `index`. Raises SkippedDocument if it is no JSON object."""
        ...


def find_files(path: str, suffixes: Sequence[str]) -> list[Path]:
    """The file `path`, or the files below the folder `path` with one of `suffixes`, by name. Raises SourceError."""
    found = Path(path).expanduser()
    if found.is_dir():
        files = sorted(
            file for file in found.rglob("*") if file.suffix.lower() in suffixes and file.is_file()
        )
    else:
        files = [found] if found.is_file() else []
    if not files:
        wanted = " or ".join(suffixes)
        raise SourceError(f"{path} is neither a file nor a folder with {wanted} files")
    return files


class LineRecords:
    """The lines of some files, one JSON object each. `cache` keeps their places for later runs."""

    def __init__(self, files: Sequence[Path], cache: Path | None = None) -> None:
        self.files = list(files)
        self._places = [_places_of_lines(file, cache) for file in files]
        self._ends = np.cumsum([len(places) for places in self._places])
        if self._ends[-1] == 0:
            raise SourceError(f"{files[0]} holds no records")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        places = self._places[number]
        start, size = places[index - (int(self._ends[number]) - len(places))]
        return read_record(self.files[number], int(start), int(size))


def read_record(path: Path, start: int, size: int) -> dict[str, Any]:
    """The JSON object at bytes `start` .. `start + size` of a file. Raises SkippedDocument."""
    shown = f"{path} at byte {start}"
    if size > _MAX_RECORD:
        raise SkippedDocument("bad_record", f"{shown}: a record of {size} bytes")
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(size)
    except OSError as error:
        raise SkippedDocument("read_error", f"{shown}: {error.strerror}") from error
    return parsed(data, shown)


def parsed(data: bytes, shown: str) -> dict[str, Any]:
    """A JSON object. Raises SkippedDocument."""
    try:
        value = json.loads(data.decode("utf-8-sig"), strict=False)
    except UnicodeDecodeError:
        raise SkippedDocument("bad_text", f"{shown}: not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise SkippedDocument("bad_record", f"{shown}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise SkippedDocument("bad_record", f"{shown}: not a JSON object")
    return value


def _places_of_lines(path: Path, cache: Path | None) -> NDArray[np.int64]:
    """(start, size) of each line that is not blank. Raises SourceError."""
    try:
        status = path.stat()
        kept = None
        if cache is not None:
            kept = index_path(cache, "lines", str(path.absolute()), status.st_size, status.st_mtime_ns)
            stored = load_index(kept)
            if stored is not None:
                return stored["place"]
        places = _scan_lines(path)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    if kept is not None:
        save_index(kept, {"place": places})
    return places


def _scan_lines(path: Path) -> NDArray[np.int64]:
    ends: list[NDArray[np.int64]] = []
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == _NEWLINE).astype(np.int64) + size)
            size += len(chunk)
    stops = np.concatenate([*ends, np.array([size], np.int64)])
    starts = np.concatenate([np.zeros(1, np.int64), stops[:-1] + 1])
    sizes = stops - starts
    return np.stack([starts, sizes], axis=1)[sizes > 1]  # one byte is no object; a lone \r is a blank line


class RecordStore:
    """Records written once into a file of this project's own and read by number.

    With `path` the file stays, and a store that is there already is read and not written again; without, it is a
    temporary file that ends with the process.
    """

    def __init__(self, records: Iterable[dict[str, Any]], path: Path | None = None) -> None:
        self._path = path
        ends = self._stored_ends() if path is not None else None
        if ends is not None and path is not None:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        elif path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                ends = _write_records(records, temporary)
            save_index(_ends_path(path), {"ends": ends})
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        else:
            with tempfile.NamedTemporaryFile(prefix="vila2-records-") as file:
                ends = _write_records(records, Path(file.name))
                self._fd = os.open(file.name, os.O_RDONLY | os.O_CLOEXEC)
        assert ends is not None
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self._ends[index - 1]) if index else 0
        data = os.pread(self._fd, int(self._ends[index]) - start, start)
        return parsed(data, f"record {index} of {self._path}")

    def __del__(self) -> None:
        fd = getattr(self, "_fd", None)
        if fd is not None:
            os.close(fd)

    def _stored_ends(self) -> NDArray[np.int64] | None:
        assert self._path is not None
        stored = load_index(_ends_path(self._path)) if self._path.exists() else None
        if stored is None or len(stored["ends"]) == 0:
            return None
        ends: NDArray[np.int64] = stored["ends"]
        return ends if int(ends[-1]) == self._path.stat().st_size else None


def _ends_path(path: Path) -> Path:
    return path.with_suffix(".npz")


def _write_records(records: Iterable[dict[str, Any]], path: Path) -> NDArray[np.int64]:
    ends: list[int] = []
    end = 0
    with path.open("wb") as file:
        for record in records:
            end += file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace"))
            ends.append(end)
    return np.array(ends, dtype=np.int64)
