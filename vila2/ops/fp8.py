"""Matrix products in FP8 (e4m3): weights rounded once by column, activations by token as they come (W8A8).

    y = (x8 @ w8.T) * x_scale * w_scale + bias,      x = x8 * x_scale,   w = w8 * w_scale

Products of e4m3 values are exact in float32; only their sums are rounded. On cards of capability 9.0 and up torch's
own `_scaled_mm` with scales by row multiplies (by CUTLASS, or by cuBLASLt with CUDA 13 on 9.0), where the sizes are
multiples of 16; a Triton kernel does the rest, and cards of 8.9. Older cards have no such units. On the CPU the
reference emulates it.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from vila2.ops.token_quant import quantize_tokens, quantize_tokens_reference
from vila2.ops.triton import is_triton

FP8 = torch.float8_e4m3fn
_ALIGNMENT = 16  # of columns and depth, for _scaled_mm
_ROWWISE_CAPABILITY = (9, 0)
_LEAST_CAPABILITY = (8, 9)


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """`weight[c, k] = values[c, k] * scales[c]`: e4m3 (columns, depth), float32 (columns,); bias bfloat16 or None."""

    values: Tensor
    scales: Tensor
    bias: Tensor | None

    @property
    def columns(self) -> int:
        return self.values.shape[0]

    @property
    def depth(self) -> int:
        return self.values.shape[1]

    def dequantized(self) -> Tensor:
        """The weight in float32."""
        return self.values.float() * self.scales[:, None]

    def to(self, device: torch.device | str) -> "Fp8Weight":
        """The same on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, values=self.values.to(device), scales=self.scales.to(device), bias=bias)


def fp8_lack(device: torch.device | str = "cuda") -> str | None:
    """What a CUDA device lacks to multiply in FP8, in a few words; None if it lacks nothing."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= _LEAST_CAPABILITY:
        return None
    name = torch.cuda.get_device_name(device)
    return f"{name} has capability {capability[0]}.{capability[1]}, FP8 products begin with 8.9 (Ada, Hopper)"


def quantize_fp8_weight(weight: Tensor, bias: Tensor | None = None) -> Fp8Weight:
    """Round `weight` (columns, depth) to e4m3 by column, the largest magnitude of each at 448."""
    values, scales = quantize_tokens_reference(weight.detach(), FP8)
    return Fp8Weight(values, scales, None if bias is None else bias.detach().to(torch.bfloat16))


def fp8_product_reference(values: Tensor, scales: Tensor, weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
    """`values` e4m3 (..., depth) with `scales` (...,) times the weight, plus its bias, rounded to `dtype`."""
    sums = values.float() @ weight.values.float().T
    y = sums * scales[..., None] * weight.scales
    if weight.bias is not None:
        y = y + weight.bias.float()
    return y.to(dtype)


def fp8_linear_reference(x: Tensor, weight: Fp8Weight) -> Tensor:
    """`x @ weight.T + bias`: x (..., depth), its rows rounded to e4m3 first, to (..., columns) in `x.dtype`."""
    return fp8_product_reference(*quantize_tokens_reference(x, FP8), weight, x.dtype)


def fp8_product(values: Tensor, scales: Tensor, weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
    """The same as `fp8_product_reference` by the fastest path."""
    if _is_rowwise(values, weight, dtype):
        return _scaled_mm(values, scales, weight, dtype)
    if is_triton(values, weight.values):
        from vila2.kernels.fp8_linear import fp8_product_triton

        return fp8_product_triton(values, scales, weight.values, weight.scales, weight.bias, dtype)
    return fp8_product_reference(values, scales, weight, dtype)


def fp8_linear(x: Tensor, weight: Fp8Weight) -> Tensor:
    """The same as `fp8_linear_reference` by the fastest path. ValueError if a gradient is wanted."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("quantised weights give no gradient: they are for inference only")
    return fp8_product(*quantize_tokens(x, FP8), weight, x.dtype)


def _is_rowwise(values: Tensor, weight: Fp8Weight, dtype: torch.dtype) -> bool:
    """Whether torch's product takes these: it writes bfloat16 alone."""
    return (
        values.is_cuda
        and dtype == torch.bfloat16
        and weight.columns % _ALIGNMENT == 0
        and weight.depth % _ALIGNMENT == 0
        and values.numel() > 0
        and _capability(values.device) >= _ROWWISE_CAPABILITY
    )


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _scaled_mm(values: Tensor, scales: Tensor, weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
    y = torch._scaled_mm(
        values.reshape(-1, weight.depth),
        weight.values.t(),
        scale_a=scales.reshape(-1, 1),
        scale_b=weight.scales.view(1, -1),
        bias=weight.bias,
        out_dtype=dtype,
    )
    return y.view(*values.shape[:-1], weight.columns)
