"""Matrix products with weights in 4 bits, by groups of 128 along the depth; activations keep their type (W4A16).

    weight[c, k] = (q[c, k] - zero[c, k // 128]) * scale[c, k // 128],    q and zero in 0..15

Decoding is bound by the bytes of weights, and 4 bits are a quarter of bfloat16's: few rows are multiplied straight from
4 bits (Triton). For many rows the weight is spread to the type of `x` first and cuBLAS multiplies, which costs the same
few microseconds however many rows share it. (AWQ, arXiv 2306.00978, whose scale search is vila2/model/awq.py.)
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from vila2.ops.triton import is_triton

GROUP = 128
MOST = 15
# Rows that are multiplied from 4 bits. Beyond, spreading the weight once (about 4.5 bytes a weight) should cost less
# than spreading it again in every tile of rows: bench/gpu_kernels.py times both sides of it.
MAX_FUSED_ROWS = 256
# Weights that are spread at once: 64 MiB in bfloat16, within what is kept free on a card beside the cache.
_MOST_SPREAD = 1 << 25


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """`values` uint8 (groups, columns, GROUP / 2): byte j of a group holds q[j] low and q[j + GROUP / 2] high.

    `scales` bfloat16 and `zeros` uint8 are (groups, columns); the last group's q beyond the depth are its zero. `bias`
    is bfloat16 or None.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None
    depth: int

    @property
    def columns(self) -> int:
        return self.values.shape[1]

    def dequantized(self) -> Tensor:
        """The weight (columns, depth) in float32."""
        q = torch.cat((self.values & MOST, self.values >> 4), -1).float()  # (groups, columns, GROUP)
        wide = (q - self.zeros.float()[..., None]) * self.scales.float()[..., None]
        return wide.transpose(0, 1).reshape(self.columns, -1)[:, : self.depth]

    def to(self, device: torch.device | str) -> "Int4Weight":
        """The same on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        moved = {name: getattr(self, name).to(device) for name in ("values", "scales", "zeros")}
        return replace(self, **moved, bias=bias)


def quantize_int4_weight(
    weight: Tensor, bias: Tensor | None = None, shrink: Tensor | None = None
) -> Int4Weight:
    """Round `weight` (columns, depth) to 4 bits by groups along the depth, each over its range with 0 in it.

    `shrink` (columns, groups) in (0, 1] narrows the ranges: what lies beyond is clipped.
    """
    depth = weight.shape[1]
    grouped = in_groups(weight.detach().float())
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    if shrink is not None:
        low, high = low * shrink, high * shrink
    # The scale is rounded as it is stored, before weights are divided by it.
    scales = ((high - low) / MOST).to(torch.bfloat16)
    inverse = torch.where(scales > 0, 1 / scales.float(), 0.0)
    zeros = (-low * inverse).round().clamp(0, MOST)
    q = ((grouped * inverse[..., None]).round() + zeros[..., None]).clamp(0, MOST).to(torch.uint8)
    half = GROUP // 2
    values = (q[..., :half] | (q[..., half:] << 4)).transpose(0, 1).contiguous()
    return Int4Weight(
        values,
        scales.T.contiguous(),
        zeros.to(torch.uint8).T.contiguous(),
        None if bias is None else bias.detach().to(torch.bfloat16),
        depth,
    )


def in_groups(weight: Tensor) -> Tensor:
    """(columns, depth) to (columns, groups, GROUP), zeros beyond the depth."""
    return functional.pad(weight, (0, -weight.shape[1] % GROUP)).view(len(weight), -1, GROUP)


def int4_linear_reference(x: Tensor, weight: Int4Weight) -> Tensor:
    """`x @ weight.T + bias` with float32 sums: x (..., depth) to (..., columns) in `x.dtype`."""
    bias = None if weight.bias is None else weight.bias.float()
    return functional.linear(x.float(), weight.dequantized(), bias).to(x.dtype)


def int4_linear(x: Tensor, weight: Int4Weight) -> Tensor:
    """The same by the fastest path. ValueError if a gradient is wanted."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("quantised weights give no gradient: they are for inference only")
    if not is_triton(x, weight.values):
        return int4_linear_reference(x, weight)
    from vila2.kernels.int4_linear import int4_linear_triton, int4_spread_triton

    if x.numel() <= MAX_FUSED_ROWS * weight.depth:
        return int4_linear_triton(x, weight.values, weight.scales, weight.zeros, weight.bias)
    rows = x.reshape(-1, weight.depth)
    y = rows.new_empty(len(rows), weight.columns)
    step = max(1, _MOST_SPREAD // weight.depth)
    for at in range(0, weight.columns, step):
        part = slice(at, at + step)
        spread = int4_spread_triton(
            weight.values[:, part], weight.scales[:, part], weight.zeros[:, part], weight.depth, x.dtype
        )
        torch.mm(rows, spread.t(), out=y[:, part])
    if weight.bias is not None:
        y += weight.bias
    return y.view(*x.shape[:-1], weight.columns)
