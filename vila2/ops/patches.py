"""Pixels to patches: what the convolution that opens a vision tower reads, as rows of a matrix product."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from vila2.ops.native import native
from vila2.ops.triton import is_triton


def image_patches_reference(
    images: Tensor, patch: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """Cut and normalise: uint8 (N, H, W, 3) to `dtype` (N, (H // patch) * (W // patch), 3 * patch * patch).

    A value becomes `(x / 255 - mean) / std` of its channel. A row is in (channel, y, x) order, so it multiplies
    a `conv2d` weight flattened to (out, 3 * patch * patch). Rows and columns beyond the last whole patch are
    left out, as the convolution leaves them.
    """
    count, height, width, _ = images.shape
    rows, columns = height // patch, width // patch
    pixels = images[:, : rows * patch, : columns * patch].float() / 255
    pixels = (pixels - torch.tensor(mean, device=images.device)) / torch.tensor(std, device=images.device)
    patches = pixels.reshape(count, rows, patch, columns, patch, 3).permute(0, 1, 3, 5, 2, 4)
    return patches.reshape(count, rows * columns, 3 * patch * patch).to(dtype)


def image_patches(
    images: Tensor, patch: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """Cut `images` (N, H, W, 3) uint8 into normalised patches; shapes as in `image_patches_reference`."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 (N, H, W, 3), got {images.dtype} {tuple(images.shape)}")
    if patch < 1 or len(mean) != 3 or len(std) != 3:
        raise ValueError(f"patch must be positive and mean, std have 3 values, got {patch}, {mean}, {std}")
    if is_triton(images):
        from vila2.kernels.patches import image_patches_triton

        return image_patches_triton(images, patch, mean, std, dtype)
    if native is None or not images.is_cpu or dtype not in (torch.float32, torch.bfloat16):
        return image_patches_reference(images, patch, mean, std, dtype)
    count, height, width, _ = images.shape
    out = torch.empty(count, (height // patch) * (width // patch), 3 * patch * patch, dtype=dtype)
    native.image_patches(images.contiguous(), patch, _tables(tuple(mean), tuple(std), dtype), out)
    return out


@lru_cache(maxsize=8)
def _tables(mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """(3, 256): what each byte of each channel becomes, by the reference's own arithmetic."""
    values = torch.arange(256, dtype=torch.float32).div(255).expand(3, 256)
    return ((values - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]).to(dtype)
