"""What comes before a product in 8 bits, rounded to 8 bits by token in the same pass over memory.

    rms_norm(x + residual), layer_norm(x), silu(gate) * up, gelu(x)   then as in kernels/quantize.py

A program holds a row: it computes the row, rounds it to the input type as the op alone would, and to 8 bits by the
row's largest magnitude. What was a write and a read of 2 bytes a value between two kernels stays in registers.
References: vila2/ops/token_quant.py. Tests: tests/kernels/test_quantize.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila2.kernels.device import rows_of, warps_for
from vila2.kernels.gelu import KINDS, gelu_of
from vila2.kernels.quantize import MAX_DEPTH, MOST, eight_bits


@triton.jit
def _store_row(y, values_ptr, scales_ptr, row, column, depth, MOST: tl.constexpr, IS_INT: tl.constexpr):
    scaled, scale = eight_bits(y.to(tl.float32), MOST, IS_INT)
    tl.store(scales_ptr + row, scale)
    tl.store(values_ptr + row * depth + column, scaled.to(values_ptr.dtype.element_ty), mask=column < depth)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    values_ptr,
    scales_ptr,
    hidden,
    eps,
    MOST: tl.constexpr,
    IS_INT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    x = tl.load(x_ptr + row * hidden + column, mask=inside, other=0.0)
    residual = tl.load(residual_ptr + row * hidden + column, mask=inside, other=0.0)
    x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    tl.store(residual_ptr + row * hidden + column, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / hidden + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    y = ((wide * scale).to(x.dtype).to(tl.float32) * weight.to(tl.float32)).to(x.dtype)
    _store_row(y, values_ptr, scales_ptr, row, column, hidden, MOST, IS_INT)


@triton.jit
def _layer_norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    values_ptr,
    scales_ptr,
    hidden,
    eps,
    MOST: tl.constexpr,
    IS_INT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    x = tl.load(x_ptr + row * hidden + column, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    centred = tl.where(inside, wide - tl.sum(wide, axis=0) / hidden, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / hidden + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y = (centred * scale * weight + bias).to(x.dtype)
    _store_row(y, values_ptr, scales_ptr, row, column, hidden, MOST, IS_INT)


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr,
    values_ptr,
    scales_ptr,
    inner,
    MOST: tl.constexpr,
    IS_INT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < inner
    gate = tl.load(gate_up_ptr + row * 2 * inner + column, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * inner + inner + column, mask=inside, other=0.0)
    g = gate.to(tl.float32)
    silu = (g * tl.sigmoid(g)).to(gate.dtype).to(tl.float32)
    y = (silu * up.to(tl.float32)).to(gate.dtype)
    _store_row(y, values_ptr, scales_ptr, row, column, inner, MOST, IS_INT)


@triton.jit
def _gelu_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    depth,
    KIND: tl.constexpr,
    MOST: tl.constexpr,
    IS_INT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * depth + column, mask=column < depth, other=0.0)
    y = gelu_of(x.to(tl.float32), KIND).to(x.dtype)
    _store_row(y, values_ptr, scales_ptr, row, column, depth, MOST, IS_INT)


def _room(like: Tensor, depth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, object]]:
    """Values (..., depth) and scales (...,) to be written, and the constants of a launch."""
    if dtype not in MOST:
        raise ValueError(f"activations can be quantised to int8 or float8_e4m3fn, got {dtype}")
    if not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"rows must be 1 to {MAX_DEPTH} wide, got {depth}")
    values = torch.empty(*like.shape[:-1], depth, dtype=dtype, device=like.device)
    scales = torch.empty(like.shape[:-1], dtype=torch.float32, device=like.device)
    block = triton.next_power_of_2(depth)
    constants = {"MOST": MOST[dtype], "IS_INT": dtype == torch.int8, "BLOCK": block}
    return values, scales, {**constants, "num_warps": warps_for(block)}


def add_rms_norm_quantize_triton(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`rms_norm(x + residual)` as `(values, scales)`; the sum is written into `residual`, which must be contiguous."""
    if residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous():
        raise ValueError(
            f"residual must be contiguous and like x {tuple(x.shape)} {x.dtype}, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )
    hidden = x.shape[-1]
    values, scales, constants = _room(x, hidden, dtype)
    if values.numel():
        grid = (rows_of(x, MAX_DEPTH, "x"),)
        _rms_norm_kernel[grid](
            x.contiguous(), residual, weight.contiguous(), values, scales, hidden, eps, **constants
        )
    return values, scales


def layer_norm_quantize_triton(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`layer_norm(x)` over the last axis as `(values, scales)`."""
    hidden = x.shape[-1]
    values, scales, constants = _room(x, hidden, dtype)
    if values.numel():
        grid = (rows_of(x, MAX_DEPTH, "x"),)
        _layer_norm_kernel[grid](
            x.contiguous(), weight.contiguous(), bias.contiguous(), values, scales, hidden, eps, **constants
        )
    return values, scales


def silu_mul_quantize_triton(gate_up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`silu(gate) * up` of (..., 2 * inner) as `(values, scales)`, values (..., inner)."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"the last axis must hold gate and up of one size, got {gate_up.shape[-1]}")
    inner = gate_up.shape[-1] // 2
    values, scales, constants = _room(gate_up, inner, dtype)
    if values.numel():
        _silu_mul_kernel[(values.numel() // inner,)](gate_up.contiguous(), values, scales, inner, **constants)
    return values, scales


def gelu_quantize_triton(x: Tensor, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """GELU of `kind` as `(values, scales)`."""
    if kind not in KINDS:
        raise ValueError(f"unknown gelu {kind!r}: expected one of {', '.join(KINDS)}")
    values, scales, constants = _room(x, x.shape[-1], dtype)
    if values.numel():
        grid = (rows_of(x, MAX_DEPTH, "x"),)
        _gelu_kernel[grid](x.contiguous(), values, scales, x.shape[-1], KIND=kind, **constants)
    return values, scales
