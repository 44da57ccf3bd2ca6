"""Activations to 8 bits by token: int8, or FP8 (e4m3) where the device multiplies it (capability 8.9 and up).

    scale = max(|x|) / most,   value = round(x / scale)        most = 127 (int8), 448 (FP8)

A row of zeros has scale 0 and values 0. Rounding is to the nearest, ties to even. Reference: vila2/ops/token_quant.py.
Tests: tests/kernels/test_quantize.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila2.kernels.device import rows_of, warps_for

MAX_DEPTH = 65536
MOST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@triton.jit
def eight_bits(x, MOST: tl.constexpr, IS_INT: tl.constexpr):
    """A row of float32 values (0 outside it) over its scale, whole ones for integers; and the scale."""
    scale = tl.div_rn(tl.max(tl.abs(x), axis=0), MOST)
    scaled = tl.div_rn(x, tl.where(scale > 0, scale, 1.0))
    scaled = tl.minimum(tl.maximum(scaled, -MOST), MOST)
    if IS_INT:
        # Adding 1.5 * 2^23 leaves no bits below the units: the sum is rounded to even, and the difference whole.
        scaled = (scaled + 12582912.0) - 12582912.0
    return scaled, scale


@triton.jit
def _quantize_kernel(
    x_ptr, values_ptr, scales_ptr, depth, MOST: tl.constexpr, IS_INT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < depth
    x = tl.load(x_ptr + row * depth + column, mask=inside, other=0.0).to(tl.float32)
    scaled, scale = eight_bits(x, MOST, IS_INT)
    tl.store(scales_ptr + row, scale)
    tl.store(values_ptr + row * depth + column, scaled.to(values_ptr.dtype.element_ty), mask=inside)


def quantize_tokens_triton(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x` (..., depth) to `(values, scales)`: `dtype` (..., depth) and float32 (...,), x = values * scales."""
    if dtype not in MOST:
        raise ValueError(f"activations can be quantised to int8 or float8_e4m3fn, got {dtype}")
    rows, depth = rows_of(x, MAX_DEPTH, "x"), x.shape[-1]
    x = x.contiguous()
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(depth)
        _quantize_kernel[(rows,)](
            x,
            values,
            scales,
            depth,
            MOST=MOST[dtype],
            IS_INT=dtype == torch.int8,
            BLOCK=block,
            num_warps=warps_for(block),
        )
    return values, scales
