"""Small .npz files beside the output that remember where samples lie, so that a resumed run does not scan again.

An index is a dictionary of numpy arrays. Its file name holds a digest of what it describes (path, size, time of the
last change), so a changed file meets a new index, never a stale one.
"""

import io
import zipfile
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila2.data.files import DEAD_AFTER_S, atomic_write, make_folder, remove_leftovers, write_error

Index = dict[str, NDArray[Any]]
_FORMAT = 1  # raise it when the meaning of an index changes: old files are then ignored


def index_path(index_dir: Path, kind: str, *identity: object) -> Path:
    """The file for an index; `identity` is what must be the same for it to be used again."""
    digest = blake2b(repr((_FORMAT, kind, *identity)).encode("utf-8", "backslashreplace"), digest_size=16)
    return index_dir / f"{kind}-{digest.hexdigest()}.npz"


def load_index(path: Path, only: tuple[str, ...] | None = None) -> Index | None:
    """The arrays (or `only` some of them), or None if the file is not there or does not parse."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in (only or archive.files)}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def save_index(path: Path, index: Index, *, exclusive: bool = False) -> None:
    """Write atomically. Raises OutputError; FileExistsError if `exclusive` and the file is there."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **index)
    make_folder(path.parent)
    try:
        remove_leftovers(path.parent, path.name, DEAD_AFTER_S)
        atomic_write(path, buffer.getbuffer(), exclusive=exclusive)
    except FileExistsError:
        raise
    except OSError as exc:
        raise write_error(path, exc) from exc


def pack_strings(name: str, strings: list[bytes]) -> Index:
    """Byte strings as two arrays: all bytes, and where each string ends."""
    lengths = np.fromiter(map(len, strings), np.int64, len(strings))
    return {name: np.frombuffer(b"".join(strings), np.uint8), f"{name}_ends": np.cumsum(lengths)}


def unpack_string(index: Index, name: str, i: int) -> bytes:
    """String `i` of `pack_strings`."""
    ends = index[f"{name}_ends"]
    start = int(ends[i - 1]) if i else 0
    return index[name][start : int(ends[i])].tobytes()
