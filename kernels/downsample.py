"""The projector's down-sampling with its layer norm: neighbours gathered and normalised in one pass.

Token (r, c) joins the factor x factor features at (r * factor + i, c * factor + j), in row order, zeros beyond the
right and bottom edge; then layer norm over all of them:

    y = (x - mean(x)) * rsqrt(var(x) + eps) * weight + bias

Reference: vila2/ops/downsample.py. Tests: tests/kernels/test_images.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from vila2.kernels.device import warps_for

MAX_JOINED = 65536


@triton.jit
def _downsample_norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    side,
    width,
    cells,
    eps,
    FACTOR: tl.constexpr,
    COLUMN_MAJOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    tile = tl.program_id(1).to(tl.int64)
    joined = FACTOR * FACTOR * width
    row = token % cells if COLUMN_MAJOR else token // cells
    column = token // cells if COLUMN_MAJOR else token % cells
    at = tl.arange(0, BLOCK)
    inside = at < joined
    part = at // width
    y = row * FACTOR + part // FACTOR
    x = column * FACTOR + part % FACTOR
    there = inside & (y < side) & (x < side)
    values = tl.load(x_ptr + (tile * side * side + y * side + x) * width + at % width, mask=there, other=0.0)
    wide = values.to(tl.float32)
    centred = tl.where(inside, wide - tl.sum(wide, axis=0) / joined, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / joined + eps)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    normed = centred * scale * weight + bias
    tl.store(y_ptr + (tile * cells * cells + token) * joined + at, normed.to(values.dtype), mask=inside)


def downsample_norm_triton(
    features: Tensor, side: int, factor: int, column_major: bool, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """(tiles, side * side, width) to (tiles, tokens, factor * factor * width), each token normed."""
    tiles, _, width = features.shape
    joined = factor * factor * width
    if not 1 <= joined <= MAX_JOINED or weight.shape != (joined,) or bias.shape != (joined,):
        raise ValueError(
            f"weight and bias must be ({joined},), 1 to {MAX_JOINED}, got {tuple(weight.shape)}, {tuple(bias.shape)}"
        )
    cells = -(-side // factor)
    y = features.new_empty(tiles, cells * cells, joined)
    if y.numel():
        block = triton.next_power_of_2(joined)
        _downsample_norm_kernel[(cells * cells, tiles)](
            features.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            y,
            side,
            width,
            cells,
            eps,
            FACTOR=factor,
            COLUMN_MAJOR=column_major,
            BLOCK=block,
            num_warps=warps_for(block),
        )
    return y
