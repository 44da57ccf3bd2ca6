"""A product in FP8 (e4m3), scaled by row and by column: what torch's `_scaled_mm` does not take.

    y[m, n] = (sum over k of x[m, k] * w[n, k]) * x_scale[m] * w_scale[n] + bias[n]

Sums are float32; on capability 9.0 the matrix units keep about 14 bits while they add, so at most 128 products are
added before a sum is carried over. Reference: vila2/ops/fp8.py. Tests: tests/kernels/test_low_bits.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila2.kernels.device import rows_of

MAX_DEPTH = 1 << 20
_BLOCK_K = 128
_TILES_TOGETHER = (
    8  # rows of tiles that are computed column by column, so that their operands stay in the L2 cache
)


@triton.jit
def _fp8_product_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    rows,
    columns,
    depth,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    band = tl.program_id(0) // (TOGETHER * column_tiles)
    first = band * TOGETHER
    height = tl.minimum(row_tiles - first, TOGETHER)
    within = tl.program_id(0) % (TOGETHER * column_tiles)
    m = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + m.to(tl.int64)[:, None] * depth + k[None, :]
    w_at = w_ptr + n.to(tl.int64)[:, None] * depth + k[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        left = k[None, :] < depth - start
        x = tl.load(x_at + start, mask=(m < rows)[:, None] & left, other=0.0)
        w = tl.load(w_at + start, mask=(n < columns)[:, None] & left, other=0.0)
        sums = tl.dot(x, tl.trans(w), sums, max_num_imprecise_acc=128)
    x_scale = tl.load(x_scale_ptr + m, mask=m < rows, other=0.0)
    w_scale = tl.load(w_scale_ptr + n, mask=n < columns, other=0.0)
    y = sums * x_scale[:, None] * w_scale[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    at = y_ptr + m.to(tl.int64)[:, None] * columns + n[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)


def fp8_product_triton(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`values` e4m3 (..., depth), `scales` (...,), `weight` e4m3 (columns, depth), to (..., columns) in `dtype`."""
    rows, columns, depth = rows_of(values, MAX_DEPTH, "values"), *weight.shape
    if values.shape[-1] != depth or values.dtype != torch.float8_e4m3fn or weight.dtype != values.dtype:
        raise ValueError(
            f"values and weight must be float8_e4m3fn of one depth, got {tuple(values.shape)} {values.dtype} and "
            f"{tuple(weight.shape)} {weight.dtype}"
        )
    y = torch.empty(*values.shape[:-1], columns, dtype=dtype, device=values.device)
    if y.numel():
        block_m = min(128, max(16, triton.next_power_of_2(rows)))
        block_n = 128 if block_m > 16 else 64
        grid = (triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n),)
        _fp8_product_kernel[grid](
            values.contiguous(),
            scales.contiguous(),
            weight,
            weight_scales,
            values if bias is None else bias,
            y,
            rows,
            columns,
            depth,
            HAS_BIAS=bias is not None,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=_BLOCK_K,
            TOGETHER=_TILES_TOGETHER,
            num_warps=8 if block_m == 128 else 4,
            num_stages=3,
        )
    return y
