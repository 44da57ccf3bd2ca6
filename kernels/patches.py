"""Pixels to patches: uint8 images cut, normalised and reordered in one pass, 1 byte read and 2 written a value.

    out[n, patch, (c, y, x)] = (image[n, row * p + y, column * p + x, c] / 255 - mean[c]) / std[c]

Reference: vila2/ops/patches.py. Tests: tests/kernels/test_images.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _patches_kernel(
    image_ptr,
    out_ptr,
    height,
    width,
    columns,
    per_image,
    mean_r,
    mean_g,
    mean_b,
    std_r,
    std_g,
    std_b,
    PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < per_image
    area: tl.constexpr = PATCH * PATCH
    patch = at // (3 * area)
    channel = (at // area) % 3
    y = (patch // columns) * PATCH + (at // PATCH) % PATCH
    x = (patch % columns) * PATCH + at % PATCH
    level = tl.load(
        image_ptr + image * height * width * 3 + (y * width + x) * 3 + channel, mask=inside, other=0
    )
    mean = tl.where(channel == 0, mean_r, tl.where(channel == 1, mean_g, mean_b))
    std = tl.where(channel == 0, std_r, tl.where(channel == 1, std_g, std_b))
    # Correctly rounded divisions: a bfloat16 then equals the reference's to the last bit.
    value = tl.div_rn(tl.div_rn(level.to(tl.float32), 255.0) - mean, std)
    tl.store(out_ptr + image * per_image + at, value.to(out_ptr.dtype.element_ty), mask=inside)


def image_patches_triton(
    images: Tensor, patch: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """uint8 (N, H, W, 3) to `dtype` (N, (H // patch) * (W // patch), 3 * patch * patch), channel first in a row."""
    count, height, width, _ = images.shape
    rows, columns = height // patch, width // patch
    out = torch.empty(count, rows * columns, 3 * patch * patch, dtype=dtype, device=images.device)
    per_image = rows * columns * 3 * patch * patch
    if out.numel():
        _patches_kernel[(triton.cdiv(per_image, _BLOCK), count)](
            images.contiguous(),
            out,
            height,
            width,
            columns,
            per_image,
            *(float(value) for value in mean),
            *(float(value) for value in std),
            PATCH=patch,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return out
