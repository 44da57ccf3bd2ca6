"""Rotary positions as transformers has them ("rotate half": element i pairs with element i + D/2)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vila2.ops.triton import is_triton


def rope_tables(
    head_dim: int, theta: float, max_positions: int, scaling: Mapping[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Tables `(cos, sin)`, each (max_positions, head_dim / 2) float32.

    `scaling` is the `rope_scaling` of a Hugging Face config: None, "default", "linear" or "llama3" (the stretch
    by bands of Llama 3.1). Any other kind raises ValueError: silently ignoring it would give wrong captions.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, got {head_dim}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = _scale_frequencies(1.0 / theta**exponents, scaling or {})
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def _scale_frequencies(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / float(scaling["factor"])
    if kind != "llama3":
        raise ValueError(f"unknown rope scaling {kind!r}: expected default, linear or llama3")
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    trained_length = float(scaling["original_max_position_embeddings"])
    wavelengths = 2 * math.pi / frequencies
    # Long waves are stretched by `factor`, short ones kept, those between blended.
    smooth = (trained_length / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelengths > trained_length / low, frequencies / factor, frequencies)
    between = (wavelengths <= trained_length / low) & (wavelengths >= trained_length / high)
    return torch.where(between, blended, scaled)


def apply_rope_reference(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` (T, heads, D) to `positions` (T,), in float32, rounded once to `x.dtype`. Differentiable."""
    c = cos[positions].unsqueeze(1)  # (T, 1, D / 2)
    s = sin[positions].unsqueeze(1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x.dtype)


def apply_rope(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same by the fastest path. In inference `attention.rope_store` does this and the cache write in one."""
    if is_triton(x, positions):
        from vila2.kernels.rope import apply_rope_triton

        return apply_rope_triton(x, positions, cos, sin)
    return apply_rope_reference(x, positions, cos, sin)
