"""RMS norm and layer norm over the last axis; statistics in float32 whatever the input type."""

import torch
from torch import Tensor
from torch.nn import functional


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
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add, then normalise: `(normed, summed)`. Consumes `residual`: a fast path keeps `summed` in its storage."""
    return add_rms_norm_reference(x, residual, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm of the last axis of `x` (..., hidden)."""
    return layer_norm_reference(x, weight, bias, eps)
