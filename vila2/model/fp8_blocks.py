"""A model's blocks in FP8: the same modules by the same names, run by products that take rows as the norms and
activations before them have rounded them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from vila2.model.decoder import Attend, DecoderLayer
from vila2.model.vision import VisionLayer
from vila2.model.vlm import VisionLanguageModel
from vila2.ops.fp8 import FP8, Fp8Weight, fp8_product
from vila2.ops.linear import Linear
from vila2.ops.token_quant import (
    add_rms_norm_quantize,
    gelu_quantize,
    layer_norm_quantize,
    silu_mul_quantize,
)


class Fp8DecoderLayer(nn.Module):
    """A `DecoderLayer` whose products are in FP8."""

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        self.attn_norm, self.qkv, self.o = layer.attn_norm, layer.qkv, layer.o
        self.mlp_norm, self.gate_up, self.down = layer.mlp_norm, layer.gate_up, layer.down
        self.config = layer.config

    def forward(
        self, hidden: Tensor, residual: Tensor, attend: Attend, index: int, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `DecoderLayer.forward`."""
        config, norm, dtype = self.config, self.attn_norm, hidden.dtype
        values, scales, residual = add_rms_norm_quantize(hidden, residual, norm.weight, norm.eps, FP8)
        qkv = _product(values, scales, self.qkv, dtype)
        q, k, v = torch.split(qkv, [config.q_size, config.kv_size, config.kv_size], dim=-1)
        mixed = attend(
            index,
            q.view(-1, config.num_heads, config.head_dim),
            k.view(-1, config.num_kv_heads, config.head_dim),
            v.view(-1, config.num_kv_heads, config.head_dim),
        )
        if rows is not None:
            mixed, residual = mixed.index_select(0, rows), residual.index_select(0, rows)
        norm = self.mlp_norm
        values, scales, residual = add_rms_norm_quantize(self.o(mixed), residual, norm.weight, norm.eps, FP8)
        values, scales = silu_mul_quantize(_product(values, scales, self.gate_up, dtype), FP8)
        return _product(values, scales, self.down, dtype), residual


class Fp8VisionLayer(nn.Module):
    """A `VisionLayer` whose products are in FP8."""

    def __init__(self, layer: VisionLayer) -> None:
        super().__init__()
        self.num_heads, self.activation = layer.num_heads, layer.activation
        self.norm1, self.qkv, self.out = layer.norm1, layer.qkv, layer.out
        self.norm2, self.fc1, self.fc2 = layer.norm2, layer.fc1, layer.fc2

    def forward(self, x: Tensor) -> Tensor:
        """See `VisionLayer.forward`."""
        tiles, tokens, width = x.shape
        norm = self.norm1
        values, scales = layer_norm_quantize(x, norm.weight, norm.bias, norm.eps, FP8)
        qkv = _product(values, scales, self.qkv, x.dtype)
        q, k, v = (
            qkv.view(tiles, tokens, 3, self.num_heads, width // self.num_heads)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        attended = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).reshape(tiles, tokens, width))
        norm = self.norm2
        values, scales = layer_norm_quantize(x, norm.weight, norm.bias, norm.eps, FP8)
        values, scales = gelu_quantize(_product(values, scales, self.fc1, x.dtype), self.activation, FP8)
        return x + _product(values, scales, self.fc2, x.dtype)


def _product(values: Tensor, scales: Tensor, layer: Linear, dtype: torch.dtype) -> Tensor:
    assert isinstance(layer.packed, Fp8Weight)
    return fp8_product(values, scales, layer.packed, dtype)


def with_fp8_blocks(model: VisionLanguageModel) -> VisionLanguageModel:
    """Give a model whose products are in FP8 its fused blocks, in place; returns `model`. Others are left alone."""
    for layers in (model.vision.layers, model.decoder.layers):
        for index, layer in enumerate(layers):
            products = [child for child in layer.children() if isinstance(child, Linear)]
            if not all(isinstance(product.packed, Fp8Weight) for product in products):
                continue
            if isinstance(layer, DecoderLayer):
                layers[index] = Fp8DecoderLayer(layer)
            elif isinstance(layer, VisionLayer):
                layers[index] = Fp8VisionLayer(layer)
    return model
