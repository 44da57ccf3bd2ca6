"""The joined model: every image mode against one image at a time, written out with transformers' tower and loops."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import SiglipVisionConfig, SiglipVisionModel

from vila2.model.decoder import DecoderConfig
from vila2.model.images import MODES, PreparedImage
from vila2.model.projector import ProjectorConfig
from vila2.model.vision import VisionConfig
from vila2.model.vlm import ModelConfig, VisionLanguageModel
from vila2.model.weight_map import vision_table
from vila2.ops.linear import pack_linears

SIZE, PATCH, WIDTH, HIDDEN = 16, 4, 12, 20  # a tile has 4 x 4 features
MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.3, 0.25)
SHAPES = [(20, 20), (33, 70), (90, 31), (5, 64), (48, 48)]


def make_config(mode: str, **changes: object) -> ModelConfig:
    scales = changes.pop("s2_scales", {"s2": (16, 32), "dynamic_s2": (16, 32, 48)}.get(mode, ()))
    projector = str(changes.pop("projector", "mlp_downsample"))
    assert isinstance(scales, tuple)
    vision = VisionConfig("siglip", SIZE, PATCH, WIDTH, 24, 2, 2, "gelu_pytorch_tanh", 1e-6, -2, "cls_patch")
    decoder = DecoderConfig(32, HIDDEN, 16, 1, 2, 1, 10, 64)
    config = ModelConfig(
        vision=vision,
        projector=ProjectorConfig(projector, WIDTH * max(len(scales), 1), HIDDEN),
        decoder=decoder,
        image_mode=mode,
        image_size=SIZE,
        image_mean=MEAN,
        image_std=STD,
        shortest_edge=SIZE if mode == "center_crop" else None,
        s2_scales=scales,
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def make_pair(config: ModelConfig) -> tuple[SiglipVisionModel, VisionLanguageModel]:
    torch.manual_seed(11)
    theirs = SiglipVisionModel(
        SiglipVisionConfig(
            image_size=SIZE,
            patch_size=PATCH,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    ).eval()
    ours = VisionLanguageModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in (*theirs.parameters(), *ours.projector.parameters()):
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    state = {name.removeprefix("vision_model."): value for name, value in theirs.state_dict().items()}
    weights = ours.vision.state_dict()
    for own in weights:
        parts = [state[name] for name, (target, _) in vision_table(config.vision).items() if target == own]
        weights[own] = torch.cat(parts).view_as(weights[own])
    ours.vision.load_state_dict(weights)
    return theirs, ours


def prepare(config: ModelConfig, num_images: int = 1) -> list[PreparedImage]:
    rng = np.random.default_rng(5)
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in SHAPES]
    processor = config.image_processor()
    return [processor.prepare(image, num_images) for image in images]


def normalised(tiles: NDArray[np.uint8]) -> Tensor:
    pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def grid_features(tower: SiglipVisionModel, pixels: Tensor) -> Tensor:
    """One tile (3, size, size) to its features (width, 4, 4)."""
    with torch.no_grad():
        features = tower(pixel_values=pixels[None], output_hidden_states=True).hidden_states[-2][0]
    return features.T.reshape(WIDTH, SIZE // PATCH, SIZE // PATCH)


def mosaic(parts: list[Tensor], columns: int) -> Tensor:
    """Feature maps (channels, h, w), row by row, as one map."""
    rows = [torch.cat(parts[i : i + columns], dim=2) for i in range(0, len(parts), columns)]
    return torch.cat(rows, dim=1)


def area(features: Tensor, height: int, width: int) -> Tensor:
    return functional.adaptive_avg_pool2d(features[None], (height, width))[0]


def project(model: VisionLanguageModel, features: Tensor) -> Tensor:
    """One map (channels, h, w) to tokens (n, hidden)."""
    with torch.no_grad():
        return model.projector(features.flatten(1).T[None])[0]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert float((one - other).norm() / other.norm()) < 1e-4


def encode(model: VisionLanguageModel, images: list[PreparedImage]) -> list[Tensor]:
    with torch.no_grad():
        return model.encode_images(images)


@pytest.mark.parametrize("mode", ["resize", "pad", "center_crop", "dynamic"])
@pytest.mark.parametrize("projector", ["mlp_downsample", "mlp2x_gelu", "mlp_downsample_3x3_fix"])
def test_plain_and_dynamic_modes(mode: str, projector: str) -> None:
    config = make_config(mode, projector=projector)
    tower, model = make_pair(config)
    images = prepare(config)
    expected = [
        torch.cat([project(model, grid_features(tower, pixels)) for pixels in normalised(image.tiles)])
        for image in images
    ]
    encoded = encode(model, images)
    assert_same(encoded, expected)
    for image, tokens in zip(images, encoded, strict=True):
        assert len(tokens) == image.num_tokens
        assert len(tokens) % image.num_placeholders == 0  # chunks of equal length
    if mode == "dynamic":
        assert {image.num_placeholders for image in images} - {1}, "some image has several tiles"


@pytest.mark.parametrize(
    ("scales", "index"), [((16, 32), 0), ((16, 32), 1), ((16, 40), 0), ((16, 40), -1), ((8, 16, 24), 1)]
)
def test_s2(scales: tuple[int, ...], index: int) -> None:
    """Scales that are no multiple of the tile are enlarged to one, and their features shrunk in proportion."""
    config = make_config("s2", s2_scales=scales, s2_resize_output_to_scale_idx=index)
    tower, model = make_pair(config)
    images = prepare(config)
    expected = []
    for image in images:
        whole = normalised(image.tiles)
        assert whole.shape[-1] == scales[-1]
        maps = []
        for scale in scales:
            count = -(-scale // SIZE)
            pixels = functional.interpolate(whole, size=(scale, scale), mode="bicubic")
            pixels = functional.interpolate(pixels, size=(count * SIZE, count * SIZE), mode="bicubic")[0]
            tiles = [
                pixels[:, row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE]
                for row in range(count)
                for column in range(count)
            ]
            joined = mosaic([grid_features(tower, tile) for tile in tiles], count)
            side = math.ceil(joined.shape[1] * scale / (count * SIZE))
            maps.append(area(joined, side, side))
        chosen = maps[index].shape[1:]
        expected.append(project(model, torch.cat([area(one, *chosen) for one in maps])))
    assert_same(encode(model, images), expected)
    assert all(image.num_tokens == config.tokens_per_tile for image in images)


@pytest.mark.parametrize("index", [-1, 0, 1, 2])
def test_dynamic_s2(index: int) -> None:
    config = make_config("dynamic_s2", s2_resize_output_to_scale_idx=index)
    tower, model = make_pair(config)
    images = prepare(config)
    side = SIZE // PATCH
    expected = []
    for image in images:
        assert image.grid is not None
        features = [grid_features(tower, pixels) for pixels in normalised(image.tiles)]
        assert len(features) == 1 + 4 + math.prod(image.grid)
        maps = [features[0], mosaic(features[1:5], 2), mosaic(features[5:], image.grid[1])]
        height, width = maps[index].shape[1:]
        joined = torch.cat([area(one, height, width) for one in maps])
        rows, columns = height // side, width // side
        projected = []
        for row in range(rows):
            for column in range(columns):
                tile = joined[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
                projected.append(project(model, tile).T.reshape(HIDDEN, side // 2, side // 2))
        expected.append(mosaic(projected, columns).flatten(1).T)
    assert {image.grid for image in images} - {(3, 3)}, "some grid is not square"
    assert_same(encode(model, images), expected)


def test_dynamic_s2_of_several_images() -> None:
    """Without a grid one tile stands for every scale."""
    config = make_config("dynamic_s2", s2_resize_output_to_scale_idx=-1)
    tower, model = make_pair(config)
    images = prepare(config, num_images=2)
    expected = [
        project(model, grid_features(tower, normalised(image.tiles)[0]).repeat(3, 1, 1)) for image in images
    ]
    assert_same(encode(model, images), expected)


@pytest.mark.parametrize("mode", MODES)
def test_an_image_does_not_depend_on_its_batch(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vila2._C")
    config = make_config(mode)
    _, model = make_pair(config)
    pack_linears(model, torch.bfloat16)
    images = prepare(config)
    with torch.inference_mode():
        together = model.encode_images(images)
        monkeypatch.setattr("vila2.model.vision._TILES_PER_PASS", 3)
        in_small_passes = model.encode_images(images)
        for i, image in enumerate(images):
            assert torch.equal(together[i], model.encode_images([image])[0])
            assert torch.equal(together[i], in_small_passes[i])
    assert model.encode_images([]) == []


@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_tower_and_projector(mode: str) -> None:
    _, model = make_pair(make_config(mode))
    sum(tokens.square().mean() for tokens in model.encode_images(prepare(model.config))).backward()  # type: ignore[union-attr]
    for part in (model.vision, model.projector):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def test_half_precision_keeps_its_type() -> None:
    for mode in MODES:
        _, model = make_pair(make_config(mode))
        tokens = encode(model.to(torch.bfloat16), prepare(model.config))
        assert all(part.dtype == torch.bfloat16 and part.isfinite().all() for part in tokens)


def test_released_token_counts() -> None:
    """SigLIP so400m at 384 and 448, CLIP-L at 336: VILA1.5, NVILA, NVILA-Lite, LLaVA."""
    siglip = VisionConfig("siglip", 384, 14, 1152, 4304, 27, 16, "gelu_pytorch_tanh", 1e-6, -2, "cls_patch")
    clip = VisionConfig("clip", 336, 14, 1024, 4096, 24, 16, "quick_gelu", 1e-5, -2, "patch")
    decoder = DecoderConfig(32000, 2560, 6912, 32, 20, 20, 128, 4096)

    def tokens(vision: VisionConfig, projector: str, mode: str, scales: tuple[int, ...] = ()) -> int:
        width = vision.width * max(1, len(scales))
        config = ModelConfig(
            vision,
            ProjectorConfig(projector, width, 2560),
            decoder,
            mode,
            vision.image_size,
            s2_scales=scales,
        )
        return config.tokens_per_tile

    assert tokens(siglip, "mlp_downsample", "resize") == 196
    assert tokens(siglip, "mlp_downsample", "s2", (384, 768)) == 196
    large = dataclasses.replace(siglip, image_size=448)
    assert tokens(large, "mlp_downsample", "dynamic_s2", (448, 896, 1344)) == 256
    assert tokens(large, "mlp_downsample_3x3_fix", "dynamic") == 121
    assert tokens(clip, "mlp2x_gelu", "pad") == 576


def test_parts_that_do_not_fit_are_refused() -> None:
    config = make_config("resize")
    for change, message in (
        ({"image_size": 32}, "32 pixels do not fit a tower of 16"),
        ({"projector": ProjectorConfig("linear", 13, HIDDEN)}, "reads 13 values, the tower gives 12"),
        ({"projector": ProjectorConfig("linear", WIDTH, 21)}, "gives 21 values, the decoder reads 20"),
        ({"image_mode": "tile"}, "tile"),
        (
            {"vision": dataclasses.replace(config.vision, select_feature="patch")},
            "square of features, got 15",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **change)
    clip = dataclasses.replace(config.vision, kind="clip")
    with pytest.raises(ValueError, match="square of features, got 17"):
        make_config("dynamic_s2", vision=clip, projector="mlp2x_gelu")
    _, model = make_pair(config)
    with pytest.raises(ValueError, match=r"prepared for \['dynamic'\], the model reads resize"):
        model.encode_images(prepare(make_config("dynamic")))
