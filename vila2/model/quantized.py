"""A model's blocks in int8: the same modules by the same names, run by products that take the norms before them and
the activations after them along.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from vila2.model.decoder import Attend, DecoderLayer
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


class ByteDecoderLayer(nn.Module):
    """A `DecoderLayer` whose products are packed in bytes, `gate_up` gated."""

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        self.attn_norm, self.qkv, self.o = layer.attn_norm, layer.qkv, layer.o
        self.mlp_norm, self.gate_up, self.down = layer.mlp_norm, layer.gate_up, layer.down
        self.config = layer.config

    def forward(
        self, hidden: Tensor, residual: Tensor, attend: Attend, index: int, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `DecoderLayer.forward`."""
        config, norm = self.config, self.attn_norm
        qkv, residual = add_rms_norm_byte_linear(hidden, residual, norm.weight, norm.eps, _bytes(self.qkv))
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
        gated, residual = add_rms_norm_byte_linear(
            self.o(mixed), residual, norm.weight, norm.eps, _bytes(self.gate_up), "silu_mul"
        )
        return self.down(gated), residual


class ByteVisionLayer(nn.Module):
    """A `VisionLayer` whose products are packed in bytes; its activation is one that they can end in."""

    def __init__(self, layer: VisionLayer) -> None:
        super().__init__()
        self.num_heads, self.activation = layer.num_heads, layer.activation
        self.norm1, self.qkv, self.out = layer.norm1, layer.qkv, layer.out
        self.norm2, self.fc1, self.fc2 = layer.norm2, layer.fc1, layer.fc2

    def forward(self, x: Tensor) -> Tensor:
        """See `VisionLayer.forward`."""
        tiles, tokens, width = x.shape
        norm = self.norm1
        qkv = layer_norm_byte_linear(x, norm.weight, norm.bias, norm.eps, _bytes(self.qkv))
        q, k, v = (
            qkv.view(tiles, tokens, 3, self.num_heads, width // self.num_heads)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        attended = functional.scaled_dot_product_attention(q, k, v)
        mixed = attended.transpose(1, 2).reshape(tiles, tokens, width)
        x = byte_linear(mixed, _bytes(self.out), "add", x)
        norm = self.norm2
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
            if not all(
                isinstance(child.packed, PackedBytes)
                for child in layer.children()
                if isinstance(child, Linear)
            ):
                continue
            if isinstance(layer, DecoderLayer) and _bytes(layer.gate_up).is_gated:
                layers[index] = ByteDecoderLayer(layer)
            elif isinstance(layer, VisionLayer) and layer.activation != "gelu":
                layers[index] = ByteVisionLayer(layer)
    return model
