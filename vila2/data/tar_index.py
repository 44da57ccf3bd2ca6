"""Where the members of a tar lie, found by our own reader of its 512-byte headers, and how members form samples.

The standard library's reader stops at the first damage. This one goes on: a broken header costs one BROKEN
member, and the scan resumes at the next block whose checksum is right; a cut file costs the member that was cut.
Reads ustar, GNU long names, PAX path and size, base-256 sizes (POSIX.1-2001 pax and the GNU tar manual).
Zero blocks between members are stepped over, so concatenated tars are read to their end.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

BLOCK = 512
_CHUNK_BLOCKS = 2048  # blocks that a search looks at in one read
_MAX_EXTENSION_BYTES = 1 << 20  # a long name or PAX header beyond this is damage
_CHECKSUM = slice(148, 156)
_REGULAR = (b"0", b"\0", b"7")
_PAX_LENGTH = re.compile(rb"(\d{1,7}) ")
_WITHOUT_DATA = (
    b"1",
    b"2",
    b"3",
    b"4",
    b"5",
    b"6",
)  # links, devices, folders, pipes: their size field is void


class State(Enum):
    """Whether a member's bytes can be used."""

    GOOD = "good"
    BROKEN = "broken"  # a header that does not parse; the member has no name
    SPARSE = "sparse"  # stored with holes, which we do not expand
    CUT = "cut"  # the file ends inside the member


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar. `offset` is where its first header begins; a BROKEN one may lack a name."""

    state: State
    name: bytes
    offset: int
    data: int
    size: int


@dataclass(slots=True)
class _Header:
    kind: bytes
    name: bytes
    size: int
    extended: bool  # GNU sparse: more headers follow


@dataclass(slots=True)
class _Pending:
    """What extension headers said of the next member."""

    start: int | None = None
    name: bytes | None = None
    size: int | None = None
    sparse: bool = False
    damaged: bool = False


class _Damage(Exception):
    """A header or an extension that does not parse."""


def _number(raw: bytes) -> int:
    """A numeric header field: octal digits, or base 256 when the top bit is set."""
    if raw[0] & 0x80:
        value = int.from_bytes(raw, "big") & ~(0x80 << 8 * (len(raw) - 1))
        if raw[0] == 0xFF:
            raise _Damage("negative number")
        return value
    text = raw.split(b"\0", 1)[0].strip()
    if not text:
        return 0
    if not re.fullmatch(rb"[0-7]+", text):
        raise _Damage("not an octal number")
    return int(text, 8)


def _parse_header(block: bytes) -> _Header:
    stored = _number(block[_CHECKSUM])
    rest = block[:148] + block[156:]
    total = 8 * 0x20 + sum(rest)
    if stored != total and stored != total - 256 * sum(byte > 127 for byte in rest):  # old: signed bytes
        raise _Damage("wrong checksum")
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0":  # the GNU magic has other fields where POSIX has the prefix
        prefix = block[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return _Header(block[156:157], name, _number(block[124:136]), bool(block[482]))


def _parse_pax(payload: bytes, pending: _Pending) -> None:
    """Read the records `length keyword=value\\n` of a PAX header into `pending`. Raises _Damage."""
    position = 0
    while position < len(payload) and payload[position] != 0:
        match = _PAX_LENGTH.match(payload, position)
        end = position + int(match[1]) if match else 0
        record = payload[match.end() : end] if match else b""
        keyword, equals, value = record[:-1].partition(b"=")
        if not equals or record[-1:] != b"\n" or end > len(payload):
            raise _Damage("PAX record does not parse")
        if keyword in (b"path", b"GNU.sparse.name"):
            pending.name = value
        elif keyword == b"size":
            if not re.fullmatch(rb"\d{1,18}", value):
                raise _Damage("PAX size does not parse")
            pending.size = int(value)
        elif keyword.startswith(b"GNU.sparse."):
            pending.sparse = True
        position = end


@dataclass(slots=True)
class _Scanner:
    fd: int
    file_size: int
    position: int = 0
    pending: _Pending = field(default_factory=_Pending)

    def members(self) -> Iterator[Member]:
        while self.position < self.file_size:
            block = os.pread(self.fd, BLOCK, self.position)
            if len(block) < BLOCK:
                if any(block):
                    yield self._end_member(State.CUT, self.pending.name or b"", self.position, 0)
                return
            if not any(block):
                following = self._find(self.position, _nonzero_blocks)
                if following is None:
                    return
                self.position = following
                self.pending = _Pending()
                continue
            try:
                header = _parse_header(block)
            except _Damage:
                yield self._broken()
                continue
            member = self._take(header)
            if member is not None:
                yield member

    def _take(self, header: _Header) -> Member | None:
        """Step over one header and what it holds; a regular file becomes a Member."""
        here = self.position
        if header.kind in b"LKxgX":
            return self._take_extension(header)
        size = header.size if self.pending.size is None else self.pending.size
        name = header.name if self.pending.name is None else self.pending.name
        data = here + BLOCK
        state = State.SPARSE if self.pending.sparse or header.kind == b"S" else State.GOOD
        while header.extended and header.kind == b"S":
            more = os.pread(self.fd, BLOCK, data)
            data += BLOCK
            header.extended = len(more) == BLOCK and bool(more[504])
        if header.kind in _WITHOUT_DATA:
            size = 0
        if data + size > self.file_size:
            return self._past_the_end(name, data, size)
        regular = header.kind in _REGULAR and not name.endswith(b"/")
        if not regular and state is State.GOOD:
            self._step(data + size)
            return None
        if self.pending.damaged:
            state, name = State.BROKEN, b""
        member = self._end_member(state, name, data, size)
        self._step(data + size)
        return member

    def _take_extension(self, header: _Header) -> Member | None:
        here = self.position
        data, end = here + BLOCK, here + BLOCK + header.size
        if end > self.file_size or header.size > _MAX_EXTENSION_BYTES:
            return self._past_the_end(b"", data, header.size) if end > self.file_size else self._broken()
        if self.pending.start is None:
            self.pending.start = here
        payload = os.pread(self.fd, header.size, data)
        if header.kind == b"L":
            self.pending.name = payload.split(b"\0", 1)[0]
        elif header.kind in b"xX":
            try:
                _parse_pax(payload, self.pending)
            except _Damage:
                self.pending.damaged = True  # the next header is sound, but its true name is lost
        self.position = _padded(end)
        return None

    def _past_the_end(self, name: bytes, data: int, size: int) -> Member:
        """A size that leaves the file: the file was cut, unless a sound header further on says that the size lies."""
        following = self._find(data, _header_blocks)
        if following is not None:
            return self._broken()
        member = self._end_member(State.CUT, name, data, size)
        self.position = self.file_size
        return member

    def _broken(self) -> Member:
        """The damage at the present position, up to the next sound header."""
        member = self._end_member(State.BROKEN, b"", self.position, 0)
        following = self._find(self.position + BLOCK, _header_blocks)
        self.position = self.file_size if following is None else following
        return member

    def _end_member(self, state: State, name: bytes, data: int, size: int) -> Member:
        start = self.position if self.pending.start is None else self.pending.start
        self.pending = _Pending()
        return Member(state, name, start, data, size)

    def _step(self, end: int) -> None:
        self.pending = _Pending()
        self.position = _padded(end)

    def _find(self, start: int, wanted: Callable[[NDArray[np.uint8]], int | None]) -> int | None:
        """The first block at or after `start` that `wanted` picks."""
        while start < self.file_size:
            chunk = os.pread(self.fd, BLOCK * _CHUNK_BLOCKS, start)
            if not chunk:
                return None
            if len(chunk) % BLOCK:
                chunk += bytes(BLOCK - len(chunk) % BLOCK)
            blocks = np.frombuffer(chunk, np.uint8).reshape(-1, BLOCK)
            found = wanted(blocks)
            if found is not None:
                return start + found * BLOCK
            start += len(chunk)
        return None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _nonzero_blocks(blocks: NDArray[np.uint8]) -> int | None:
    """The first row of `blocks` (n, 512) that is not all zeros."""
    nonzero = np.flatnonzero(blocks.any(axis=1))
    return int(nonzero[0]) if len(nonzero) else None


def _header_blocks(blocks: NDArray[np.uint8]) -> int | None:
    """The first row of `blocks` (n, 512) that is a sound header with a name."""
    digits = blocks[:, 148:154]  # quick test first: only few blocks of image data get beyond it
    octal = ((digits >= ord("0")) & (digits <= ord("7"))) | (digits == ord(" ")) | (digits == 0)
    for row in np.flatnonzero(octal.all(axis=1) & (blocks[:, 0] != 0)):
        try:
            _parse_header(blocks[row].tobytes())
        except _Damage:
            continue
        return int(row)
    return None


def scan_tar(fd: int, file_size: int) -> Iterator[Member]:
    """Yield the regular files of the tar open at `fd`, in order. Never raises for what the bytes say."""
    return _Scanner(fd, file_size).members()
