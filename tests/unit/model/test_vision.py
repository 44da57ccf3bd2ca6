"""Vision towers against transformers, with random weights in float32."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from vila2.model.vision import VisionConfig, VisionTower, hf_shapes, is_unused, strip_hf_prefix
from vila2.model.weight_map import vision_table
from vila2.ops.linear import pack_linears

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
SHAPES = {  # image size, patch, width, inner width, layers, heads
    "even": (32, 8, 32, 64, 4, 4),
    "ragged": (30, 7, 24, 40, 3, 2),  # rows and columns beyond the last whole patch are left out
    "so400m heads": (28, 14, 144, 96, 2, 2),  # 72 values a head, as SigLIP so400m
}


def make_pair(
    kind: str, shape: str, select_layer: int = -2, feature: str = "full"
) -> tuple[nn.Module, VisionTower]:
    size, patch, width, inner, layers, heads = SHAPES[shape]
    torch.manual_seed(7)
    common = {
        "image_size": size,
        "patch_size": patch,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    if kind == "clip":
        theirs: nn.Module = CLIPVisionModel(CLIPVisionConfig(**common))
    else:
        theirs = SiglipVisionModel(SiglipVisionConfig(**common))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():  # far from the tidy initial values
            scale = 0.3 if parameter.dim() > 1 else 0.5
            parameter.copy_(torch.randn_like(parameter) * scale + (1.0 if "norm.weight" in name else 0.0))
    config = VisionConfig(
        kind=kind,
        image_size=size,
        patch_size=patch,
        width=width,
        inner_width=inner,
        num_layers=layers,
        num_heads=heads,
        activation=theirs.config.hidden_act,
        norm_eps=theirs.config.layer_norm_eps,
        select_layer=select_layer,
        select_feature=feature,
    )
    ours = VisionTower(config, MEAN, STD)
    load(ours, theirs)
    return theirs.eval(), ours.eval()


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    return {strip_hf_prefix(name): value for name, value in model.state_dict().items()}


def load(ours: VisionTower, theirs: nn.Module) -> None:
    state, weights = plain_state(theirs), ours.state_dict()
    for own in weights:
        parts = [state[name] for name, (target, _) in vision_table(ours.config).items() if target == own]
        weights[own] = torch.cat(parts).view_as(weights[own])
    ours.load_state_dict(weights)


def make_tiles(count: int, size: int) -> Tensor:
    return torch.randint(
        0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.manual_seed(count)
    )


def hidden_state(model: nn.Module, tiles: Tensor, layer: int) -> Tensor:
    pixels = (tiles.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    with torch.no_grad():
        return model(pixel_values=pixels, output_hidden_states=True).hidden_states[layer]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 3, 7])
def test_matches_transformers(kind: str, shape: str, count: int) -> None:
    theirs, ours = make_pair(kind, shape)
    tiles = make_tiles(count, SHAPES[shape][0])
    with torch.no_grad():
        assert relative_error(ours(tiles), hidden_state(theirs, tiles, -2)) < 1e-4


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@pytest.mark.parametrize("layer", [0, 1, 4, -1, -2, -5])
def test_select_layer_is_an_index_into_hidden_states(kind: str, layer: int) -> None:
    theirs, ours = make_pair(kind, "even", select_layer=layer)
    tiles = make_tiles(2, 32)
    assert len(ours.layers) == layer % 5
    with torch.no_grad():
        assert relative_error(ours(tiles), hidden_state(theirs, tiles, layer)) < 1e-4
        if layer % 5:  # another layer's features are far away: the test above can fail
            assert relative_error(ours(tiles), hidden_state(theirs, tiles, layer % 5 - 1)) > 1e-2


@pytest.mark.parametrize(("feature", "first"), [("patch", 1), ("default", 1), ("cls_patch", 0), ("full", 0)])
@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_select_feature(kind: str, feature: str, first: int) -> None:
    theirs, ours = make_pair(kind, "even", feature=feature)
    tiles = make_tiles(2, 32)
    with torch.no_grad():
        features = ours(tiles)
    assert features.shape[1] == ours.config.num_tokens == 16 + (kind == "clip") - first
    assert relative_error(features, hidden_state(theirs, tiles, -2)[:, first:]) < 1e-4


def test_floating_point_tiles_hold_grey_levels() -> None:
    _, ours = make_pair("siglip", "even")
    tiles = make_tiles(3, 32)
    with torch.no_grad():
        assert relative_error(ours(tiles.float()), ours(tiles)) < 1e-6


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_every_weight_is_read_or_known_to_be_unused(kind: str) -> None:
    theirs, ours = make_pair(kind, "ragged")
    state, expected = plain_state(theirs), hf_shapes(ours.config)
    assert {name: tuple(state[name].shape) for name in expected} == expected
    rest = set(state) - set(expected)
    assert rest
    assert all(is_unused(name, ours.config) for name in rest)
    assert not any(is_unused(name, ours.config) for name in expected)
    for name in ("adapter.weight", "encoder.layers.9.mlp.fc1.bias", "encoder.layers.x.mlp.fc1.bias"):
        assert not is_unused(name, ours.config)  # of another model: a loader refuses it


@pytest.mark.parametrize("prefix", ["", "vision_model.", "vision_tower.vision_model.", "model.vision_tower."])
def test_both_generations_of_names(prefix: str) -> None:
    assert strip_hf_prefix(prefix + "encoder.layers.0.mlp.fc1.bias") == "encoder.layers.0.mlp.fc1.bias"


def test_gradients_reach_every_parameter() -> None:
    _, ours = make_pair("clip", "ragged")
    ours(make_tiles(2, 30)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ours.parameters())


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_features_do_not_depend_on_the_batch(kind: str, dtype: torch.dtype) -> None:
    pytest.importorskip("vila2._C")
    _, ours = make_pair(kind, "ragged")
    pack_linears(ours, dtype)
    tiles = make_tiles(9, 30)
    threads = torch.get_num_threads()
    try:
        with torch.inference_mode():
            torch.set_num_threads(1)
            together = ours(tiles)
            torch.set_num_threads(2)
            for start, end in ((0, 1), (3, 8), (8, 9), (0, 9)):
                assert torch.equal(ours(tiles[start:end]), together[start:end])
    finally:
        torch.set_num_threads(threads)


def test_wrong_arguments_are_named() -> None:
    _, ours = make_pair("siglip", "even")
    with pytest.raises(ValueError, match=r"\(N, 32, 32, 3\)"):
        ours(make_tiles(1, 30))
    for change, message in (
        ({"kind": "dino"}, "dino"),
        ({"activation": "relu"}, "relu"),
        ({"select_feature": "cls"}, "cls"),
        ({"num_heads": 5}, "5 heads"),
        ({"select_layer": 5}, "select_layer 5"),
        ({"select_layer": -6}, "select_layer -6"),
        ({"patch_size": 33}, "patch_size"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(ours.config, **change)
