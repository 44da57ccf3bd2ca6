"""RMS norm, with and without a residual added first: one program a row, the row in registers, one pass over memory.

    y = x * rsqrt(mean(x^2) + eps) * weight

Backward, with s = rsqrt(mean(x^2) + eps) and g = dy * weight:

    dx = s * g - x * s^3 * mean(x * g)        dweight = sum over rows of dy * (x * s)

Reference: vila2/ops/norms.py. Without a GPU it runs in Triton's interpreter: tests/kernels/test_norms.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vila2.kernels.device import num_processors, rows_of, warps_for

MAX_HIDDEN = 65536  # a wider row would not fit into the registers of one program


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    sum_ptr,
    scale_ptr,
    hidden,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    KEEPS_SCALE: tl.constexpr,
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
        tl.store(sum_ptr + row * hidden + column, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / hidden + eps)
    if KEEPS_SCALE:
        tl.store(scale_ptr + row, scale)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    y = (wide * scale).to(x.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(y_ptr + row * hidden + column, y.to(x.dtype), mask=inside)


@triton.jit
def _rms_norm_backward_kernel(
    dy_ptr,
    dsum_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    dx_ptr,
    dweight_ptr,
    rows,
    hidden,
    HAS_DSUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = (tl.zeros((), tl.int64) + row) * hidden + column  # int64, whatever the loop counts in
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row)
        wide = x.to(tl.float32)
        dweight += dy * (wide * scale).to(x.dtype).to(tl.float32)
        g = dy * weight
        dx = scale * g - wide * (scale * scale * scale * (tl.sum(wide * g, axis=0) / hidden))
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(x.dtype), mask=inside)
    # Each program has a row of its own for its part, so no atomics: the sum is the same in every run.
    tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * hidden + column, dweight, mask=inside)


def _launch(
    x: Tensor, residual: Tensor | None, total: Tensor | None, weight: Tensor, eps: float, keeps_scale: bool
) -> tuple[Tensor, Tensor]:
    rows, hidden = rows_of(x, MAX_HIDDEN, "x"), x.shape[-1]
    if weight.shape != (hidden,):
        raise ValueError(f"weight must have shape ({hidden},), got {tuple(weight.shape)}")
    x = x.contiguous()
    y = torch.empty_like(x)
    scale = torch.empty(rows if keeps_scale else 0, dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(hidden)
        _rms_norm_kernel[(rows,)](
            x,
            x if residual is None else residual,
            weight.contiguous(),
            y,
            x if total is None else total,
            scale if keeps_scale else x,
            hidden,
            eps,
            HAS_RESIDUAL=residual is not None,
            KEEPS_SCALE=keeps_scale,
            BLOCK=block,
            num_warps=warps_for(block),
        )
    return y, scale


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis of `x` (..., hidden); `weight` is (hidden,)."""
    return _launch(x, None, None, weight, eps, False)[0]


def add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(rms_norm(x + residual), x + residual)`; the sum is written into `residual`, which must be contiguous."""
    if residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous():
        raise ValueError(
            f"residual must be contiguous and like x {tuple(x.shape)} {x.dtype}, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )
    return _launch(x, residual, residual, weight, eps, False)[0], residual


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = (
            x.contiguous() if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        )
        y, scale = _launch(
            x, None if residual is None else residual.contiguous(), total, weight, eps, keeps_scale=True
        )
        ctx.save_for_backward(total, weight, scale)
        ctx.has_residual = residual is not None
        ctx.set_materialize_grads(False)
        if residual is None:
            total = total.new_empty(0)
            ctx.mark_non_differentiable(total)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, dsum: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        total, weight, scale = ctx.saved_tensors
        if dy is None:
            return dsum, dsum if ctx.has_residual else None, None, None
        rows, hidden = len(scale), weight.numel()
        dx = torch.empty_like(total)
        programs = max(1, min(rows, 2 * num_processors(total.device)))
        partial = torch.zeros(programs, hidden, dtype=torch.float32, device=total.device)
        if rows:
            block = triton.next_power_of_2(hidden)
            _rms_norm_backward_kernel[(programs,)](
                dy.contiguous(),
                dy if dsum is None else dsum.contiguous(),
                total,
                weight.contiguous(),
                scale,
                dx,
                partial,
                rows,
                hidden,
                HAS_DSUM=dsum is not None,
                BLOCK=block,
                num_warps=warps_for(block),
            )
        return dx, dx if ctx.has_residual else None, partial.sum(0).to(weight.dtype), None


def rms_norm_autograd(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_triton` that is differentiable once, in x and weight."""
    return _RmsNorm.apply(x, None, weight, eps)[0]  # type: ignore[no-untyped-call]


def add_rms_norm_autograd(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(rms_norm(x + residual), x + residual)`, differentiable once in all three; writes into none of them."""
    y, total = _RmsNorm.apply(x, residual, weight, eps)  # type: ignore[no-untyped-call]
    return y, total
