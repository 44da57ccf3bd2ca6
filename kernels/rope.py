"""Rotary positions for training: a rotation, and as its backward pass the rotation back.

    first' = first * cos - second * sin,   second' = second * cos + first * sin        (halves of a head)

Reference: vila2/ops/rope.py. Tests: tests/kernels/test_rope.py. Inference rotates in rope_store.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


@triton.jit
def _rope_kernel(
    x_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    token_stride,
    head_stride,
    heads,
    half,
    IS_INVERSE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    i = tl.arange(0, BLOCK_HALF)
    position = tl.load(positions_ptr + token)
    cos = tl.load(cos_ptr + position * half + i, mask=i < half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * half + i, mask=i < half, other=0.0)[None, :]
    if IS_INVERSE:
        sin = -sin
    inside = (head[:, None] < heads) & (i[None, :] < half)
    at = x_ptr + token * token_stride + head[:, None] * head_stride + i[None, :]
    first = tl.load(at, mask=inside, other=0.0)
    second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    wide = first.to(tl.float32)
    out = y_ptr + (token * heads + head[:, None]) * 2 * half + i[None, :]
    tl.store(out, (wide * cos - second * sin).to(first.dtype), mask=inside)
    tl.store(out + half, (second * cos + wide * sin).to(first.dtype), mask=inside)


def _rotate(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    tokens, heads, dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        block = min(8, triton.next_power_of_2(heads))
        _rope_kernel[(tokens, triton.cdiv(heads, block))](
            x,
            positions.contiguous(),
            cos.contiguous(),
            sin.contiguous(),
            y,
            x.stride(0),
            x.stride(1),
            heads,
            dim // 2,
            IS_INVERSE=inverse,
            BLOCK_HEADS=block,
            BLOCK_HALF=triton.next_power_of_2(dim // 2),
            num_warps=2,
        )
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(positions, cos, sin)
        return _rotate(x, positions, cos, sin, inverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        positions, cos, sin = ctx.saved_tensors
        return _rotate(dy, positions, cos, sin, inverse=True), None, None, None


def apply_rope_triton(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` (T, heads, D) to `positions` (T,) int64 by float32 tables (P, D / 2); differentiable once in x."""
    y: Tensor = _Rope.apply(x, positions, cos, sin)  # type: ignore[no-untyped-call]
    return y
