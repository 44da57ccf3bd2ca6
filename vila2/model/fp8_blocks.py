"""A model's blocks in FP8: the same modules by the same names, run by products that take rows as the norms and
activations before them have rounded them.
"""

import torch
from torch import Tensor

from vila2.model.decoder import DecoderLayer
from vila2.model.quantized import recast
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


class Fp8DecoderLayer(DecoderLayer):
    """A `DecoderLayer` whose products are in FP8."""

    def norm_qkv(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See `DecoderLayer.norm_qkv`."""
        norm, dtype = self.attn_norm, hidden.dtype
        values, scales, residual = add_rms_norm_quantize(hidden, residual, norm.weight, norm.eps, FP8)
        return _product(values, scales, self.qkv, dtype), residual

    def norm_mlp(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See `DecoderLayer.norm_mlp`."""
        norm, dtype = self.mlp_norm, hidden.dtype
        values, scales, residual = add_rms_norm_quantize(hidden, residual, norm.weight, norm.eps, FP8)
        values, scales = silu_mul_quantize(_product(values, scales, self.gate_up, dtype), FP8)
        return _product(values, scales, self.down, dtype), residual


class Fp8VisionLayer(VisionLayer):
    """A `VisionLayer` whose products are in FP8."""

    def norm_qkv(self, x: Tensor) -> Tensor:
        """See `VisionLayer.norm_qkv`."""
        norm = self.norm1
        values, scales = layer_norm_quantize(x, norm.weight, norm.bias, norm.eps, FP8)
        return _product(values, scales, self.qkv, x.dtype)

    def add_products(self, mixed: Tensor, x: Tensor) -> Tensor:
        """See `VisionLayer.add_products`."""
        norm, x = self.norm2, x + self.out(mixed)
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
                layers[index] = recast(layer, Fp8DecoderLayer)
            elif isinstance(layer, VisionLayer):
                layers[index] = recast(layer, Fp8VisionLayer)
    return model
