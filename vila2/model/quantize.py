"""A loaded float32 model to int8, in place."""

from dataclasses import replace

import torch
from torch import nn

from vila2.model.decoder import DecoderLayer
from vila2.model.quantized import ready, set_bytes, takes_gates
from vila2.model.rotate import rotate_decoder
from vila2.model.vlm import VisionLanguageModel
from vila2.ops.linear import Linear
from vila2.ops.quant import best_turn, quantize_weight, turn_rows


@torch.no_grad()
def quantize_model(model: VisionLanguageModel, *, narrow: bool) -> VisionLanguageModel:
    """Turn the residual stream, round every product's weights and pack them; returns `model`.

    The patch embedding keeps its weights (see `ready`): it is a hundredth of the work, and all else rests on it.
    Embeddings become bfloat16.
    """
    rotate_decoder(model.decoder, model.projector)
    model.config = replace(model.config, decoder=model.decoder.config)
    layers = [layer for layer in model.decoder.layers if isinstance(layer, DecoderLayer)]
    gated = {layer.gate_up for layer in layers if takes_gates(layer)}
    # What a gate lets through has outliers too, and no norm before it that a rotation could be folded into.
    turned = {layer.down for layer in layers}
    for module in model.modules():
        if isinstance(module, Linear) and module is not model.vision.patch_embedding:
            turn = best_turn(module.in_features) if module in turned else 1
            weight = quantize_weight(turn_rows(module.weight, turn) / turn, narrow=narrow)
            set_bytes(module, weight, is_gated=module in gated, turn=turn)
    embeddings = model.decoder.embed_tokens
    embeddings.weight = nn.Parameter(embeddings.weight.to(torch.bfloat16), requires_grad=False)
    return ready(model)
