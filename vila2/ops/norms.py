"""RMS norm and layer norm over the last axis; statistics in float32 whatever the input type."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from vila2.ops.native import is_native, is_native_training, native
from vila2.ops.triton import is_triton, wants_gradient

_HAS_ADD_LAYER_NORM = hasattr(native, "add_layer_norm")  # not in a `_C` built before it was


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x * rsqrt(mean(x^2) + eps) * weight` over the last axis; rounds to `x.dtype` before the weight."""
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return ((x32 * scale).to(x.dtype) * weight).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`summed = x + residual`; returns `(rms_norm(summed), summed)`."""
    summed = x + residual
    return rms_norm_reference(summed, weight, eps), summed


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last axis (biased variance)."""
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last axis of `x` (..., hidden)."""
    if is_native(x, weight):
        x = x.contiguous()
        y = torch.empty_like(x)
        native.rms_norm(x, weight, eps, y)
        return y
    if is_native_training(x, weight):
        return _AddRmsNorm.apply(x, None, weight, eps)[0]  # type: ignore[no-untyped-call]
    if is_triton(x, weight):
        from vila2.kernels.rms_norm import rms_norm_autograd, rms_norm_triton

        return (rms_norm_autograd if wants_gradient(x, weight) else rms_norm_triton)(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add, then normalise: `(normed, summed)`. Consumes `residual`: where no gradient is wanted, a fast path keeps
    `summed` in its storage."""
    if is_native(x, residual, weight) and residual.is_contiguous():
        x = x.contiguous()
        y = torch.empty_like(x)
        native.add_rms_norm(x, residual, weight, eps, y)
        return y, residual
    if torch.is_grad_enabled() and is_native_training(x, residual, weight):
        return _AddRmsNorm.apply(x, residual, weight, eps)  # type: ignore[no-untyped-call]
    if is_triton(x, residual, weight) and x.dtype == residual.dtype:
        from vila2.kernels.rms_norm import add_rms_norm_autograd, add_rms_norm_triton

        if wants_gradient(x, residual, weight):
            return add_rms_norm_autograd(x, residual, weight, eps)
        return add_rms_norm_triton(x, residual.contiguous(), weight, eps)
    return add_rms_norm_reference(x, residual, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm of the last axis of `x` (..., hidden)."""
    if is_native(x, weight, bias):
        x = x.contiguous()
        y = torch.empty_like(x)
        native.layer_norm(x, weight, bias, eps, y)
        return y
    if is_triton(x, weight, bias) and not wants_gradient(x, weight, bias):
        from vila2.kernels.layer_norm import layer_norm_triton

        return layer_norm_triton(x, weight, bias, eps)
    return layer_norm_reference(x, weight, bias, eps)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`summed = x + residual`; returns `(layer_norm(summed), summed)`."""
    summed = x + residual
    return layer_norm_reference(summed, weight, bias, eps), summed


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add, then normalise: `(normed, summed)`, the bits of `x + residual` and of `layer_norm`.

    Consumes `residual`: where no gradient is wanted, a fast path keeps `summed` in its storage.
    """
    if _HAS_ADD_LAYER_NORM and is_native(x, residual, weight, bias) and residual.is_contiguous():
        x = x.contiguous()
        y = torch.empty_like(x)
        native.add_layer_norm(x, residual, weight, bias, eps, y)
        return y, residual
    summed = x + residual
    return layer_norm(summed, weight, bias, eps), summed


class _AddRmsNorm(torch.autograd.Function):
    """`(normed, summed)` in `_C`; without a residual there is no sum."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor | None]:
        x = x.contiguous()
        y, scales = torch.empty_like(x), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
        weight = weight.contiguous()
        summed = x
        if residual is not None:
            residual, summed = residual.contiguous(), torch.empty_like(x)
        native.norm_forward(x, residual, weight, eps, None if residual is None else summed, y, scales)
        ctx.save_for_backward(summed, weight, scales)
        ctx.has_residual = residual is not None
        ctx.set_materialize_grads(False)
        return y, None if residual is None else summed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, y_grad: Tensor | None, summed_grad: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if y_grad is None:  # the norm itself led nowhere
            return summed_grad, summed_grad if ctx.has_residual else None, None, None
        summed, weight, scales = ctx.saved_tensors
        x_grad, weight_grad = torch.empty_like(summed), torch.empty_like(weight)
        if summed_grad is not None:
            summed_grad = summed_grad.contiguous()
        native.norm_grad(y_grad.contiguous(), summed_grad, summed, weight, scales, x_grad, weight_grad)
        return x_grad, x_grad if ctx.has_residual else None, weight_grad, None
