"""Image processing against Pillow and the transformers processors, pixel by pixel."""

import dataclasses
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from vila2.model.images import (
    INTERPOLATIONS,
    ImageProcessor,
    closest_grid,
    pad_to_square,
    resize,
    resize_and_crop,
)

Pixels = NDArray[np.uint8]
PILLOW = int(PIL.__version__.split(".")[0])
RAW = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
MEAN = (0.48145466, 0.4578275, 0.40821073)

# (height, width): odd, tiny, tall, wide, larger and smaller than the target, equal to it
SIZES = [
    (1, 1), (2, 3), (31, 33), (48, 48), (48, 97), (97, 48), (47, 49), (50, 200), (200, 50), (3, 90), (90, 3),
    (301, 403), (403, 301), (640, 480), (480, 640), (1, 48), (48, 1), (601, 599),
]  # fmt: skip


def picture(height: int, width: int, kind: str = "photo") -> Pixels:
    """A picture with edges, gradients and noise; or pure noise; or black and white noise, the hardest."""
    rng = np.random.default_rng(height * 1009 + width)
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "black and white":
        return (rng.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8)
    y, x = np.mgrid[:height, :width]
    waves = np.sin(y / 17)[..., None] * 60 + np.cos(x / 23 + y / 90)[..., None] * 50 + 128
    waves = waves + np.array([0, 10, -20]) + rng.normal(0, 6, (height, width, 3))
    waves[(y // 40 + x // 40) % 5 == 0] -= 90
    return waves.clip(0, 255).astype(np.uint8)


def assert_close(ours: Pixels, theirs: NDArray[np.generic], levels: int = 0) -> None:
    """At most `levels` grey levels apart: by default not a single one."""
    assert ours.shape == theirs.shape
    assert ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= levels


def pillow_resize(image: Pixels, height: int, width: int, resample: Image.Resampling) -> Pixels:
    """Pillow 13's resize by any Pillow: one pass an axis, vertical first where the height loses most."""
    old_height, old_width = image.shape[:2]
    steps = [(width, old_height), (width, height)]
    if height < old_height and old_height - height > 2 * (old_width - width):
        steps[0] = (old_width, height)
    resized = Image.fromarray(image)
    for step in steps:
        resized = resized.resize(step, resample)
    return np.asarray(resized)


@pytest.mark.parametrize("kind", ["photo", "noise", "black and white"])
@pytest.mark.parametrize("target", [(48, 48), (7, 31), (130, 55), (224, 224)])
@pytest.mark.parametrize("size", SIZES)
def test_resize_is_pillows(size: tuple[int, int], target: tuple[int, int], kind: str) -> None:
    image = picture(*size, kind)
    for name, resample in INTERPOLATIONS.items():
        expected = pillow_resize(image, *target, resample)
        if PILLOW >= 13:
            whole = Image.fromarray(image).resize(target[::-1], resample)
            assert np.array_equal(expected, np.asarray(whole)), "the oracle itself"
        assert_close(resize(image, *target, name), expected)


@pytest.mark.parametrize("kind", ["photo", "noise", "black and white"])
@pytest.mark.parametrize("target", [(48, 48), (7, 31), (130, 55)])
@pytest.mark.parametrize("size", SIZES)
def test_resize_without_our_kernel(
    size: tuple[int, int], target: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vila2.model.images.HAS_RESIZE", False)
    image = picture(*size, kind)
    for name, resample in INTERPOLATIONS.items():
        expected = pillow_resize(image, *target, resample)
        assert_close(resize(image, *target, name), expected)
        assert_close(resize(image, *target, name, exact=False), expected, levels=2)


def test_the_fast_resize_is_rarely_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vila2.model.images.HAS_RESIZE", False)
    for kind in ("photo", "noise", "black and white"):
        image = picture(480, 640, kind)
        apart = np.abs(resize(image, 384, 384, exact=False).astype(int) - resize(image, 384, 384).astype(int))
        assert apart.mean() < 0.02
        assert (apart > 1).mean() < 1e-5


needs_pillow_13 = pytest.mark.skipif(
    PILLOW < 13, reason="an older Pillow resizes tall images in another order"
)


@needs_pillow_13
@pytest.mark.parametrize("kind", ["photo", "noise"])
@pytest.mark.parametrize("size", SIZES)
def test_resize_mode_matches_siglip_processor(size: tuple[int, int], kind: str) -> None:
    image = picture(*size, kind)
    theirs = SiglipImageProcessorPil(size={"height": 48, "width": 48})(Image.fromarray(image), **RAW)
    ours = ImageProcessor("resize", 48, tokens_per_tile=9).prepare(image)
    assert_close(ours.tiles, theirs["pixel_values"].transpose(0, 2, 3, 1))
    assert (ours.grid, ours.num_tokens, ours.num_placeholders) == (None, 9, 1)
    assert (ours.height, ours.width, ours.mode) == (*size, "resize")


@needs_pillow_13
@pytest.mark.parametrize("kind", ["photo", "noise"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("edge", "crop"), [(48, 48), (56, 48), (48, 61), (49, 32)])
def test_center_crop_matches_clip_processor(size: tuple[int, int], edge: int, crop: int, kind: str) -> None:
    image = picture(*size, kind)
    processor = CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": crop, "width": crop})
    theirs = processor(Image.fromarray(image), **RAW)["pixel_values"].transpose(0, 2, 3, 1)
    ours = ImageProcessor("center_crop", crop, tokens_per_tile=9, shortest_edge=edge).prepare(image)
    assert_close(ours.tiles, theirs)


@pytest.mark.parametrize("size", [(2, 3000), (3000, 2), (3, 997), (60, 1997), (1997, 60)])
@pytest.mark.parametrize("kind", ["photo", "noise"])
def test_a_long_strip_is_not_resized_whole(
    size: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(*size, kind)
    edge, crop = 40, 32
    long = edge * max(size) // min(size)
    height, width = (edge, long) if size[0] < size[1] else (long, edge)
    whole = pillow_resize(image, height, width, Image.Resampling.BICUBIC)
    top, left = (height - crop) // 2, (width - crop) // 2
    monkeypatch.setattr("vila2.model.images.resize", None)
    assert_close(resize_and_crop(image, edge, crop), whole[top : top + crop, left : left + crop], levels=1)


@pytest.mark.parametrize("size", SIZES)
def test_pad_to_square(size: tuple[int, int]) -> None:
    image = picture(*size)
    height, width = size
    side = max(size)
    expected = Image.new("RGB", (side, side), tuple(int(x * 255) for x in MEAN))
    expected.paste(Image.fromarray(image), ((side - width) // 2, (side - height) // 2))
    assert np.array_equal(pad_to_square(image, MEAN), np.asarray(expected))
    tile = ImageProcessor("pad", 48, 9, image_mean=MEAN).prepare(image).tiles
    assert_close(tile[0], pillow_resize(np.asarray(expected), 48, 48, Image.Resampling.BICUBIC))


def test_vila_resize_before_a_clip_processor() -> None:
    """`resize` makes the square first; a processor whose edge is another size then resizes and crops that."""
    image = picture(301, 403)
    tile = ImageProcessor("resize", 48, 9, shortest_edge=56).prepare(image).tiles[0]
    square = pillow_resize(image, 48, 48, Image.Resampling.BICUBIC)
    assert_close(tile, pillow_resize(square, 56, 56, Image.Resampling.BICUBIC)[4:52, 4:52])


def brute_force_grid(width: int, height: int, least: int, most: int, size: int) -> tuple[int, int]:
    """The rule without the scan: the nearest ratio; of equals the largest that is half filled, or the smallest."""
    grids = [(r, c) for r in range(1, most + 1) for c in range(1, most + 1) if least <= r * c <= most]
    nearest = min(abs(width / height - c / r) for r, c in grids)
    equal = sorted((r * c, r, c) for r, c in grids if abs(width / height - c / r) == nearest)
    filled = [grid for grid in equal if width * height > 0.5 * size * size * grid[0]]
    return (filled or equal[:1])[-1][1:]


@given(
    st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([(1, 12), (1, 6), (1, 1), (9, 12), (4, 9)]),
    st.sampled_from([32, 448]),
)  # fmt: skip
def test_closest_grid(width: int, height: int, tiles: tuple[int, int], size: int) -> None:
    assert closest_grid(width, height, *tiles, size) == brute_force_grid(width, height, *tiles, size)


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [
        (100, 100, (1, 1)),  # square, small
        (500, 500, (2, 2)),  # fills more than half of 2 x 2 tiles of 320, not of 3 x 3
        (1000, 1000, (3, 3)),
        (640, 320, (1, 2)),
        (2000, 1000, (2, 4)),
        (100, 5000, (12, 1)),
        (5000, 100, (1, 12)),
    ],
)
def test_grids_by_hand(width: int, height: int, grid: tuple[int, int]) -> None:
    assert closest_grid(width, height, 1, 12, 320) == grid


def test_two_grids_of_one_area_never_tie_for_nearest() -> None:
    """The published code leaves the order of such grids to a set: it must not matter for the limits in use."""
    for least, most in ((1, 12), (1, 6), (9, 12), (4, 12)):
        grids = [(r, c) for r in range(1, most + 1) for c in range(1, most + 1) if least <= r * c <= most]
        for r1, c1 in grids:
            for r2, c2 in grids:
                if (r1, c1) < (r2, c2) and r1 * c1 == r2 * c2:
                    middle = (c1 / r1 + c2 / r2) / 2
                    nearest = min(abs(middle - c / r) for r, c in grids)
                    assert nearest < abs(middle - c1 / r1) - 1e-9


def cut(image: Pixels, rows: int, columns: int, size: int) -> list[Pixels]:
    big = Image.fromarray(pillow_resize(image, rows * size, columns * size, Image.Resampling.BICUBIC))
    boxes = [
        (c * size, r * size, (c + 1) * size, (r + 1) * size) for r in range(rows) for c in range(columns)
    ]
    return [np.asarray(big.crop(box)) for box in boxes]


@pytest.mark.parametrize("size", [(30, 30), (100, 260), (260, 100), (640, 480), (90, 3)])
def test_dynamic_tiles(size: tuple[int, int]) -> None:
    image = picture(*size)
    processor = ImageProcessor("dynamic", 32, tokens_per_tile=4)
    ours = processor.prepare(image)
    rows, columns = brute_force_grid(size[1], size[0], 1, 12, 32)
    expected = cut(image, rows, columns, 32)
    if rows * columns > 1:
        expected += cut(image, 1, 1, 32)
    assert ours.grid == (rows, columns)
    assert_close(ours.tiles, np.stack(expected))
    assert ours.num_placeholders == len(expected)
    assert ours.num_tokens == 4 * len(expected) <= processor.max_tokens
    several = processor.prepare(image, num_images=2)
    assert (several.grid, several.num_placeholders, several.num_tokens) == (None, 1, 4)
    assert_close(several.tiles, np.stack(cut(image, 1, 1, 32)))


@pytest.mark.parametrize(("index", "output"), [(-1, "last"), (2, "last"), (0, 1), (1, 4)])
@pytest.mark.parametrize("size", [(30, 30), (100, 260), (640, 480)])
def test_dynamic_s2_tiles(size: tuple[int, int], index: int, output: int | str) -> None:
    image = picture(*size)
    processor = ImageProcessor(
        "dynamic_s2", 16, tokens_per_tile=4, s2_scales=(16, 32, 48), s2_resize_output_to_scale_idx=index
    )
    ours = processor.prepare(image)
    rows, columns = brute_force_grid(size[1], size[0], 9, 12, 16)
    assert ours.grid == (rows, columns)
    expected = cut(image, 1, 1, 16) + cut(image, 2, 2, 16) + cut(image, rows, columns, 16)
    assert_close(ours.tiles, np.stack(expected))
    assert ours.num_tokens == 4 * (rows * columns if output == "last" else output) <= processor.max_tokens
    assert ours.num_placeholders == 1
    several = processor.prepare(image, num_images=3)
    assert (len(several.tiles), several.grid, several.num_tokens) == (1, None, 4)


def test_dynamic_tiles_pass_through_a_clip_processor() -> None:
    image = picture(100, 260)
    ours = ImageProcessor("dynamic", 32, tokens_per_tile=4, shortest_edge=40).prepare(image)
    plain = ImageProcessor("dynamic", 32, tokens_per_tile=4, shortest_edge=32).prepare(image)
    assert ours.tiles.shape == plain.tiles.shape
    assert np.array_equal(ours.tiles[1], resize_and_crop(plain.tiles[1], 40, 32))


def test_s2_keeps_the_largest_scale() -> None:
    image = picture(301, 403)
    ours = ImageProcessor("s2", 24, tokens_per_tile=5, s2_scales=(24, 48)).prepare(image)
    assert_close(ours.tiles, np.stack(cut(image, 1, 1, 48)))
    assert (ours.num_tokens, ours.num_placeholders) == (5, 1)


def test_any_memory_layout_and_no_warning() -> None:
    image = picture(60, 80)
    frozen = image.copy()
    frozen.flags.writeable = False
    processor = ImageProcessor("center_crop", 48, tokens_per_tile=1, shortest_edge=48)
    expected = processor.prepare(image).tiles
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for variant in (
            frozen,
            np.asfortranarray(image),
            np.repeat(image, 2, axis=1)[:, ::2],
            image[::-1][::-1],
        ):
            assert np.array_equal(processor.prepare(variant).tiles, expected)
    assert np.array_equal(image, picture(60, 80)), "the input is left as it was"


def test_threads_do_not_disturb_each_other() -> None:
    processor = ImageProcessor("dynamic", 32, tokens_per_tile=4)
    images = [picture(40 + 17 * i, 300 - 13 * i) for i in range(12)]
    alone = [processor.prepare(image).tiles for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(processor.prepare, images * 4))
    assert all(np.array_equal(result.tiles, alone[i % 12]) for i, result in enumerate(together))


def test_wrong_images_and_settings_are_named() -> None:
    processor = ImageProcessor("resize", 32, tokens_per_tile=4)
    for bad in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32),
                np.zeros((0, 4, 3), np.uint8)):  # fmt: skip
        with pytest.raises(ValueError, match=r"uint8 \(height, width, 3\)"):
            processor.prepare(bad)
    for change, message in (
        ({"mode": "stretch"}, "stretch"),
        ({"interpolation": "lanczos"}, "lanczos"),
        ({"image_size": 0}, "image_size"),
        ({"mode": "center_crop"}, "shortest_edge"),
        ({"min_tiles": 5, "max_tiles": 4}, "5 and 4"),
        ({"mode": "s2"}, "s2_scales"),
        ({"mode": "s2", "s2_scales": (48, 32)}, "ascending"),
        ({"mode": "s2", "s2_scales": (32, 48), "s2_resize_output_to_scale_idx": 2}, "outside 2 scales"),
        ({"mode": "dynamic_s2", "s2_scales": (16, 32, 48), "max_tiles": 8}, "need 9 tiles"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(processor, **change)


def test_max_tokens_is_reached() -> None:
    wide = picture(20, 20 * 12)
    dynamic = ImageProcessor("dynamic", 16, tokens_per_tile=4)
    assert dynamic.prepare(wide).num_tokens == dynamic.max_tokens == 13 * 4
    assert dataclasses.replace(dynamic, max_tiles=1).max_tokens == 4
    joined = ImageProcessor(
        "dynamic_s2", 16, tokens_per_tile=4, s2_scales=(16, 32), s2_resize_output_to_scale_idx=-1
    )
    assert joined.prepare(wide).num_tokens == joined.max_tokens == 12 * 4
    assert math.prod(joined.prepare(wide).grid or ()) == 12
