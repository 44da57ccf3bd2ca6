"""Activations in 8 bits by token, symmetric: what the matrix units of a GPU multiply (int8, or FP8 e4m3).

The CPU's bytes are another format, with a zero point: vila2/ops/quant.py.
"""

import torch
from torch import Tensor

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


def quantize_tokens(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same by the fastest path. ValueError unless `dtype` is int8 or float8_e4m3fn."""
    if dtype not in MOST:
        raise ValueError(f"activations can be quantised to int8 or float8_e4m3fn, got {dtype}")
    if is_triton(x):
        from vila2.kernels.quantize import quantize_tokens_triton

        return quantize_tokens_triton(x, dtype)
    return quantize_tokens_reference(x, dtype)
