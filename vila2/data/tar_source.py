"""WebDataset tars: consecutive members with the same key are one sample.

The key is the member's name up to the first dot of its last part, the folder kept (WebDataset's rule), so
`a/001.jpg`, `a/001.txt` and `a/001.json` form the sample `a/001`. Names that start with a dot, or have no dot, are no
part of any sample. Several images in one sample: the first whose whole extension names an image type is captioned.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vila2.data.local_index import Index, index_path, load_index, pack_strings, save_index, unpack_string
from vila2.data.reading import (
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    TEXT_EXTENSIONS,
    BadSample,
    printable,
    read_sidecar,
)
from vila2.data.source import pick_indices
from vila2.data.tar_index import Member, State, scan_tar
from vila2.types import ErrorKind, Sample, SampleError

_SAMPLE_NAME = re.compile(rb"((?:.*/)?[^./][^/.]*)\.([^/]*)", re.DOTALL)
_ABSENT = -1
# What an index stores as a number; the place in this tuple is the number.
_ERRORS = (
    None,
    ErrorKind.BROKEN_MEMBER,
    ErrorKind.TRUNCATED_TAR,
    ErrorKind.DUPLICATE_KEY,
    ErrorKind.NO_IMAGE,
    ErrorKind.EMPTY_FILE,
    ErrorKind.MISSING_FILE,
    ErrorKind.READ_ERROR,
)
_MESSAGES = {
    ErrorKind.BROKEN_MEMBER: "no sound tar header at byte {offset} (or a member stored with holes)",
    ErrorKind.TRUNCATED_TAR: "the tar ends inside the sample that begins at byte {offset}",
    ErrorKind.DUPLICATE_KEY: "the key came before in this tar; this one begins at byte {offset}",
    ErrorKind.NO_IMAGE: "no image among the members of this key (at byte {offset})",
    ErrorKind.EMPTY_FILE: "the tar has 0 bytes",
    ErrorKind.MISSING_FILE: "no such tar",
    ErrorKind.READ_ERROR: "the tar cannot be read",
}


@dataclass(slots=True)
class _Group:
    """The members of one sample, as they are met."""

    key: bytes
    offset: int
    members: dict[bytes, Member] = field(default_factory=dict)  # by extension, lower case
    error: ErrorKind | None = None

    def pick(self, extensions: Sequence[str]) -> Member | None:
        """The member whose extension is one of these; else the one whose last extension is."""
        wanted = [extension.encode() for extension in extensions]
        by_order = [member for ext, member in self.members.items() if ext in wanted]
        by_tail = [member for ext, member in self.members.items() if ext.rpartition(b".")[2] in wanted]
        return next(iter(by_order + by_tail), None)


def _groups(members: Iterator[Member]) -> Iterator[_Group]:
    """Group members into samples, in the order of their first headers."""
    seen: set[bytes] = set()
    group: _Group | None = None
    waiting: list[_Group] = []  # damage met while a group was open; it comes after the group

    for member in members:
        match = _SAMPLE_NAME.fullmatch(member.name) if member.name else None
        if member.state is State.BROKEN or (member.state is not State.GOOD and match is None):
            error = ErrorKind.TRUNCATED_TAR if member.state is State.CUT else ErrorKind.BROKEN_MEMBER
            waiting.append(_Group(b"@%d" % member.offset, member.offset, error=error))
            continue
        if match is None or _is_meta(member.name):
            continue
        key, extension = match[1], match[2].lower()
        if group is None or group.key != key or extension in group.members:
            if group is not None:
                yield _finish(group, seen)
            yield from waiting
            waiting = []
            group = _Group(key, member.offset)
        group.members[extension] = member
        if member.state is not State.GOOD:
            group.error = ErrorKind.TRUNCATED_TAR if member.state is State.CUT else ErrorKind.BROKEN_MEMBER
    if group is not None:
        yield _finish(group, seen)
    yield from waiting


def _finish(group: _Group, seen: set[bytes]) -> _Group:
    if group.error is None and group.key in seen:
        group.error = ErrorKind.DUPLICATE_KEY
    if group.error is None and group.pick(IMAGE_EXTENSIONS) is None:
        group.error = ErrorKind.NO_IMAGE
    seen.add(group.key)
    return group


def _is_meta(name: bytes) -> bool:
    last = name.rpartition(b"/")[2]
    return last.startswith(b"__") and last.endswith(b"__")


def build_index(path: Path) -> Index:
    """Scan a tar. Arrays per sample: key, offset of its first header, error, and (data offset, size) of its
    image and texts (-1 where absent). Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        file_size = os.fstat(fd).st_size
        groups = list(_groups(scan_tar(fd, file_size)))
    finally:
        os.close(fd)
    if file_size == 0:
        groups = [_Group(b"@0", 0, error=ErrorKind.EMPTY_FILE)]
    return _pack(groups)


def _pack(groups: list[_Group]) -> Index:
    index = pack_strings("key", [printable(group.key).encode() for group in groups])
    index["count"] = np.array(len(groups), np.int64)
    index["offset"] = np.array([group.offset for group in groups], np.int64)
    index["error"] = np.array([_ERRORS.index(group.error) for group in groups], np.uint8)
    for name, extensions in (("image", IMAGE_EXTENSIONS), *((ext, (ext,)) for ext in TEXT_EXTENSIONS)):
        picked = (group.pick(extensions) for group in groups)
        places = [(m.data, m.size) if m is not None else (_ABSENT, _ABSENT) for m in picked]
        index[name] = np.array(places, np.int64).reshape(-1, 2)
    return index


def _unreadable(exc: OSError) -> Index:
    """The index of a tar that cannot be opened: one sample, which says so."""
    return _pack([_Group(b"@0", 0, error=_kind_of(exc))])


def _kind_of(exc: OSError) -> ErrorKind:
    return ErrorKind.MISSING_FILE if isinstance(exc, FileNotFoundError) else ErrorKind.READ_ERROR


def _key(index: Index, i: int) -> str:
    return unpack_string(index, "key", i).decode()


def _pread(fd: int, place: NDArray[np.int64], max_bytes: int, shown: str) -> bytes:
    """The bytes of a member at `place` (offset, size). Raises BadSample."""
    offset, size = int(place[0]), int(place[1])
    if size > max_bytes:
        raise BadSample(ErrorKind.READ_ERROR, f"larger than {max_bytes} bytes: {shown}")
    try:
        data = os.pread(fd, size, offset)
    except OSError as exc:
        raise BadSample(ErrorKind.READ_ERROR, f"cannot read {shown}: {exc.strerror}") from exc
    if len(data) != size:
        raise BadSample(ErrorKind.READ_ERROR, f"the tar changed while it was read: {shown}")
    return data


@dataclass
class TarShard:
    """One tar. Without `index_dir` the index stays in memory; with it, it is kept there as a file."""

    path: Path
    name: str
    index_dir: Path | None = None
    _length: int | None = field(default=None, init=False)

    def __len__(self) -> int:
        if self._length is None:
            path = self._index_path()
            stored = load_index(path, only=("count",)) if path else None
            self._length = int((stored or self._index())["count"])
        return self._length

    def read(self, indices: Sequence[int] | None = None) -> Iterator[Sample]:
        index = self._index()
        chosen = pick_indices(int(index["count"]), indices)
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            error = SampleError(_kind_of(exc), f"cannot read the tar {self.name}: {exc.strerror}")
            yield from (Sample(self.name, i, _key(index, i), error=error) for i in chosen)
            return
        try:
            for i in chosen:
                yield self._sample(index, fd, i)
        finally:
            os.close(fd)

    def _sample(self, index: Index, fd: int, i: int) -> Sample:
        key = _key(index, i)
        kind = _ERRORS[index["error"][i]]
        if kind is not None:
            error = SampleError(kind, _MESSAGES[kind].format(offset=int(index["offset"][i])))
            return Sample(self.name, i, key, error=error)
        try:
            original, fields = self._texts(index, fd, i, key)
            image = _pread(fd, index["image"][i], MAX_IMAGE_BYTES, key)
            if not image:
                raise BadSample(ErrorKind.EMPTY_FILE, f"the image has 0 bytes: {key}")
        except BadSample as exc:
            return Sample(self.name, i, key, error=exc.error)
        return Sample(self.name, i, key, image, original, fields)

    def _texts(self, index: Index, fd: int, i: int, key: str) -> tuple[str, dict[str, str]]:
        original = ""
        fields: dict[str, str] = {}
        for extension in TEXT_EXTENSIONS:
            place = index[extension][i]
            if place[0] == _ABSENT:
                continue
            data = _pread(fd, place, MAX_TEXT_BYTES, f"{key}.{extension}")
            text, more = read_sidecar(data, extension, f"{key}.{extension}")
            original, fields = original or text, fields | more
        return original, fields

    def _index(self) -> Index:
        path = self._index_path()
        if path is None:
            return self._memory_index
        index = load_index(path)
        if index is None:
            try:
                index = build_index(self.path)
            except OSError as exc:
                return _unreadable(exc)  # not stored: it may be readable the next time
            save_index(path, index)
        return index

    @cached_property
    def _memory_index(self) -> Index:
        try:
            return build_index(self.path)
        except OSError as exc:
            return _unreadable(exc)

    def _index_path(self) -> Path | None:
        if self.index_dir is None:
            return None
        try:
            status = self.path.stat()
        except OSError:
            return self.index_dir / "unreadable.npz"  # never written
        return index_path(self.index_dir, "tar", str(self.path), status.st_size, status.st_mtime_ns)
