"""Rounding for samples: what is moved between weights changes nothing, and what is rounded comes nearer."""

import pytest
import torch
from torch import Tensor

from tests.unit.model.test_quantize import VARIANTS, make_model
from vila2.model import rounding
from vila2.model.decoder import DecoderLayer, DenseAttend
from vila2.model.quantize import quantize_model
from vila2.model.rotate import LEADER, Rotation, rotate_decoder
from vila2.model.rounding import leaders, round_decoder
from vila2.model.vlm import VisionLanguageModel

LENGTHS = [40, 25, 35]


def outlying(seed: int = 0, **decoder: object) -> VisionLanguageModel:
    """A model whose residual stream has most of its energy in one direction, as trained ones have."""
    model = make_model(seed, **decoder)
    decoder_ = model.decoder
    with torch.no_grad():
        decoder_.embed_tokens.weight += 4 * torch.linspace(-1, 1, decoder_.config.hidden_size)
    return model


def embeddings_of(model: VisionLanguageModel, seed: int = 5) -> Tensor:
    tokens = torch.randint(0, 60, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))
    return model.decoder.embed(tokens)


def logits_of(model: VisionLanguageModel, embeddings: Tensor) -> Tensor:
    decoder = model.decoder
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    attend = DenseAttend(positions, LENGTHS, decoder.cos, decoder.sin)
    return decoder.logits(decoder(embeddings, attend))


def divergence(expected: Tensor, got: Tensor) -> float:
    before, after = expected.log_softmax(-1), got.log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("size", [3, 12, 48, 96])
def test_leaders_are_turned_out_of_the_way(size):
    found = torch.linalg.qr(torch.randn(size, 2, dtype=torch.float64)).Q.T
    rotation = Rotation(size, leaders=found)
    matrix = rotation.rows(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    first, second = rotation.rows(found)
    expected = torch.full((size,), (size - 1) ** -0.5, dtype=torch.float64)
    expected[LEADER] = 0
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(second[LEADER], torch.tensor(1.0, dtype=torch.float64))


def test_the_leading_direction_is_found():
    model = outlying()
    embeddings = embeddings_of(model)
    found = leaders(model.decoder, embeddings, LENGTHS)
    torch.testing.assert_close(found @ found.T, torch.eye(2, dtype=torch.float64))
    true = torch.nn.functional.normalize(torch.linspace(-1, 1, 48).double(), dim=0)
    assert abs(float(found[0] @ true)) > 0.95


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_moved_between_weights_changes_nothing(variant, monkeypatch):
    model = outlying(**VARIANTS[variant])
    embeddings = embeddings_of(model)
    expected = logits_of(model, embeddings)
    rotation = Rotation(48, leaders=leaders(model.decoder, embeddings, LENGTHS))
    rotate_decoder(model.decoder, model.projector, rotation)
    monkeypatch.setattr(rounding, "_round", lambda *arguments, **options: None)
    turned = rotation.rows(embeddings)
    before = [layer.down.weight.clone() for layer in model.decoder.layers]
    round_decoder(model.decoder, turned, LENGTHS, narrow=True, leader=LEADER)
    torch.testing.assert_close(logits_of(model, turned), expected, rtol=1e-3, atol=1e-3)
    layers = [layer for layer in model.decoder.layers if isinstance(layer, DecoderLayer)]
    assert all(not torch.equal(layer.down.weight, old) for layer, old in zip(layers, before, strict=True))


@pytest.mark.parametrize("narrow", [True, False])
def test_rounded_for_samples_it_is_nearer_than_rounded_to_nearest(narrow):
    model, plain = outlying(), outlying()
    embeddings = embeddings_of(model)
    expected = logits_of(model, embeddings_of(model, seed=6))
    rotation = Rotation(48, leaders=leaders(model.decoder, embeddings, LENGTHS))
    rotate_decoder(model.decoder, model.projector, rotation)
    round_decoder(model.decoder, rotation.rows(embeddings), LENGTHS, narrow=narrow, leader=LEADER)
    fresh = embeddings_of(plain, seed=6)
    ours = divergence(expected, logits_of(model, rotation.rows(fresh)))
    quantize_model(plain, narrow=narrow)
    nearest = divergence(expected, logits_of(plain, embeddings_of(plain, seed=6)))
    assert 0 < ours < 0.7 * nearest


def test_widths_that_fuse_nothing_are_rounded_all_the_same():
    model = outlying(intermediate_size=60)
    embeddings = embeddings_of(model)
    expected = logits_of(model, embeddings)
    rotation = Rotation(48, leaders=leaders(model.decoder, embeddings, LENGTHS))
    rotate_decoder(model.decoder, model.projector, rotation)
    round_decoder(model.decoder, rotation.rows(embeddings), LENGTHS, narrow=True, leader=LEADER)
    assert all(isinstance(layer, DecoderLayer) for layer in model.decoder.layers)
    assert divergence(expected, logits_of(model, rotation.rows(embeddings))) < 2e-3
