"""A turned decoder rounded to int8 for the inputs that it really gets, layer after layer.

Three things are taken from samples that cost nothing when the model runs. Inner channels of a block (the values of a
head, what a gate lets through) are scaled so that large inputs meet small weights no more than small inputs meet large
ones. So is the channel that `Rotation` keeps for the second leader, by the norms' weights. And each weight's rounding
error is mended by the weights after it (see vila2.ops.compensate). A layer is rounded for what the rounded layers
before it give.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from vila2.model.decoder import Decoder, DecoderLayer, DenseAttend, RMSNorm
from vila2.model.quantized import fuse, set_bytes, takes_gates
from vila2.ops.compensate import compensated_weight
from vila2.ops.linear import Linear
from vila2.ops.quant import best_turn, least_scales, turn_rows

_SHRINKS = (1.0, 0.5, 0.25, 0.125, 0.0625)  # of the leader's channel
_ROWS_TRIED = 4096
_MENDED = 0.25  # what compensation leaves of the weights' rounding error, about


def leaders(decoder: Decoder, embeddings: Tensor, lengths: Sequence[int]) -> Tensor:
    """The two directions (2, hidden) that hold most of the normed residual stream: in trained models, half of it.

    `embeddings` (T, hidden) are those of samples that lie one after another, `lengths` theirs.
    """
    size = decoder.config.hidden_size
    moments = torch.zeros(size, size)

    def add(norm: nn.Module, inputs: object, outputs: tuple[Tensor, Tensor]) -> None:
        stream = outputs[1].float()
        moments.add_((unit := functional.normalize(stream)).T @ unit)

    norms = [module for module in decoder.modules() if isinstance(module, RMSNorm)]
    hooks = [norm.register_forward_hook(add) for norm in norms]
    decoder(embeddings, _dense(decoder, lengths))
    for hook in hooks:
        hook.remove()
    return torch.linalg.eigh(moments.double()).eigenvectors.T.flip(0)[:2]


def round_decoder(
    decoder: Decoder, embeddings: Tensor, lengths: Sequence[int], *, narrow: bool, leader: int
) -> None:
    """Round and pack every product of a turned decoder, in place; `leader` is the channel that norms may shrink.

    `embeddings` (T, hidden), turned too, are the inputs of samples one after another, `lengths` theirs.
    """
    attend = _dense(decoder, lengths)
    hidden, residual = embeddings, torch.zeros_like(embeddings)
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        products = (layer.qkv, layer.o, layer.gate_up, layer.down)
        inputs: dict[Linear, Tensor] = {}
        hooks = [product.register_forward_pre_hook(partial(_keep, inputs)) for product in products]
        output, stream = layer(hidden, residual.clone(), attend, index)
        for hook in hooks:
            hook.remove()
        # The next norm divides an error by the size of the stream, which is huge at a few tokens.
        weights = (output + stream).square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
        _round_layer(layer, [inputs[product] for product in products], weights, narrow, leader)
        decoder.layers[index] = fuse(layer)
        hidden, residual = decoder.layers[index](hidden, residual, attend, index)
    normed = decoder.norm(hidden, residual)[0]
    _shrink(decoder.norm, decoder.lm_head, normed, narrow, leader)
    _round(decoder.lm_head, normed, narrow=narrow)


def _round_layer(
    layer: DecoderLayer, inputs: Sequence[Tensor], weights: Tensor, narrow: bool, leader: int
) -> None:
    of_qkv, of_o, of_gate_up, of_down = inputs
    config = layer.config
    group = config.num_heads // config.num_kv_heads
    split = (config.num_kv_heads, group, config.head_dim)
    # Heads of a group share their values, so they share scales.
    size = (weights * of_o).view(-1, *split).square().mean((0, 2)).sqrt()
    sensitivity = layer.o.weight.view(-1, *split).square().sum((0, 2)).sqrt()
    scales = _balance(size, sensitivity)  # (kv heads, dim)
    _scale_rows(layer.qkv, config.q_size + config.kv_size, scales.flatten())
    spread = scales[:, None].expand(split).flatten()
    layer.o.weight.div_(spread)
    of_o.mul_(spread)

    scales = _balance((weights * of_down).square().mean(0).sqrt(), layer.down.weight.square().sum(0).sqrt())
    _scale_rows(layer.gate_up, layer.down.in_features, scales)
    layer.down.weight.div_(scales)
    of_down.mul_(scales)

    _shrink(layer.attn_norm, layer.qkv, of_qkv, narrow, leader)
    _shrink(layer.mlp_norm, layer.gate_up, of_gate_up, narrow, leader)
    _round(layer.qkv, of_qkv, narrow=narrow)
    _round(layer.o, weights * of_o, narrow=narrow)
    _round(layer.gate_up, of_gate_up, narrow=narrow, is_gated=takes_gates(layer))
    # What a gate lets through has outliers too, and no norm before it that a rotation could be folded into.
    _round(layer.down, weights * of_down, narrow=narrow, turn=best_turn(layer.down.in_features))


def _round(product: Linear, inputs: Tensor, *, narrow: bool, is_gated: bool = False, turn: int = 1) -> None:
    turned = turn_rows(inputs, turn)
    weight = compensated_weight(turn_rows(product.weight, turn) / turn, turned.T @ turned, narrow=narrow)
    set_bytes(product, weight, is_gated=is_gated, turn=turn)


def _keep(inputs: dict[Linear, Tensor], product: nn.Module, arguments: tuple[Tensor]) -> None:
    assert isinstance(product, Linear)
    inputs[product] = arguments[0].reshape(-1, product.in_features).clone()


def _balance(size: Tensor, sensitivity: Tensor) -> Tensor:
    """Scales of channels by which the rounding error of inputs, which is alike in all of them, hurts least."""
    scales = (sensitivity.clamp_min(1e-12) / size.clamp_min(1e-12)).sqrt()
    scales = scales / scales.log().mean().exp()
    return scales.clamp(1 / 64, 64)


def _scale_rows(product: Linear, start: int, scales: Tensor) -> None:
    product.weight[start:].mul_(scales[:, None])
    if product.bias is not None:
        product.bias[start:].mul_(scales)


def _shrink(norm: RMSNorm, product: Linear, normed: Tensor, narrow: bool, channel: int) -> None:
    """Let `norm` shrink one channel of what `product` reads, `normed`, if that lowers the error of both roundings."""
    rest = normed.clone()
    rest[:, channel] = 0
    low, high = rest.amin(-1), rest.amax(-1)
    lead = normed[:, channel]
    energy = rest.square().sum(-1).mean()
    weight = product.weight[:: max(product.out_features // _ROWS_TRIED, 1)].clone()
    column = weight[:, channel].clone()
    errors = []
    for shrink in _SHRINKS:
        weight[:, channel] = column / shrink
        spans = (torch.maximum(high, shrink * lead) - torch.minimum(low, shrink * lead)) / 255
        of_inputs = spans.square().mean() * weight.square().sum()
        of_weights = least_scales(weight, narrow=narrow).square().sum() * (
            energy + (shrink * lead).square().mean()
        )
        errors.append(float(of_inputs + _MENDED * of_weights))
    best = _SHRINKS[min(range(len(errors)), key=errors.__getitem__)]
    norm.weight[channel] *= best
    product.weight[:, channel] /= best
    normed[:, channel] *= best


def _dense(decoder: Decoder, lengths: Sequence[int]) -> DenseAttend:
    positions = torch.cat([torch.arange(length) for length in lengths])
    return DenseAttend(positions, lengths, decoder.cos, decoder.sin)
