"""RMS norm, with and without a residual added first: one program a row, the row in registers, one pass over memory.

    y = x * rsqrt(mean(x^2) + eps) * weight

Without a GPU it runs under TRITON_INTERPRET=1: tests/kernels/test_rms_norm.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_HIDDEN = 65536  # a wider row would not fit into the registers of one program


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    hidden,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int64: row * hidden passes 2^31 on long batches
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    x = tl.load(x_ptr + row * hidden + column, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * hidden + column, mask=inside, other=0.0)
        # The sum is rounded to the input type before the norm, as the reference does.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(residual_ptr + row * hidden + column, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / hidden + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    y = (wide * scale).to(x.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(y_ptr + row * hidden + column, y.to(x.dtype), mask=inside)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    hidden = x.shape[-1]
    if weight.shape != (hidden,):
        raise ValueError(f"weight must have shape ({hidden},), got {tuple(weight.shape)}")
    if not 1 <= hidden <= MAX_HIDDEN:
        raise ValueError(f"the last axis must be 1 to {MAX_HIDDEN} wide, got {hidden}")
    x = x.contiguous()
    y = torch.empty_like(x)
    rows = x.numel() // hidden
    if rows:
        block = triton.next_power_of_2(hidden)
        _rms_norm_kernel[(rows,)](
            x,
            x if residual is None else residual,
            weight.contiguous(),
            y,
            hidden,
            eps,
            HAS_RESIDUAL=residual is not None,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )
    return y


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis of `x` (..., hidden); `weight` is (hidden,)."""
    return _launch(x, None, weight, eps)


def add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(rms_norm(x + residual), x + residual)`; the sum is written into `residual`, which must be contiguous."""
    if residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous():
        raise ValueError(
            f"residual must be contiguous and like x {tuple(x.shape)} {x.dtype}, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )
    return _launch(x, residual, weight, eps), residual
