"""A product of few rows with weights in 4 bits, read once and never spread in memory; and the spreading, for many rows.

    y[m, n] = sum over groups g of scale[g, n] * sum over k in g of x[m, k] * (q[n, k] - zero[g, n]) + bias[n]

A group's scale multiplies its sum, not its 128 weights, so only sums are rounded, in float32. In bfloat16 the bits of q
are laid into those of 128, which makes 128 + q without a conversion, and (128 + zero) * sum(x) is taken off the sum of
the group. The weights are the first operand: tiles of them fill the matrix units however few rows there are. A tile of
one group lies in one piece of memory, and its bytes hold q[j] and q[j + 64], so each half meets a plain range of x.
Where tiles are fewer than processors the groups are split among programs, and a second kernel adds the parts in order:
no atomics, so the same sums in every run.
Reference: vila2/ops/int4.py. Tests: tests/kernels/test_low_bits.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila2.kernels.device import num_processors, rows_of

HALF = 64  # bytes of a group of 128
MAX_DEPTH = 1 << 20
_LEAST_GROUPS = 4  # that a program of a split takes
_SUM_BLOCK = 1024


@triton.jit
def _widened(q, zero, dtype: tl.constexpr, IS_BF16: tl.constexpr):
    """Nibbles q (columns, HALF) as 128 + q in bfloat16, or as q - zero in float32."""
    return (q.to(tl.uint16) | 0x4300).to(dtype, bitcast=True) if IS_BF16 else q.to(tl.float32) - zero[:, None]


@triton.jit
def _int4_product_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    y_ptr,
    rows,
    columns,
    depth,
    groups,
    groups_a_split,
    HAS_BIAS: tl.constexpr,
    IS_BF16: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    j = tl.arange(0, HALF)
    is_row, is_column = m < rows, n < columns
    x_at = x_ptr + m.to(tl.int64)[None, :] * depth + j[:, None]
    y = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    first = split * groups_a_split
    for group in range(first, tl.minimum(first + groups_a_split, groups)):
        place = (tl.zeros((), tl.int64) + group) * columns
        packed = tl.load(
            values_ptr + (place + n)[:, None] * HALF + j[None, :], mask=is_column[:, None], other=0
        )
        zero = tl.load(zeros_ptr + place + n, mask=is_column, other=0).to(tl.float32)
        scale = tl.load(scales_ptr + place + n, mask=is_column, other=0.0).to(tl.float32)
        start = group * 2 * HALF
        x_low = tl.load(x_at + start, mask=is_row[None, :] & (j < depth - start)[:, None], other=0.0)
        x_high = tl.load(
            x_at + start + HALF, mask=is_row[None, :] & (j < depth - start - HALF)[:, None], other=0.0
        )
        low = _widened(packed & 15, zero, x_low.dtype, IS_BF16)
        high = _widened(packed >> 4, zero, x_low.dtype, IS_BF16)
        part = tl.dot(low, x_low, input_precision="ieee")
        part = tl.dot(high, x_high, part, input_precision="ieee")
        if IS_BF16:
            sums = tl.sum(x_low.to(tl.float32), axis=0) + tl.sum(x_high.to(tl.float32), axis=0)
            part -= (zero + 128.0)[:, None] * sums[None, :]
        y += part * scale[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=is_column, other=0.0).to(tl.float32)[:, None]
    at = y_ptr + (split * rows + m).to(tl.int64)[None, :] * columns + n[:, None]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=is_row[None, :] & is_column[:, None])


@triton.jit
def _sum_parts_kernel(
    parts_ptr, bias_ptr, y_ptr, size, columns, splits, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(splits):
        total += tl.load(parts_ptr + (tl.zeros((), tl.int64) + split) * size + at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _int4_spread_kernel(
    values_ptr,
    scales_ptr,
    zeros_ptr,
    weight_ptr,
    columns,
    stride,
    depth,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    group = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, HALF)
    is_column = n < columns
    place = group.to(tl.int64) * stride + n
    packed = tl.load(values_ptr + place[:, None] * HALF + j[None, :], mask=is_column[:, None], other=0)
    zero = tl.load(zeros_ptr + place, mask=is_column, other=0).to(tl.float32)
    scale = tl.load(scales_ptr + place, mask=is_column, other=0.0).to(tl.float32)
    low = ((packed & 15).to(tl.float32) - zero[:, None]) * scale[:, None]
    high = ((packed >> 4).to(tl.float32) - zero[:, None]) * scale[:, None]
    start = group * 2 * HALF
    at = weight_ptr + n.to(tl.int64)[:, None] * depth + start + j[None, :]
    dtype = weight_ptr.dtype.element_ty
    tl.store(at, low.to(dtype), mask=is_column[:, None] & (j[None, :] < depth - start))
    tl.store(at + HALF, high.to(dtype), mask=is_column[:, None] & (j[None, :] < depth - start - HALF))


def int4_linear_triton(
    x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None
) -> Tensor:
    """`x @ weight.T + bias`: x (..., depth) to (..., columns); the weight as in `vila2.ops.int4.Int4Weight`."""
    rows, depth = rows_of(x, MAX_DEPTH, "x"), x.shape[-1]
    groups, columns, half = values.shape
    if (
        half != HALF
        or groups != triton.cdiv(depth, 2 * HALF)
        or not scales.shape == zeros.shape == (groups, columns)
    ):
        raise ValueError(
            f"a weight for {depth} values must be ({triton.cdiv(depth, 2 * HALF)}, columns, {HALF}), with scales and "
            f"zeros beside; got {tuple(values.shape)}, {tuple(scales.shape)} and {tuple(zeros.shape)}"
        )
    y = x.new_empty(*x.shape[:-1], columns)
    if not y.numel():
        return y
    block_m = min(64, max(16, triton.next_power_of_2(rows)))
    block_n = 64
    column_tiles, row_tiles = triton.cdiv(columns, block_n), triton.cdiv(rows, block_m)
    wanted = 2 * num_processors(x.device) // (column_tiles * row_tiles)
    a_split = triton.cdiv(groups, max(1, min(wanted, groups // _LEAST_GROUPS)))
    splits = triton.cdiv(groups, a_split)
    target = y if splits == 1 else torch.empty(splits, rows, columns, dtype=torch.float32, device=x.device)
    _int4_product_kernel[(column_tiles, row_tiles, splits)](
        x.contiguous(),
        values,
        scales,
        zeros,
        x if bias is None else bias,
        target,
        rows,
        columns,
        depth,
        groups,
        a_split,
        HAS_BIAS=bias is not None and splits == 1,
        IS_BF16=x.dtype == torch.bfloat16,
        HALF=HALF,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
        num_stages=4,
    )
    if splits > 1:
        size = rows * columns
        _sum_parts_kernel[(triton.cdiv(size, _SUM_BLOCK),)](
            target,
            x if bias is None else bias,
            y,
            size,
            columns,
            splits,
            HAS_BIAS=bias is not None,
            BLOCK=_SUM_BLOCK,
            num_warps=4,
        )
    return y


def int4_spread_triton(
    values: Tensor, scales: Tensor, zeros: Tensor, depth: int, dtype: torch.dtype
) -> Tensor:
    """The weight (columns, depth) in `dtype`. The three may be a slice of the columns of a larger weight."""
    groups, columns, _ = values.shape
    weight = torch.empty(columns, depth, dtype=dtype, device=values.device)
    stride = scales.stride(0)
    if values.stride() != (stride * HALF, HALF, 1) or zeros.stride() != (stride, 1) or scales.stride(1) != 1:
        raise ValueError("values, scales and zeros must be whole, or one slice of columns")
    if weight.numel():
        block = 32
        _int4_spread_kernel[(groups, triton.cdiv(columns, block))](
            values, scales, zeros, weight, columns, stride, depth, HALF=HALF, BLOCK_N=block, num_warps=4
        )
    return weight
