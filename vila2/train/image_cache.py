"""Images cut once and kept on disk: tiles in one file, and a hash table of where they lie in another.

Bounded: what comes when the file is full is not kept. Safe with several processes on one machine, and after a crash:
writers take turns by a lock that dies with its process, and every read is checked by a checksum, so that what is torn
counts as missing. Files are read and written by their descriptors; a full disk is an error here and not a signal.
"""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from vila2.data.files import make_folder, write_error
from vila2.errors import UsageError
from vila2.model.images import ImageProcessor, PreparedImage

_FORMAT = 1  # raise it when pixels or the layout change: old files are then ignored
_ENTRY = np.dtype(
    [
        ("key", "V16"),
        ("first", "<i8"),  # the number of its first tile in the file
        ("tiles", "<i4"),
        ("rows", "<i4"),  # of the grid; 0: one plain tile
        ("columns", "<i4"),
        ("num_tokens", "<i4"),
        ("num_placeholders", "<i4"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("check", "<u4"),
        ("used", "<u4"),
    ]
)
_HEADER = 64  # bytes: the number of tiles in the file


@dataclass(slots=True)
class CacheCounts:
    """What this process met."""

    hits: int = 0
    misses: int = 0
    stored: int = 0
    refused: int = 0  # the cache was full, or the disk


class ImageCache:
    """The cache in `folder` for one processor, of at most `max_bytes`. Safe to use from many threads."""

    def __init__(self, folder: Path, processor: ImageProcessor, max_bytes: int) -> None:
        side = processor.s2_scales[-1] if processor.mode == "s2" else processor.image_size
        self._shape = (side, side, 3)
        self._tile_bytes = side * side * 3
        self._capacity = (max_bytes - _HEADER) // (self._tile_bytes + 2 * _ENTRY.itemsize)
        if self._capacity < 1:
            raise UsageError(f"an image cache of {max_bytes} bytes holds not one tile of {self._tile_bytes}")
        self._slots = 2 * self._capacity  # a table that is half full at most
        self._mode = processor.mode
        self._full = False
        identity = repr((_FORMAT, processor, self._slots))
        self.folder = folder / blake2b(identity.encode(), digest_size=8).hexdigest()
        self.counts = CacheCounts()
        self._thread_lock = threading.Lock()
        make_folder(self.folder)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._tiles = os.open(self.folder / "tiles.bin", flags, 0o666)
            self._index = os.open(self.folder / "index.bin", flags, 0o666)
            with self._locked():
                size = _HEADER + self._slots * _ENTRY.itemsize
                if os.fstat(self._index).st_size != size:
                    os.ftruncate(self._index, size)  # zeros: nothing is there yet
        except OSError as error:
            raise write_error(self.folder, error) from error

    def close(self) -> None:
        for fd in (self._tiles, self._index):
            os.close(fd)

    def get(self, key: bytes) -> PreparedImage | None:
        """The image under a key of 16 bytes, or None."""
        found = self._read(key)
        if found is None:
            self.counts.misses += 1
        else:
            self.counts.hits += 1
        return found

    def put(self, key: bytes, image: PreparedImage) -> None:
        """Keep an image, if there is room. One that cannot be written is not kept, and nothing else happens."""
        if self._full:
            self.counts.refused += 1
            return
        try:
            with self._locked():
                if self._read(key) is None:
                    self._write(key, image)
        except OSError:
            self.counts.refused += 1

    def _read(self, key: bytes) -> PreparedImage | None:
        for _, entry in self._probe(key):
            if not entry["used"]:
                return None
            if entry["key"].tobytes() == key:
                break
        else:
            return None
        count = int(entry["tiles"])
        if not 0 < count <= self._capacity:
            return None
        data = os.pread(self._tiles, count * self._tile_bytes, int(entry["first"]) * self._tile_bytes)
        if len(data) != count * self._tile_bytes or _check(entry, data) != entry["check"]:
            return None
        return PreparedImage(
            tiles=np.frombuffer(data, dtype=np.uint8).reshape(count, *self._shape),
            mode=self._mode,
            grid=(int(entry["rows"]), int(entry["columns"])) if entry["rows"] else None,
            num_tokens=int(entry["num_tokens"]),
            num_placeholders=int(entry["num_placeholders"]),
            width=int(entry["width"]),
            height=int(entry["height"]),
        )

    def _write(self, key: bytes, image: PreparedImage) -> None:
        first = int.from_bytes(os.pread(self._index, 8, 0), "little")
        place = next((at for at, e in self._probe(key) if not e["used"] or e["key"].tobytes() == key), None)
        if place is None or first + len(image.tiles) > self._capacity:
            self._full = True  # or nearly: smaller images are not waited for
            self.counts.refused += 1
            return
        data = np.ascontiguousarray(image.tiles).tobytes()
        rows, columns = image.grid or (0, 0)
        entry = np.zeros((), dtype=_ENTRY)
        entry["key"] = np.frombuffer(key, dtype="V16")[0]
        entry["first"], entry["tiles"], entry["rows"], entry["columns"] = (
            first,
            len(image.tiles),
            rows,
            columns,
        )
        entry["num_tokens"], entry["num_placeholders"] = image.num_tokens, image.num_placeholders
        entry["width"], entry["height"] = image.width, image.height
        entry["check"] = _check(entry, data)
        entry["used"] = 1
        _write_all(self._index, (first + len(image.tiles)).to_bytes(8, "little"), 0)
        _write_all(self._tiles, data, first * self._tile_bytes)
        _write_all(self._index, entry.tobytes(), place)
        self.counts.stored += 1

    def _probe(self, key: bytes) -> Iterator[tuple[int, Any]]:
        """The places of the table where the key may be, each with its entry, up to a free one."""
        start = int.from_bytes(key[:8], "little")
        for step in range(self._slots):
            place = _HEADER + (start + step) % self._slots * _ENTRY.itemsize
            entry = np.frombuffer(os.pread(self._index, _ENTRY.itemsize, place), dtype=_ENTRY)[0]
            yield place, entry
            if not entry["used"]:
                return

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._thread_lock:
            fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                yield
            finally:
                os.close(fd)


def _check(entry: Any, data: bytes) -> int:
    """A checksum of the pixels and of what the entry says of them."""
    said = [entry[name].tobytes() for name in _ENTRY.names or () if name not in ("check", "used")]
    return crc32(data, crc32(b"".join(said)))


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
