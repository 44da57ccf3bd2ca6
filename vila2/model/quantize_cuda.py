"""A loaded float32 model to FP8 or to 4-bit weights, in place: what CUDA runs, and torch emulates on the CPU."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from vila2.model.awq import scale_channels, search_clipping
from vila2.model.decoder import DecoderLayer
from vila2.model.fp8_blocks import with_fp8_blocks
from vila2.model.vlm import VisionLanguageModel
from vila2.ops.fp8 import quantize_fp8_weight
from vila2.ops.int4 import quantize_int4_weight
from vila2.ops.linear import Linear


@torch.no_grad()
def quantize_fp8(model: VisionLanguageModel) -> VisionLanguageModel:
    """Weights of tower, projector and decoder blocks to e4m3 by column, all else to bfloat16; returns `model`.

    The patch embedding and the head keep bfloat16: all rests on the one, and the other decides between tokens whose
    scores lie closer than FP8's steps.
    """
    kept = (model.vision.patch_embedding, model.decoder.lm_head)
    for module in model.modules():
        if isinstance(module, Linear) and module not in kept:
            module.set_packed(quantize_fp8_weight(module.weight, module.bias))
    return with_fp8_blocks(_rest_to_bfloat16(model))


@torch.no_grad()
def quantize_int4(
    model: VisionLanguageModel, inputs: Mapping[str, Tensor] | None = None
) -> VisionLanguageModel:
    """Weights of the decoder blocks to 4 bits by groups of 128, all else to bfloat16; returns `model`.

    `inputs` (see `decoder_products`): rows that each product met, by which channels are scaled and ranges clipped first
    (AWQ). Without them every weight is rounded to the nearest of its group's range. Tower and projector are bound by
    arithmetic, which fewer bits of weights do not lessen: they stay.
    """
    config = model.config.decoder
    if inputs is not None:
        inputs = scale_channels(model.decoder, inputs)
    for name, module in decoder_products(model):
        shrink = None if inputs is None else search_clipping(module.weight, inputs[name])
        if shrink is not None and name.endswith("qkv"):
            shrink[: config.q_size + config.kv_size] = (
                1  # scores are products of two clipped ones: they stay whole
            )
        module.set_packed(quantize_int4_weight(module.weight, module.bias, shrink))
    return _rest_to_bfloat16(model)


def decoder_products(model: VisionLanguageModel) -> Iterator[tuple[str, Linear]]:
    """The products of the decoder's blocks, by names like "3.gate_up"."""
    for index, layer in enumerate(model.decoder.layers):
        assert isinstance(layer, DecoderLayer)
        for name in ("qkv", "o", "gate_up", "down"):
            yield f"{index}.{name}", getattr(layer, name)


def _rest_to_bfloat16(model: VisionLanguageModel) -> VisionLanguageModel:
    model.to(torch.bfloat16)
    return model
