"""A model's blocks in int8: the same modules by the same names, run by products that take the norms before them and
the activations after them along.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

from vila2.model.decoder import DecoderLayer
from vila2.model.vision import VisionLayer
from vila2.model.vlm import VisionLanguageModel
from vila2.ops.linear import Linear, pack
from vila2.ops.native import native
from vila2.ops.quant import (
    PANEL,
    PackedBytes,
    QuantizedWeight,
    add_rms_norm_byte_linear,
    byte_linear,
    layer_norm_byte_linear,
    pack_bytes,
)

Block = TypeVar("Block", bound=nn.Module)


class ByteDecoderLayer(DecoderLayer):
    """A `DecoderLayer` whose products are packed in bytes, `gate_up` gated."""

    def norm_qkv(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See `DecoderLayer.norm_qkv`."""
        norm = self.attn_norm
        return add_rms_norm_byte_linear(hidden, residual, norm.weight, norm.eps, _bytes(self.qkv))

    def norm_mlp(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See `DecoderLayer.norm_mlp`."""
        norm = self.mlp_norm
        gated, residual = add_rms_norm_byte_linear(
            hidden, residual, norm.weight, norm.eps, _bytes(self.gate_up), "silu_mul"
        )
        return self.down(gated), residual


class ByteVisionLayer(VisionLayer):
    """A `VisionLayer` whose products are packed in bytes; its activation is one that they can end in."""

    def norm_qkv(self, x: Tensor) -> Tensor:
        """See `VisionLayer.norm_qkv`."""
        norm = self.norm1
        return layer_norm_byte_linear(x, norm.weight, norm.bias, norm.eps, _bytes(self.qkv))

    def add_products(self, mixed: Tensor, x: Tensor) -> Tensor:
        """See `VisionLayer.add_products`."""
        norm, x = self.norm2, byte_linear(mixed, _bytes(self.out), "add", x)
        inner = layer_norm_byte_linear(x, norm.weight, norm.bias, norm.eps, _bytes(self.fc1), self.activation)
        return byte_linear(inner, _bytes(self.fc2), "add", x)


def _bytes(layer: Linear) -> PackedBytes:
    assert isinstance(layer.packed, PackedBytes)
    return layer.packed


def set_bytes(layer: Linear, weight: QuantizedWeight, *, is_gated: bool = False, turn: int = 1) -> None:
    """Switch a product to quantised weights (see `pack_bytes`)."""
    layer.set_packed(pack_bytes(weight, layer.bias, is_gated=is_gated, turn=turn))


def takes_gates(layer: DecoderLayer) -> bool:
    """Whether `gate_up` can be packed gated: whole panels."""
    return layer.gate_up.out_features % PANEL == 0


def ready(model: VisionLanguageModel) -> VisionLanguageModel:
    """Give a model whose products are packed in bytes its fused blocks, in place; returns `model`.

    The patch embedding is packed as bfloat16 beside its weight, which stays: packed, it would be this machine's alone.
    A model of another precision is left as it is.
    """
    patch = model.vision.patch_embedding
    if native is not None and patch.packed is None and isinstance(model.decoder.lm_head.packed, PackedBytes):
        patch.packed = pack(patch.weight, patch.bias, torch.bfloat16)
    for layers in (model.vision.layers, model.decoder.layers):
        for index, layer in enumerate(layers):
            layers[index] = fuse(layer)
    return model


def recast(layer: nn.Module, kind: type[Block]) -> Block:
    """The modules and settings of `layer` in a block of another kind, which is a subclass of its own."""
    block = kind.__new__(kind)
    block.__dict__.update(layer.__dict__)
    return block


def fuse(layer: nn.Module) -> nn.Module:
    """The block that takes norms and activations along, where all products of `layer` are packed for it."""
    products = [child for child in layer.children() if isinstance(child, Linear)]
    if all(isinstance(product.packed, PackedBytes) for product in products):
        if isinstance(layer, DecoderLayer) and _bytes(layer.gate_up).is_gated:
            return recast(layer, ByteDecoderLayer)
        if isinstance(layer, VisionLayer) and layer.activation != "gelu":
            return recast(layer, ByteVisionLayer)
    return layer
