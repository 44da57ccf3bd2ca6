"""A loaded float32 model to int8, in place."""

from dataclasses import replace

import torch

from vila2.model.decoder import DecoderLayer
from vila2.model.quantized import set_bytes, swap_blocks, takes_gates
from vila2.model.rotate import rotate_decoder
from vila2.model.vlm import VisionLanguageModel
from vila2.ops.linear import Linear, pack_linears
from vila2.ops.quant import quantize_weight


@torch.no_grad()
def quantize_model(model: VisionLanguageModel, *, narrow: bool) -> VisionLanguageModel:
    """Turn the residual stream, round every product's weights and pack them; returns `model`.

    The patch embedding keeps bf16 weights: it is a hundredth of the work, and all that follows rests on it.
    """
    rotate_decoder(model.decoder, model.projector)
    model.config = replace(model.config, decoder=model.decoder.config)
    pack_linears(model.vision.patch_embedding, torch.bfloat16)
    gated = {
        layer.gate_up
        for layer in model.decoder.layers
        if isinstance(layer, DecoderLayer) and takes_gates(layer)
    }
    for module in model.modules():
        if isinstance(module, Linear) and module.packed is None:
            weight = quantize_weight(module.weight, narrow=narrow)
            set_bytes(module, weight, is_gated=module in gated)
    return swap_blocks(model)
