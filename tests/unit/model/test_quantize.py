"""int8 models: the rotation changes nothing, the fused blocks compute what plain ones do, rounding costs little."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from vila2.model.decoder import Decoder, DecoderConfig, DecoderLayer, DenseAttend
from vila2.model.images import PreparedImage
from vila2.model.projector import ProjectorConfig
from vila2.model.quantize import quantize_model
from vila2.model.quantized import ByteDecoderLayer, ByteVisionLayer
from vila2.model.rotate import Rotation, hadamard, rotate_decoder
from vila2.model.vision import VisionConfig
from vila2.model.vlm import ModelConfig, VisionLanguageModel
from vila2.ops.linear import Linear
from vila2.ops.quant import PackedBytes

VISION = VisionConfig("clip", 16, 4, 24, 40, 3, 2, "quick_gelu", 1e-5)
DECODER = DecoderConfig(60, 48, 64, 3, 4, 2, 12, 64)


def make_model(seed: int = 0, activation: str = "quick_gelu", **decoder: object) -> VisionLanguageModel:
    """Random weights of a trained model's sizes; norm weights and biases that are not their defaults."""
    torch.manual_seed(seed)
    config = ModelConfig(
        vision=replace(VISION, activation=activation),
        projector=ProjectorConfig("mlp2x_gelu", 24, 48),
        decoder=replace(DECODER, **decoder),  # type: ignore[arg-type]
        image_mode="resize",
        image_size=16,
    )
    model = VisionLanguageModel.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(torch.rand_like(parameter) + 0.5)
        elif parameter.dim() == 1:
            parameter.copy_(0.1 * torch.randn_like(parameter))
        elif "embed" in name and "patch" not in name:
            parameter.copy_(torch.randn_like(parameter))
    return model


def logits_of(model: VisionLanguageModel, seed: int = 1) -> Tensor:
    """Next-token scores after each of 20 tokens, 16 of them an image's."""
    tiles = np.random.default_rng(seed).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    image = PreparedImage(tiles, "resize", None, num_tokens=16, num_placeholders=1, width=16, height=16)
    decoder = model.decoder
    visual = model.encode_images([image])[0]
    hidden = torch.cat((decoder.embed(torch.tensor([3])), visual, decoder.embed(torch.tensor([7, 9, 58]))))
    attend = DenseAttend(torch.arange(20), [20], decoder.cos, decoder.sin)
    return decoder.logits(decoder(hidden, attend))


VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("size", [1, 2, 12, 48, 96, 576])
def test_a_rotation_is_orthogonal_and_repeatable(size):
    matrix = Rotation(size, seed=3).rows(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(matrix, Rotation(size, seed=3).rows(torch.eye(size, dtype=torch.float64)))
    weight = torch.randn(size, 5, dtype=torch.float64)
    torch.testing.assert_close(Rotation(size, seed=3).columns(weight), matrix.T @ weight)
    torch.testing.assert_close(Rotation(size, seed=3).columns(weight[:, 0]), matrix.T @ weight[:, 0])


def test_a_hadamard_matrix_holds_one_size():
    assert torch.equal(hadamard(16).abs(), torch.full((16, 16), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_turned_decoder_computes_the_same(variant):
    model = make_model(**VARIANTS[variant])
    expected = logits_of(model)
    rotate_decoder(model.decoder, model.projector)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
    assert not model.decoder.config.tie_embeddings
    norms = [layer.attn_norm.weight for layer in model.decoder.layers] + [model.decoder.norm.weight]
    assert all(bool((weight == 1).all()) for weight in norms)


def test_a_rotation_spreads_outliers():
    x = torch.randn(50, 576)
    x[:, 7] *= 100
    spread = Rotation(576).rows(x)
    assert (spread.abs().amax(-1) / spread.std(-1)).median() < 6
    assert (x.abs().amax(-1) / x.std(-1)).median() > 15


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_int8_is_close(variant, narrow):
    model = make_model(**VARIANTS[variant])
    expected = logits_of(model).log_softmax(-1)
    got = logits_of(quantize_model(model, narrow=narrow)).log_softmax(-1)
    divergence = (expected.exp() * (expected - got)).sum(-1)
    assert divergence.mean() < 2e-3
    assert all(isinstance(m.packed, PackedBytes) for m in model.decoder.modules() if isinstance(m, Linear))
    assert not model.config.decoder.tie_embeddings


def test_fused_blocks_compute_what_plain_ones_do():
    """The same bytes, in blocks that take their norms and activations along and in blocks that do not."""
    model = quantize_model(make_model(), narrow=True)
    assert all(isinstance(layer, ByteDecoderLayer) for layer in model.decoder.layers)
    assert all(isinstance(layer, ByteVisionLayer) for layer in model.vision.layers)
    plain = copy.copy(model)
    plain._modules = dict(model._modules)
    plain.decoder = _with_layers(model.decoder, [_unfused(layer) for layer in model.decoder.layers])
    torch.testing.assert_close(logits_of(plain), logits_of(model), rtol=1e-4, atol=1e-4)


def test_towers_of_exact_gelu_and_odd_widths_stay_whole():
    """Where a block cannot be fused, its products are in bytes all the same."""
    model = make_model(activation="gelu", intermediate_size=60)
    expected = logits_of(model).log_softmax(-1)
    quantize_model(model, narrow=True)
    assert not any(isinstance(layer, ByteVisionLayer) for layer in model.vision.layers)
    assert not any(isinstance(layer, ByteDecoderLayer) for layer in model.decoder.layers)
    got = logits_of(model).log_softmax(-1)
    assert (expected.exp() * (expected - got)).sum(-1).mean() < 2e-3


def _unfused(layer: ByteDecoderLayer) -> DecoderLayer:
    plain = DecoderLayer(layer.config)
    for name in ("attn_norm", "qkv", "o", "mlp_norm", "gate_up", "down"):
        setattr(plain, name, getattr(layer, name))
    return plain


def _with_layers(decoder: Decoder, layers: list[DecoderLayer]) -> Decoder:
    plain = copy.copy(decoder)
    plain._modules = dict(decoder._modules)
    plain.layers = torch.nn.ModuleList(layers)
    return plain
