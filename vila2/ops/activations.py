"""Activations: the gated SiLU of the decoders and the three GELUs of the vision towers and projectors."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from vila2.ops.native import is_native, is_native_training, native
from vila2.ops.triton import is_triton, wants_gradient

GELU_KINDS = ("gelu", "gelu_pytorch_tanh", "quick_gelu")


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` where `gate_up` (..., 2 * inner) holds the gate in its first half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def gelu_reference(x: Tensor, kind: str) -> Tensor:
    """GELU: exact ("gelu"), by tanh ("gelu_pytorch_tanh") or, for CLIP, `x * sigmoid(1.702 x)` ("quick_gelu")."""
    if kind == "gelu":
        return functional.gelu(x)
    if kind == "gelu_pytorch_tanh":
        return functional.gelu(x, approximate="tanh")
    if kind == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    raise ValueError(f"unknown gelu {kind!r}: expected one of {', '.join(GELU_KINDS)}")


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up`: (..., 2 * inner) to (..., inner)."""
    if is_native(gate_up) and gate_up.shape[-1] % 2 == 0:
        gate_up = gate_up.contiguous()
        y = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        native.silu_mul(gate_up, y)
        return y
    if is_native_training(gate_up) and gate_up.shape[-1] % 2 == 0:
        return _SiluMul.apply(gate_up)  # type: ignore[no-untyped-call]
    if is_triton(gate_up):
        from vila2.kernels.silu_mul import silu_mul_autograd, silu_mul_triton

        return (silu_mul_autograd if wants_gradient(gate_up) else silu_mul_triton)(gate_up)
    return silu_mul_reference(gate_up)


def gelu(x: Tensor, kind: str) -> Tensor:
    """GELU of `kind` (one of `GELU_KINDS`), element by element."""
    if kind != "gelu" and kind in GELU_KINDS and is_native(x):
        x = x.contiguous()
        y = torch.empty_like(x)
        native.gelu(x, kind, y)
        return y
    if kind in GELU_KINDS and x.requires_grad and torch.is_grad_enabled() and is_native_training(x):
        return _Gelu.apply(x, kind)  # type: ignore[no-untyped-call]
    if is_triton(x) and not wants_gradient(x):
        from vila2.kernels.gelu import gelu_triton

        return gelu_triton(x, kind)
    return gelu_reference(x, kind)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        y = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        native.silu_mul(gate_up, y)
        ctx.save_for_backward(gate_up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad = torch.empty_like(gate_up)
        native.silu_mul_grad(gate_up, y_grad.contiguous(), grad)
        return grad


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        native.gelu_grad(x, None, kind, y)  # without a gradient: GELU itself, of every kind
        ctx.save_for_backward(x)
        ctx.kind = kind
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        grad = torch.empty_like(x)
        native.gelu_grad(x, y_grad.contiguous(), ctx.kind, grad)
        return grad, None
