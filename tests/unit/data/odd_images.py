"""Small images of every kind that a folder from the web may hold."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def picture(width: int = 40, height: int = 28, seed: int = 0, channels: int = 3) -> NDArray[np.uint8]:
    """A smooth picture with some noise, uint8 (height, width, channels)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    planes = [np.sin(x / (5 + c + seed % 3)) * 60 + np.cos(y / (4 + c)) * 60 + 127 for c in range(channels)]
    noisy = np.stack(planes, axis=-1) + rng.normal(0, 6, (height, width, channels))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def encode(image: Image.Image | NDArray[Any], format_name: str, **options: Any) -> bytes:
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def jpeg(width: int = 40, height: int = 28, seed: int = 0, **options: Any) -> bytes:
    return encode(picture(width, height, seed), "JPEG", **options)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()
