"""RMS norm and layer norm over the last axis; statistics in float32 whatever the input type."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from vila2.ops.native import is_native, native


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
    if _is_triton(x, weight):
        from vila2.kernels.rms_norm import rms_norm_triton

        return rms_norm_triton(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add, then normalise: `(normed, summed)`. Consumes `residual`: a fast path keeps `summed` in its storage."""
    if is_native(x, residual, weight) and residual.is_contiguous():
        x = x.contiguous()
        y = torch.empty_like(x)
        native.add_rms_norm(x, residual, weight, eps, y)
        return y, residual
    if _is_triton(x, residual, weight) and residual.is_contiguous():
        from vila2.kernels.rms_norm import add_rms_norm_triton

        return add_rms_norm_triton(x, residual, weight, eps)
    return add_rms_norm_reference(x, residual, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm of the last axis of `x` (..., hidden)."""
    if is_native(x, weight, bias):
        x = x.contiguous()
        y = torch.empty_like(x)
        native.layer_norm(x, weight, bias, eps, y)
        return y
    return layer_norm_reference(x, weight, bias, eps)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _is_triton(*tensors: Tensor) -> bool:
    if not tensors[0].is_cuda or not _has_triton():
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
