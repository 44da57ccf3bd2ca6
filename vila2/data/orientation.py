"""The EXIF orientation of an image, found in its bytes without decoding it, and how to undo it.

One reader for all decoders, so that an image comes out the same way up whichever of them reads it. Follows EXIF 2.32
(TIFF tag 0x0112 in the first IFD) inside JPEG APP1, PNG eXIf, WebP EXIF and TIFF itself.
"""

import struct

import numpy as np
from numpy.typing import NDArray

_TAG = 0x0112
_UPRIGHT = 1


def find_orientation(data: bytes, format_name: str) -> int:
    """The orientation 1..8 of an encoded image; 1 where there is none or where it does not parse."""
    try:
        place = _find_place(data, format_name)
        return place[0] if place is not None else _UPRIGHT
    except (struct.error, IndexError):
        return _UPRIGHT


def without_orientation(data: bytes, format_name: str) -> bytes:
    """The same image marked as upright: Pillow turns TIFF by itself, in some versions."""
    try:
        place = _find_place(data, format_name)
    except (struct.error, IndexError):
        return data
    if place is None:
        return data
    value, offset, order = place
    return data if value == _UPRIGHT else data[:offset] + struct.pack(order + "H", 1) + data[offset + 2 :]


def turn_upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """`pixels` (H, W, 3) the right way up; a view where no copy is needed."""
    if orientation >= 5:  # 5..8: rows and columns are exchanged
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def _find_place(data: bytes, format_name: str) -> tuple[int, int, str] | None:
    """The value, its offset in `data`, and the byte order."""
    start = 0 if format_name == "TIFF" else _EXIF_FINDERS.get(format_name, _no_exif)(data)
    return None if start is None else _tag_in_tiff(data, start)


def _tag_in_tiff(data: bytes, start: int) -> tuple[int, int, str] | None:
    order = {b"II": "<", b"MM": ">"}.get(data[start : start + 2])
    if (
        order is None or struct.unpack_from(order + "H", data, start + 2)[0] != 42
    ):  # 43, BigTIFF, is left alone
        return None
    ifd = start + struct.unpack_from(order + "I", data, start + 4)[0]
    (count,) = struct.unpack_from(order + "H", data, ifd)
    for entry in range(ifd + 2, ifd + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(order + "HHI", data, entry)
        if tag == _TAG:
            (value,) = struct.unpack_from(order + "H", data, entry + 8)
            return (value, entry + 8, order) if kind == 3 and number == 1 and 1 <= value <= 8 else None
    return None


def _in_jpeg(data: bytes) -> int | None:
    position = 2
    while data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in (0xDA, 0xD9):  # the scan begins, or the image ends
            return None
        (length,) = struct.unpack_from(">H", data, position + 2)
        if marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            return position + 10
        position += 2 + length
    return None


def _in_png(data: bytes) -> int | None:
    position = 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"eXIf":
            return position + 8
        position += 12 + length
    return None


def _in_webp(data: bytes) -> int | None:
    position = 12
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind == b"EXIF":
            start = position + 8
            return start + 6 if data[start : start + 6] == b"Exif\0\0" else start
        position += 8 + length + (length & 1)
    return None


def _no_exif(data: bytes) -> int | None:
    return None


_EXIF_FINDERS = {"JPEG": _in_jpeg, "PNG": _in_png, "WEBP": _in_webp}
