"""SwiGLU's elementwise part, forward and backward, without a copy of either half.

    y = silu(gate) * up,   silu(g) = g * sigmoid(g)
    dgate = dy * up * s * (1 + g * (1 - s)),   dup = dy * silu(g),   s = sigmoid(g)

Reference: vila2/ops/activations.py. Tests: tests/kernels/test_activations.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 1024


@triton.jit
def _silu_mul_kernel(gate_up_ptr, y_ptr, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    gate = tl.load(gate_up_ptr + row * 2 * inner + column, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * inner + inner + column, mask=inside, other=0.0)
    g = gate.to(tl.float32)
    # silu is rounded before the product, as the reference does.
    silu = (g * tl.sigmoid(g)).to(gate.dtype).to(tl.float32)
    tl.store(y_ptr + row * inner + column, (silu * up.to(tl.float32)).to(gate.dtype), mask=inside)


@triton.jit
def _silu_mul_backward_kernel(dy_ptr, gate_up_ptr, dgate_up_ptr, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    at = row * 2 * inner + column
    gate = tl.load(gate_up_ptr + at, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + at + inner, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * inner + column, mask=inside, other=0.0).to(tl.float32)
    g = gate.to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dgate_up_ptr + at, (dy * up * s * (1 + g * (1 - s))).to(gate.dtype), mask=inside)
    tl.store(dgate_up_ptr + at + inner, (dy * g * s).to(gate.dtype), mask=inside)


def _shape(gate_up: Tensor) -> tuple[int, int]:
    if gate_up.shape[-1] % 2 or not gate_up.shape[-1]:
        raise ValueError(f"the last axis must hold gate and up of one size, got {gate_up.shape[-1]}")
    inner = gate_up.shape[-1] // 2
    return gate_up.numel() // (2 * inner), inner


def silu_mul_triton(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up`: (..., 2 * inner), the gate in its first half, to (..., inner)."""
    rows, inner = _shape(gate_up)
    gate_up = gate_up.contiguous()
    y = gate_up.new_empty(*gate_up.shape[:-1], inner)
    if rows:
        _silu_mul_kernel[(rows, triton.cdiv(inner, _BLOCK))](gate_up, y, inner, BLOCK=_BLOCK, num_warps=4)
    return y


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return silu_mul_triton(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        gate_up = ctx.saved_tensors[0].contiguous()
        rows, inner = _shape(gate_up)
        dgate_up = torch.empty_like(gate_up)
        if rows:
            _silu_mul_backward_kernel[(rows, triton.cdiv(inner, _BLOCK))](
                dy.contiguous(), gate_up, dgate_up, inner, BLOCK=_BLOCK, num_warps=4
            )
        return dgate_up


def silu_mul_autograd(gate_up: Tensor) -> Tensor:
    """`silu_mul_triton` that is differentiable once; keeps `gate_up` alone for the backward pass."""
    y: Tensor = _SiluMul.apply(gate_up)  # type: ignore[no-untyped-call]
    return y
