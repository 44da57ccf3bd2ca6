"""Activations in 8 bits by token, symmetric: what the matrix units of a GPU multiply (int8, or FP8 e4m3).

The CPU's bytes are another format, with a zero point: vila2/ops/quant.py.
"""

import torch
from torch import Tensor

from vila2.ops.activations import gelu, gelu_reference, silu_mul, silu_mul_reference
from vila2.ops.norms import add_rms_norm, add_rms_norm_reference, layer_norm, layer_norm_reference
from vila2.ops.triton import is_triton

MOST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize_tokens_reference(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x` (..., depth) to `(values, scales)`, x = values * scales: `dtype` (..., depth), float32 (...,).

    The scale is the row's largest magnitude over 127 (int8) or 448 (float8_e4m3fn); zero for a row of zeros.
    """
    most = MOST[dtype]
    wide = x.float()
    scales = wide.abs().amax(-1) / most
    scaled = (wide / torch.where(scales > 0, scales, 1.0)[..., None]).clamp(-most, most)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales


def add_rms_norm_quantize_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`(values, scales, summed)` of `add_rms_norm`."""
    normed, summed = add_rms_norm_reference(x, residual, weight, eps)
    return *quantize_tokens_reference(normed, dtype), summed


def layer_norm_quantize_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`(values, scales)` of `layer_norm`."""
    return quantize_tokens_reference(layer_norm_reference(x, weight, bias, eps), dtype)


def silu_mul_quantize_reference(gate_up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`(values, scales)` of `silu_mul`."""
    return quantize_tokens_reference(silu_mul_reference(gate_up), dtype)


def gelu_quantize_reference(x: Tensor, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`(values, scales)` of `gelu`."""
    return quantize_tokens_reference(gelu_reference(x, kind), dtype)


def quantize_tokens(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same by the fastest path. ValueError unless `dtype` is int8 or float8_e4m3fn."""
    if dtype not in MOST:
        raise ValueError(f"activations can be quantised to int8 or float8_e4m3fn, got {dtype}")
    if is_triton(x):
        from vila2.kernels.quantize import quantize_tokens_triton

        return quantize_tokens_triton(x, dtype)
    return quantize_tokens_reference(x, dtype)


def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Add, normalise, round: `(values, scales, summed)` in one pass over memory on CUDA. Consumes `residual`."""
    if is_triton(x, residual, weight) and x.dtype == residual.dtype:
        from vila2.kernels.quantize_after import add_rms_norm_quantize_triton

        residual = residual.contiguous()
        return *add_rms_norm_quantize_triton(x, residual, weight, eps, dtype), residual
    normed, summed = add_rms_norm(x, residual, weight, eps)
    return *quantize_tokens(normed, dtype), summed


def layer_norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Layer norm and rounding, `(values, scales)`, in one pass over memory on CUDA."""
    if is_triton(x, weight, bias):
        from vila2.kernels.quantize_after import layer_norm_quantize_triton

        return layer_norm_quantize_triton(x, weight, bias, eps, dtype)
    return quantize_tokens(layer_norm(x, weight, bias, eps), dtype)


def silu_mul_quantize(gate_up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`silu(gate) * up` and rounding, `(values, scales)`, in one pass over memory on CUDA."""
    if is_triton(gate_up):
        from vila2.kernels.quantize_after import silu_mul_quantize_triton

        return silu_mul_quantize_triton(gate_up, dtype)
    return quantize_tokens(silu_mul(gate_up), dtype)


def gelu_quantize(x: Tensor, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """GELU of `kind` and rounding, `(values, scales)`, in one pass over memory on CUDA."""
    if is_triton(x):
        from vila2.kernels.quantize_after import gelu_quantize_triton

        return gelu_quantize_triton(x, kind, dtype)
    return quantize_tokens(gelu(x, kind), dtype)
