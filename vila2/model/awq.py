"""Which channels of a product deserve fine steps: AWQ's search of scales and ranges (arXiv 2306.00978).

A weight's rounding error reaches the output multiplied by the activation that it meets. So the columns of a weight that
meet large activations are multiplied by s > 1 before they are rounded, and whatever writes those activations is divided
by s: the function stays, the error moves to where it matters less. s = mean(|x|)^alpha, and alpha is the one of a few
whose rounded products come closest on rows that the product really met. Then each group's range is narrowed where
clipping its largest weights costs less than the finer steps give.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vila2.model.decoder import Decoder, DecoderLayer
from vila2.ops.int4 import GROUP, in_groups, quantize_int4_weight

_ALPHAS = tuple(step / 20 for step in range(20))
_SHRINKS = tuple(1 - step / 20 for step in range(1, 10))
_COLUMNS_AT_ONCE = 512
_LEAST = 1e-4


@torch.no_grad()
def scale_channels(decoder: Decoder, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scale the channels of every block, in place; returns the inputs as they are from now on.

    `inputs` holds rows (rows, depth) that each product met, by names like "3.gate_up".
    """
    scaled = dict(inputs)
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        for norm, name in ((layer.attn_norm, "qkv"), (layer.mlp_norm, "gate_up")):
            product, key = getattr(layer, name), f"{index}.{name}"
            scales = _best_scales(product.weight, inputs[key])
            norm.weight.div_(scales)
            product.weight.mul_(scales)
            scaled[key] = inputs[key] / scales
        for name, scales in (("o", _scale_values(layer, inputs[f"{index}.o"])),
                             ("down", _scale_inner(layer, inputs[f"{index}.down"]))):  # fmt: skip
            scaled[f"{index}.{name}"] = inputs[f"{index}.{name}"] / scales
    return scaled


def _scale_values(layer: DecoderLayer, x: Tensor) -> Tensor:
    """Scale the rows of `qkv` that write values, and the columns of `o`; heads that share a value share its scale."""
    config = layer.config
    start, heads, dim = config.q_size + config.kv_size, config.num_kv_heads, config.head_dim
    shared = x.view(len(x), heads, -1, dim)  # (rows, KV heads, heads of each, dim)
    means = shared.abs().mean((0, 2))  # (KV heads, dim)
    per_head = config.num_heads // heads
    spread = means[:, None].expand(-1, per_head, -1).reshape(-1)
    scales = _best_scales(layer.o.weight, x, spread)
    layer.o.weight.mul_(scales)
    of_values = scales.view(heads, per_head, dim)[:, 0].reshape(-1)
    layer.qkv.weight[start:].div_(of_values[:, None])
    if layer.qkv.bias is not None:
        layer.qkv.bias[start:].div_(of_values)
    return scales


def _scale_inner(layer: DecoderLayer, x: Tensor) -> Tensor:
    """Scale the rows of `gate_up` that write what gates let through, and the columns of `down`."""
    scales = _best_scales(layer.down.weight, x)
    layer.down.weight.mul_(scales)
    layer.gate_up.weight[len(scales) :].div_(scales[:, None])
    if layer.gate_up.bias is not None:
        layer.gate_up.bias[len(scales) :].div_(scales)
    return scales


def _best_scales(weight: Tensor, x: Tensor, means: Tensor | None = None) -> Tensor:
    """The scales (depth,) whose rounded weights give `x @ weight.T` best; ones if none is better."""
    means = x.abs().mean(0) if means is None else means
    expected = x @ weight.T
    best, least = torch.ones_like(means), float("inf")
    for alpha in _ALPHAS:
        scales = means.clamp_min(_LEAST).pow(alpha)
        scales = scales / (scales.amax() * scales.amin()).sqrt()
        rounded = quantize_int4_weight(weight * scales).dequantized()
        loss = float((x / scales @ rounded.T - expected).square().mean())
        if loss < least:
            best, least = scales, loss
    return best


@torch.no_grad()
def search_clipping(weight: Tensor, x: Tensor) -> Tensor:
    """How far each group's range is best narrowed, (columns, groups), for `x` (rows, depth) that the product met."""
    parts = in_groups(x).transpose(0, 1)  # (groups, rows, GROUP)
    return torch.cat([_best_shrink(rows, parts) for rows in torch.split(weight.float(), _COLUMNS_AT_ONCE)])


def _best_shrink(weight: Tensor, parts: Tensor) -> Tensor:
    columns, groups = len(weight), len(parts)
    whole = in_groups(weight).transpose(0, 1)  # (groups, columns, GROUP)
    expected = whole @ parts.mT  # (groups, columns, rows)
    best = torch.ones(columns, groups, device=weight.device)
    least: Tensor | None = None
    for shrink in (1.0, *_SHRINKS):
        rounded = quantize_int4_weight(weight, shrink=torch.full_like(best, shrink)).dequantized()
        loss = (in_groups(rounded).transpose(0, 1) @ parts.mT - expected).square().mean(-1).T
        if least is None:
            least = loss
            continue
        best = torch.where(loss < least, shrink, best)
        least = torch.minimum(loss, least)
    assert best.shape == (columns, groups), GROUP
    return best
