"""Models in FP8 and in 4 bits: scaling changes nothing but rounding, rounding costs little, AWQ less."""

import pytest
import torch
from torch import Tensor

from tests.unit.model.test_quantize import VARIANTS, logits_of, make_model
from vila2.model.awq import scale_channels, search_clipping
from vila2.model.decoder import DecoderLayer, DenseAttend
from vila2.model.fp8_blocks import Fp8DecoderLayer, Fp8VisionLayer
from vila2.model.quantize import quantize_model
from vila2.model.quantize_cuda import decoder_products, quantize_fp8, quantize_int4
from vila2.model.vision import VisionLayer
from vila2.model.vlm import VisionLanguageModel
from vila2.ops.fp8 import Fp8Weight
from vila2.ops.int4 import Int4Weight, quantize_int4_weight
from vila2.ops.linear import Linear


def met_by(model: VisionLanguageModel, seeds: range = range(1, 4)) -> dict[str, Tensor]:
    """What each product of the decoder met."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for name, product in decoder_products(model):
        parts = found.setdefault(name, [])
        handles.append(
            product.register_forward_pre_hook(lambda _, inputs, parts=parts: parts.append(inputs[0]))
        )
    for seed in seeds:
        logits_of(model, seed)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def divergence(expected: Tensor, got: Tensor) -> float:
    expected, got = expected.log_softmax(-1), got.float().log_softmax(-1)
    return float((expected.exp() * (expected - got)).sum(-1).mean())


def with_outliers(model: VisionLanguageModel) -> VisionLanguageModel:
    """The same model with channels of the residual stream that are far larger than the rest, as trained ones have."""
    for layer in model.decoder.layers:
        layer.attn_norm.weight[3] *= 40
        layer.mlp_norm.weight[11] *= 40
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp8_is_close(variant):
    model = make_model(**VARIANTS[variant])
    expected = logits_of(model)
    quantize_fp8(model)
    assert divergence(expected, logits_of(model)) < 6e-3
    kept = {"vision.patch_embedding", "decoder.lm_head"}
    products = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    assert {name for name, module in products.items() if module.packed is None} == kept
    assert all(isinstance(m.packed, Fp8Weight) for name, m in products.items() if name not in kept)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("variant", VARIANTS)
def test_int4_is_close(variant):
    model = make_model(**VARIANTS[variant])
    expected, inputs = logits_of(model), met_by(model)
    quantize_int4(model, inputs)
    assert divergence(expected, logits_of(model)) < 4e-2
    assert all(isinstance(product.packed, Int4Weight) for _, product in decoder_products(model))
    assert model.decoder.lm_head.packed is None
    assert all(module.packed is None for module in model.vision.modules() if isinstance(module, Linear))


@pytest.mark.parametrize("variant", VARIANTS)
def test_scaled_channels_compute_the_same(variant):
    model = with_outliers(make_model(**VARIANTS[variant]))
    expected, inputs = logits_of(model), met_by(model)
    layer = model.decoder.layers[0]
    assert isinstance(layer, DecoderLayer)
    before = float(layer.attn_norm.weight[3])
    scaled = scale_channels(model.decoder, inputs)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
    again = met_by(model)
    for name, x in scaled.items():
        torch.testing.assert_close(x, again[name], rtol=1e-3, atol=1e-4)
    assert layer.attn_norm.weight[3] < 0.7 * before  # what is written shrinks where it was large


def test_scaling_and_clipping_cost_less_than_rounding_to_the_nearest():
    model = with_outliers(make_model())
    expected, inputs = logits_of(model, seed=9), met_by(model)
    tuned = divergence(expected, logits_of(quantize_int4(model, inputs), seed=9))
    plain = divergence(expected, logits_of(quantize_int4(with_outliers(make_model())), seed=9))
    assert tuned < 0.7 * plain, (tuned, plain)


def test_clipping_never_costs_on_the_rows_it_was_chosen_by():
    torch.manual_seed(1)
    weight, x = torch.randn(20, 300), torch.randn(64, 300)
    weight[torch.rand_like(weight) < 0.01] *= 6
    shrink = search_clipping(weight, x)
    assert shrink.shape == (20, 3)
    assert 0.5 < float(shrink.min()) < 1
    assert float(shrink.max()) <= 1

    def loss(shrink: Tensor | None) -> float:
        rounded = quantize_int4_weight(weight, shrink=shrink).dequantized()
        return float((x @ (rounded - weight).T).square().mean())

    assert loss(shrink) < loss(None)


def test_fused_blocks_compute_what_plain_ones_do():
    """The same FP8 products, in blocks that round in norms and activations and in blocks that do not: bit for bit."""
    model = quantize_fp8(make_model(**VARIANTS["biases"]))
    fused = logits_of(model)
    assert all(isinstance(layer, Fp8DecoderLayer) for layer in model.decoder.layers)
    assert all(isinstance(layer, Fp8VisionLayer) for layer in model.vision.layers)
    for layers, plain in ((model.decoder.layers, DecoderLayer), (model.vision.layers, VisionLayer)):
        config = model.config.decoder if plain is DecoderLayer else model.config.vision
        for index, layer in enumerate(layers):
            layers[index] = plain(config)
            layers[index]._modules = dict(layer._modules)
    assert torch.equal(logits_of(model), fused)


@pytest.mark.parametrize("quantize", [quantize_fp8, lambda model: quantize_model(model, narrow=True)])
def test_fused_blocks_give_the_rows_that_are_asked_for(quantize):
    decoder = quantize(make_model()).decoder
    hidden = decoder.embed(torch.tensor([3, 9, 58, 2]))
    attend = DenseAttend(torch.arange(4), [4], decoder.cos, decoder.sin)
    rows = torch.tensor([3, 1])
    torch.testing.assert_close(
        decoder(hidden, attend, rows), decoder(hidden, attend)[rows], rtol=1e-2, atol=1e-2
    )
