"""Encoded bytes to RGB pixels: libjpeg-turbo (simplejpeg) for JPEG, Pillow for the rest, exact to Pillow in both.

What comes out: the first frame of an animation; alpha composited on white; 16 bits scaled to 8 (65535 becomes 255);
CMYK and palettes as Pillow converts them; turned upright by EXIF unless switched off. What cannot be decoded is a
typed DecodeError, never a warning and never another exception. Safe to call from many threads.
"""

import ctypes
import io
import logging
import warnings
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError, _imaging

from vila2.data.orientation import find_orientation, turn_upright, without_orientation
from vila2.types import ErrorKind, SampleError

try:
    import simplejpeg
except ImportError:  # no wheel for this machine: Pillow decodes JPEG too, more slowly
    simplejpeg = None

# Pillow says what it dislikes by warnings and log lines; here every failure is typed, and nothing else matters.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())

_WHITE = (255, 255, 255)
_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)


class DecodeError(Exception):
    """Why bytes are no image that we can use; `error` is what a row says of it."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.error = SampleError(kind, message)

    @property
    def kind(self) -> ErrorKind:
        return self.error.kind


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What counts as an image. Sizes are checked in the header, before memory for pixels is taken.

    For WebP and TIFF, Pillow's own `2 * Image.MAX_IMAGE_PIXELS` (179 million) holds as well.
    """

    max_pixels: int = 100_000_000
    min_side: int = 4
    max_aspect: float = 100.0

    def __post_init__(self) -> None:
        if self.max_pixels < 1 or self.min_side < 1 or self.max_aspect < 1:
            raise ValueError(f"limits must be at least 1, got {self}")

    def check(self, width: int, height: int) -> None:
        """Raise DecodeError unless an image of this size is wanted."""
        size = f"{width}x{height}"
        if width * height > self.max_pixels:
            raise DecodeError(ErrorKind.TOO_MANY_PIXELS, f"{size} is more than {self.max_pixels} pixels")
        if min(width, height) < self.min_side:
            raise DecodeError(ErrorKind.TOO_SMALL, f"{size} has a side below {self.min_side} pixels")
        if max(width, height) > self.max_aspect * min(width, height):
            raise DecodeError(ErrorKind.EXTREME_ASPECT, f"{size} is longer than {self.max_aspect:g} to 1")


@dataclass(frozen=True, slots=True)
class Decoded:
    """`pixels` is contiguous uint8 (height, width, 3), RGB; the sizes are those after turning upright."""

    pixels: NDArray[np.uint8]
    width: int
    height: int


def image_digest(data: bytes) -> str:
    """Names an image by its encoded bytes: 32 hexadecimal digits."""
    return blake2b(data, digest_size=16).hexdigest()


def decode_image(
    data: bytes, limits: DecodeLimits = DecodeLimits(), *, apply_orientation: bool = True
) -> Decoded:
    """Decode a JPEG, PNG, WebP, GIF, BMP or TIFF. Raises DecodeError and nothing else."""
    format_name = _sniff(data)
    try:
        pixels = _decode_jpeg(data, limits) if format_name == "JPEG" and simplejpeg else None
        if pixels is None:
            pixels = _decode_with_pillow(data, format_name, limits)
    except DecodeError:
        raise
    except Image.DecompressionBombError as exc:
        raise DecodeError(ErrorKind.TOO_MANY_PIXELS, f"beyond Pillow's own limit: {exc}") from exc
    except UnidentifiedImageError as exc:
        raise DecodeError(ErrorKind.CORRUPT_IMAGE, f"a {format_name} header that does not parse") from exc
    except Exception as exc:  # decoders raise what they like: OSError, SyntaxError, struct.error, MemoryError
        reason = str(exc).partition("\n")[0] or type(exc).__name__
        raise DecodeError(ErrorKind.CORRUPT_IMAGE, f"broken {format_name}: {reason}") from exc
    if apply_orientation:
        pixels = turn_upright(pixels, find_orientation(data, format_name))
    pixels = np.ascontiguousarray(pixels)
    return Decoded(pixels, pixels.shape[1], pixels.shape[0])


def _sniff(data: bytes) -> str:
    """The format by its first bytes. Raises DecodeError."""
    if not data:
        raise DecodeError(ErrorKind.EMPTY_FILE, "0 bytes")
    for signature, name in _SIGNATURES:
        if data.startswith(signature):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    raise DecodeError(ErrorKind.NOT_AN_IMAGE, f"not an image that we read: {_guess(data)}")


def _guess(data: bytes) -> str:
    head = data[:512].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<svg")):
        return "a web page or XML"
    if data[4:8] == b"ftyp":
        return "AVIF, HEIC or a film"
    return f"it begins with {data[:8].hex(' ')}"


def _decode_jpeg(data: bytes, limits: DecodeLimits) -> NDArray[np.uint8] | None:
    """RGB pixels, or None for what Pillow shall judge: CMYK, odd codings, damage of any kind."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    limits.check(width, height)
    if colorspace not in ("YCbCr", "RGB", "Gray"):
        return None
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        return None
    return pixels


def _decode_with_pillow(data: bytes, format_name: str, limits: DecodeLimits) -> NDArray[np.uint8]:
    if format_name == "WEBP":
        _check_webp_size(data, limits)  # Pillow takes memory for two canvases when it opens one
    if format_name == "TIFF":
        _silence_libtiff()
        data = without_orientation(data, format_name)
    with _open(data, format_name) as image:
        limits.check(*image.size)
        image.load()
        return np.asarray(_to_rgb(image))


@lru_cache(maxsize=1)
def _silence_libtiff() -> None:
    """Stop libtiff from writing to stderr; its failures reach us through Pillow as well.

    Pillow has no switch for this, so libtiff's own is found through the library that Pillow has loaded.
    """
    try:
        pillow = ctypes.CDLL(_imaging.__file__)
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            handler = pillow[name]
            handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            handler(None)
    except (
        OSError,
        AttributeError,
    ):  # linked in another way: the lines then appear, and nothing else changes
        return


def _open(data: bytes, format_name: str) -> ImageFile.ImageFile:
    """Open with one plugin only. Not through `Image.open`: its pixel limit is global, ours is an argument."""
    Image.preinit()
    if format_name not in Image.OPEN:
        Image.init()
    plugin: Any = Image.OPEN[format_name][0]
    opened: ImageFile.ImageFile = plugin(io.BytesIO(data), "")
    return opened


def _check_webp_size(data: bytes, limits: DecodeLimits) -> None:
    """Check the canvas size in a WebP header (RFC 9649) where there is one; the decoder sees to the rest."""
    chunk = data[12:16]
    if len(data) < 30:
        return
    if chunk == b"VP8X":
        width, height = 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    elif chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif chunk == b"VP8 ":
        width = int.from_bytes(data[26:28], "little") & 0x3FFF
        height = int.from_bytes(data[28:30], "little") & 0x3FFF
    else:
        return
    limits.check(width, height)


def _to_rgb(image: Image.Image) -> Image.Image:
    """An RGB image, alpha composited on white."""
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        background = Image.new("RGB", image.size, _WHITE)
        background.paste(rgba, mask=rgba.getchannel("A"))
        return background
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Grey levels of more than 8 bits, or floats, as 8 bits.

    16-bit integers are scaled by 255 / 65535. Wider ones too, unless they go beyond 65535: then by their largest.
    Floats are taken as 0..1, or as 0..255 if they go beyond 1, or scaled by their largest beyond 255. NaN is black.
    """
    numbers = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    peak = float(numbers.max())
    full = max(peak, 65535.0)
    if values.dtype.kind == "f":
        full = 1.0 if peak <= 1 else max(peak, 255.0)
    return np.rint(np.clip(numbers, 0, full) * (255.0 / full)).astype(np.uint8)
