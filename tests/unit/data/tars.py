"""Tars made by the standard library, and where their members lie."""

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def make_tar(members: list[tuple[str, bytes]], format_name: str = "gnu") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[format_name]) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], format_name: str = "gnu") -> Path:
    path.write_bytes(make_tar(members, format_name))
    return path


@dataclass(frozen=True)
class Extent:
    """A member as the standard library sees it: its first header, its data, and where the data end."""

    name: str
    start: int
    data: int
    end: int


def extents(tar: bytes) -> list[Extent]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        return [Extent(m.name, m.offset, m.offset_data, m.offset_data + m.size) for m in opened if m.isreg()]
