"""Resizing RGB images, to the very bytes that Pillow makes."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vila2.ops.native import native

Pixels = NDArray[np.uint8]
Interpolation = Literal["bilinear", "bicubic"]

# A `_C` that was built before this kernel came lacks it.
HAS_RESIZE = hasattr(native, "resize")

_WEIGHT_BITS = 22


def resize_reference(image: Pixels, height: int, width: int, interpolation: Interpolation) -> Pixels:
    """Resize (h, w, 3) to (height, width, 3): two passes of integer weights, as Pillow's ImagingResample.

    Each pass rounds and clips to uint8, so their order matters: as in Pillow 13, vertical first where the height
    loses more than twice the pixels that the width does. A pass that changes nothing is left out.
    """
    first = 0 if _rows_first(image, height, width) else 1
    for axis in (first, 1 - first):
        new = (height, width)[axis]
        if image.shape[axis] != new:
            weights = _weights(image.shape[axis], new, interpolation)
            sums = np.moveaxis(np.tensordot(weights, image.astype(np.int64), (1, axis)), 0, axis)
            image = ((sums + (1 << (_WEIGHT_BITS - 1))) >> _WEIGHT_BITS).clip(0, 255).astype(np.uint8)
    return image


def resize_pixels(image: Pixels, height: int, width: int, interpolation: Interpolation) -> Pixels:
    """Resize (h, w, 3) uint8 to (height, width, 3), byte for byte as `resize_reference`."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"an image must be uint8 (height, width, 3), got {image.dtype} {image.shape}")
    if height < 1 or width < 1 or interpolation not in ("bilinear", "bicubic"):
        raise ValueError(
            f"expected a positive size and bilinear or bicubic, got {height} x {width}, {interpolation}"
        )
    if native is None or not HAS_RESIZE:
        return resize_reference(image, height, width, interpolation)
    out = np.empty((height, width, 3), np.uint8)
    native.resize(np.ascontiguousarray(image), out, interpolation, _rows_first(image, height, width))
    return out


def _rows_first(image: Pixels, height: int, width: int) -> bool:
    old_height, old_width = image.shape[:2]
    return height < old_height and old_height - height > 2 * (old_width - width)


def _weights(old: int, new: int, interpolation: Interpolation) -> NDArray[np.int64]:
    """(new, old): what each old pixel weighs in each new one, times 2^22. An enlargement has no stretch."""
    scale = old / new
    stretch = max(scale, 1.0)
    support = stretch * (1 if interpolation == "bilinear" else 2)
    center = (np.arange(new)[:, None] + 0.5) * scale
    start, end = np.trunc(center - support + 0.5), np.trunc(center + support + 0.5)
    x = np.arange(old)
    distance = np.abs((x - center + 0.5) * (1 / stretch))
    if interpolation == "bilinear":
        weights = np.maximum(1 - distance, 0)
    else:  # Keys' cubic with a = -0.5
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
        weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    weights = np.where((x >= start) & (x < end), weights, 0)
    weights /= weights.sum(1, keepdims=True)
    scaled = weights * (1 << _WEIGHT_BITS)
    return np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int64)
