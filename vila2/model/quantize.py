"""A loaded float32 model to int8, in place."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from vila2.model.decoder import DecoderLayer
from vila2.model.quantized import ready, set_bytes, takes_gates
from vila2.model.rotate import LEADER, Rotation, rotate_decoder
from vila2.model.rounding import leaders, round_decoder
from vila2.model.sample import Sample, embed_sample
from vila2.model.vlm import VisionLanguageModel
from vila2.ops.linear import Linear
from vila2.ops.quant import best_turn, quantize_weight, turn_rows


@torch.no_grad()
def quantize_model(
    model: VisionLanguageModel, *, narrow: bool, samples: Sequence[Sample] = ()
) -> VisionLanguageModel:
    """Turn the residual stream, round every product's weights and pack them; returns `model`.

    With `samples` the decoder is rounded for them (see vila2.model.rounding). The patch embedding keeps its weights
    (see `ready`): it is a hundredth of the work, and all else rests on it. Embeddings become bfloat16.
    """
    decoder, size = model.decoder, model.decoder.config.hidden_size
    if samples:
        embeddings = torch.cat([embed_sample(model, sample) for sample in samples])
        lengths = [len(sample) for sample in samples]
        rotation = Rotation(size, leaders=leaders(decoder, embeddings, lengths))
        rotate_decoder(decoder, model.projector, rotation)
        round_decoder(decoder, rotation.rows(embeddings), lengths, narrow=narrow, leader=LEADER)
    else:
        rotate_decoder(decoder, model.projector)
    model.config = replace(model.config, decoder=decoder.config)
    layers = [layer for layer in decoder.layers if isinstance(layer, DecoderLayer)]
    gated = {layer.gate_up for layer in layers if takes_gates(layer)}
    turned = {layer.down for layer in layers}  # see vila2.model.rounding
    for module in model.modules():
        if (
            not isinstance(module, Linear)
            or module is model.vision.patch_embedding
            or module.packed is not None
        ):
            continue
        turn = best_turn(module.in_features) if module in turned else 1
        weight = quantize_weight(turn_rows(module.weight, turn) / turn, narrow=narrow)
        set_bytes(module, weight, is_gated=module in gated, turn=turn)
    decoder.embed_tokens.weight = nn.Parameter(
        decoder.embed_tokens.weight.to(torch.bfloat16), requires_grad=False
    )
    return ready(model)
