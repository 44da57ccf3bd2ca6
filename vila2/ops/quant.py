"""Matrix products in int8: weights quantised once by column, activations by row as they come.

A row of activations becomes bytes, `x = (byte - zero) * scale`; a column of weights becomes int8, `w = value * scale`.
Products of bytes are summed in int32, which is exact, so every path gives the same float32 to the last bit, and a
row of the output depends only on its own row of the input.

Where a CPU has no instruction for such sums (VNNI), the fast way adds two products in 16 bits. That is exact only
for narrow weights: of two neighbours along the depth the positive parts sum to at most 128, and so do the
negative ones. `quantize_weight(narrow=True)` makes them so; what is not narrow takes a slower exact way there.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from vila2.ops.activations import gelu_reference, silu_mul_reference
from vila2.ops.native import native
from vila2.ops.norms import add_rms_norm, layer_norm

if TYPE_CHECKING:
    from vila2._C import ByteWeights

GROUP = 4  # neighbours along the depth that one 32-bit sum takes in
PANEL = 16  # columns of a panel
NARROW_PAIR = 128
MOST = 127
TURN_STRIDE = 16
MOST_TURN = 64

HAS_KERNELS = native is not None and hasattr(native, "ByteWeights")  # not in a `_C` built before these were

FINISHES = ("none", "add", "gelu_pytorch_tanh", "quick_gelu", "silu_mul")

# Rows that span less are taken for zero, rows that span more (or are not finite) become NaN.
_LEAST_RANGE, _MOST_RANGE = 1e-30, 3e38


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """`weight[c, k] = values[c, k] * scales[c]`: values int8 (columns, depth), scales float32 (columns,)."""

    values: Tensor
    scales: Tensor

    def dequantized(self) -> Tensor:
        """The weight in float32."""
        return self.values.float() * self.scales[:, None]


@dataclass(frozen=True, slots=True)
class PackedBytes:
    """Weights as the kernels read them, the same on every instruction set.

    `panels` int8 (panels, groups, PANEL, GROUP); `scales` float32, `sums` int32 (of each column's values) and `bias`
    float32 (or None) are padded to whole panels. `is_gated`: columns are gates and what they multiply, PANEL / 2 of
    each to a panel (see `gated_order`). Rows are turned by `turn` before they are quantised (see `turn_rows`).
    """

    panels: Tensor
    scales: Tensor
    sums: Tensor
    bias: Tensor | None
    columns: int
    depth: int
    is_narrow: bool
    is_gated: bool = False
    turn: int = 1
    native: "ByteWeights | None" = field(default=None, compare=False, repr=False)

    def unpacked(self) -> QuantizedWeight:
        """The weight that was packed, its columns in the order of the panels."""
        values = self.panels.permute(0, 2, 1, 3).reshape(self.panels.shape[0] * PANEL, -1)
        return QuantizedWeight(values[: self.columns, : self.depth], self.scales[: self.columns])


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (rows, depth) float32 to bytes uint8, scales float32 (rows,) and zeros int32 (rows,).

    The range of a row, 0 included, is cut into 255 steps, so 0 is a byte. A row that is not finite gets the scale NaN.
    """
    low = x.amin(-1).clamp_max(0)
    span = x.amax(-1).clamp_min(0) - low
    is_number = x.isfinite().all(-1) & (span < _MOST_RANGE)
    is_used = is_number & (span > _LEAST_RANGE)
    inverse = torch.where(is_used, 255 / span, 0.0)
    zeros = torch.where(is_number, torch.round(-low * inverse), 0.0)
    bytes_ = (
        torch.nan_to_num(torch.round(x * inverse[:, None]) + zeros[:, None]).clamp(0, 255).to(torch.uint8)
    )
    scales = torch.where(is_used, span / 255, 0.0).masked_fill(~is_number, torch.nan)
    return bytes_, scales, zeros.int()


def turn_rows(x: Tensor, turn: int) -> Tensor:
    """Mix elements TURN_STRIDE apart, in blocks of `turn` of them, by the Hadamard matrix of 1 and -1.

    Rows (..., depth) that have their large values in a few channels become rows that have them nowhere. Turned twice,
    a row comes back `turn` times as large. A power of two, up to MOST_TURN, that times TURN_STRIDE divides the depth.
    """
    turned, done = x, 1
    while done < turn:  # the order of the kernel's sums
        pairs = turned.reshape(*x.shape[:-1], -1, 2, done * TURN_STRIDE)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        turned = torch.stack((first + second, first - second), -2).view(x.shape)
        done *= 2
    return turned


def best_turn(depth: int) -> int:
    """The widest turn that rows of `depth` can take."""
    count = depth // TURN_STRIDE
    return 1 if depth % TURN_STRIDE else min(count & -count, MOST_TURN)


def quantize_weight(weight: Tensor, *, narrow: bool) -> QuantizedWeight:
    """Round `weight` (columns, depth) to int8 by column, by the least scale that clips nothing.

    With `narrow` the pairs (0, 1), (2, 3), ... of the depth keep NARROW_PAIR: the scale grows where they would not.
    """
    weight = weight.detach().float()
    scales = least_scales(weight, narrow=narrow)
    values = torch.round(weight / torch.where(scales > 0, scales, 1.0)[:, None]).clamp(-MOST, MOST)
    return QuantizedWeight(values.to(torch.int8), scales)


def least_scales(weight: Tensor, *, narrow: bool) -> Tensor:
    """The least scales (columns,) by which float32 `weight` (columns, depth) is rounded without clipping."""
    scales = weight.abs().amax(1) / MOST
    if narrow:
        pairs = _pairs(weight)
        sums = torch.maximum(pairs.clamp_min(0).sum(-1), -pairs.clamp_max(0).sum(-1)).amax(1)
        # One less: both of a pair may round up by a half.
        scales = torch.maximum(scales, sums / (NARROW_PAIR - 1))
    return scales


def is_narrow(values: Tensor) -> bool:
    """Whether every pair of `values` (columns, depth) int8 keeps NARROW_PAIR."""
    pairs = _pairs(values.int())
    most = max(int(pairs.clamp_min(0).sum(-1).amax()), int(-pairs.clamp_max(0).sum(-1).amin()))
    return most <= NARROW_PAIR


def _pairs(weight: Tensor) -> Tensor:
    """(columns, depth) to (columns, pairs, 2), a zero beside an odd last one."""
    return functional.pad(weight, (0, weight.shape[1] % 2)).view(len(weight), -1, 2)


def gated_order(columns: int) -> Tensor:
    """The order of packed columns for "silu_mul": `columns` rows, first all gates, then all that they multiply."""
    half = PANEL // 2
    if columns % PANEL:
        raise ValueError(f"gated columns come in panels of {PANEL}, got {columns}")
    return torch.arange(columns).view(2, -1, half).transpose(0, 1).flatten()


def pack_bytes(
    weight: QuantizedWeight, bias: Tensor | None = None, *, is_gated: bool = False, turn: int = 1
) -> PackedBytes:
    """Lay out quantised weights, and their bias (columns,), for `byte_linear`.

    With `turn`, `weight` is that of turned rows: `turn_rows(original, turn) / turn`.
    """
    columns, depth = weight.values.shape
    values, scales = weight.values, weight.scales
    if is_gated:
        order = gated_order(columns)
        values, scales = values[order], scales[order]
        bias = None if bias is None else bias[order]
    padding = -columns % PANEL
    values = functional.pad(values, (0, -depth % GROUP, 0, padding))
    panels = values.view(-1, PANEL, values.shape[1] // GROUP, GROUP).permute(0, 2, 1, 3).contiguous()
    return load_packed_bytes(
        panels,
        functional.pad(scales.float(), (0, padding)),
        values.sum(1, dtype=torch.int32),
        None if bias is None else functional.pad(bias.detach().float(), (0, padding)),
        columns,
        depth,
        is_narrow=is_narrow(weight.values),
        is_gated=is_gated,
        turn=turn,
    )


def load_packed_bytes(
    panels: Tensor,
    scales: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    columns: int,
    depth: int,
    *,
    is_narrow: bool,
    is_gated: bool,
    turn: int,
) -> PackedBytes:
    """Weights that are packed already; the tensors are used where they lie (a mapped file, say)."""
    handle = None
    if HAS_KERNELS:
        handle = native.ByteWeights(panels, scales, sums, bias, columns, depth, is_narrow, turn)
    return PackedBytes(panels, scales, sums, bias, columns, depth, is_narrow, is_gated, turn, handle)


def byte_linear_reference(
    x: Tensor, weights: PackedBytes, finish: str = "none", residual: Tensor | None = None
) -> Tensor:
    """`finish(x @ weight.T + bias)` of float32 `x` (..., depth), its rows quantised first.

    "add" adds `residual`; "silu_mul" needs gated weights and gives half the columns.
    """
    turned = turn_rows(x.reshape(-1, weights.depth), weights.turn)
    rows, scales, zeros = quantize_rows_reference(turned)
    weight = weights.unpacked()
    # Whole numbers below 2^53: float64 sums them exactly in any order.
    sums = (rows.double() - zeros.double()[:, None]) @ weight.values.double().T
    y = sums.float() * weight.scales * scales[:, None]
    if weights.bias is not None:
        y = y + weights.bias[: weights.columns]
    if weights.is_gated:
        y = y[:, torch.argsort(gated_order(weights.columns))]
    y = y.view(*x.shape[:-1], weights.columns)
    if finish == "none":
        return y
    if finish == "add":
        assert residual is not None
        return residual + y
    return silu_mul_reference(y) if finish == "silu_mul" else gelu_reference(y, finish)


def byte_linear(
    x: Tensor, weights: PackedBytes, finish: str = "none", residual: Tensor | None = None
) -> Tensor:
    """The same by `_C`: `x` (..., depth) float32 on the CPU."""
    handle = weights.native
    if handle is None or (weights.is_gated and finish != "silu_mul"):  # the kernel leaves columns as packed
        return byte_linear_reference(x, weights, finish, residual)
    x = x.contiguous()
    y = _room(x, weights, finish)
    handle.multiply(x, y, finish, None if residual is None else residual.contiguous())
    return y


def add_rms_norm_byte_linear(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, weights: PackedBytes, finish: str = "none"
) -> tuple[Tensor, Tensor]:
    """`(byte_linear(rms_norm(x + residual)), x + residual)`; consumes `residual`."""
    handle = weights.native
    if handle is None:
        normed, residual = add_rms_norm(x, residual, norm_weight, eps)
        return byte_linear(normed, weights, finish), residual
    x, residual = x.contiguous(), residual.contiguous()
    y = _room(x, weights, finish)
    handle.multiply_rms_norm(x, residual, norm_weight, eps, y, finish)
    return y, residual


def layer_norm_byte_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weights: PackedBytes, finish: str = "none"
) -> Tensor:
    """`byte_linear(layer_norm(x))`."""
    handle = weights.native
    if handle is None:
        return byte_linear(layer_norm(x, norm_weight, norm_bias, eps), weights, finish)
    x = x.contiguous()
    y = _room(x, weights, finish)
    handle.multiply_layer_norm(x, norm_weight, norm_bias, eps, y, finish)
    return y


def _room(x: Tensor, weights: PackedBytes, finish: str) -> Tensor:
    """An empty result for `finish` of `x`; ValueError where there can be none."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("quantised weights give no gradient: they are for inference only")
    if finish == "silu_mul" and not weights.is_gated:
        raise ValueError("silu_mul needs weights that were packed gated")
    return x.new_empty(*x.shape[:-1], weights.columns // 2 if finish == "silu_mul" else weights.columns)
