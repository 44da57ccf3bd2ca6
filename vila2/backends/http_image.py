"""How an image travels to a server: as a data URL, the file itself where that will do, else encoded anew."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vila2.data.orientation import find_orientation

JPEG_QUALITY = 95
_START, _SCAN, _END = b"\xff\xd8", 0xDA, b"\xff\xd9"
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended and progressive: what every decoder reads
_KEPT_NOTES = frozenset(
    {0xE0, 0xEE}
)  # JFIF and Adobe say how colours are meant; other notes say who, where and when
_NOTES = frozenset({*range(0xE0, 0xF0), 0xFE})


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image as the data URL that a request carries."""

    url: str

    @property
    def nbytes(self) -> int:
        return len(self.url)


@dataclass(frozen=True, slots=True)
class ImageEncoder:
    """How an image is sent: at most `longest_side` pixels, as jpeg, or as png, which keeps every pixel.

    With jpeg, a JPEG file within that size is sent as it is, but for its notes (see `bare_jpeg`).
    """

    format: str = "jpeg"
    longest_side: int | None = None

    def encode(
        self, pixels: NDArray[np.uint8], file: bytes = b"", *, apply_orientation: bool = True
    ) -> EncodedImage:
        """RGB (height, width, 3) to a data URL. `file` is what the pixels were decoded from, if that may be sent."""
        if self.format == "jpeg" and not self._is_too_large(pixels):
            is_upright = not apply_orientation or find_orientation(file, "JPEG") == 1
            bare = bare_jpeg(file) if is_upright else None
            if bare is not None:
                return _as_url("jpeg", bare)
        image = Image.fromarray(pixels)
        if self.longest_side is not None and self._is_too_large(pixels):
            scale = self.longest_side / max(image.size)
            width, height = (max(1, round(side * scale)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        if self.format == "png":
            image.save(buffer, "PNG", compress_level=1)
        else:
            image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return _as_url(self.format, buffer.getvalue())

    def _is_too_large(self, pixels: NDArray[np.uint8]) -> bool:
        return self.longest_side is not None and max(pixels.shape[:2]) > self.longest_side


def _as_url(format_name: str, data: bytes) -> EncodedImage:
    return EncodedImage(f"data:image/{format_name};base64,{base64.b64encode(data).decode('ascii')}")


def bare_jpeg(file: bytes) -> bytes | None:
    """A JPEG without its notes: EXIF with places and dates, thumbnails, comments, and whatever follows its end.

    None for anything that is not a plain JPEG, grey or in three colours: such is better encoded anew.
    """
    if not file.startswith(_START):
        return None
    pieces = [_START]
    place, is_plain = 2, False
    while place + 4 <= len(file) and file[place] == 0xFF:
        marker = file[place + 1]
        length = int.from_bytes(file[place + 2 : place + 4], "big")
        if length < 2:
            return None
        if marker in _FRAMES:
            is_plain = file[place + 9 : place + 10] in (b"\1", b"\3")
        if marker == _SCAN:
            end = file.find(_END, place + 2 + length)
            if not is_plain or end < 0:
                return None
            return b"".join((*pieces, file[place : end + 2]))
        if marker not in _NOTES or marker in _KEPT_NOTES:
            pieces.append(file[place : place + 2 + length])
        place += 2 + length
    return None
