"""From a decoded image to the uint8 tiles that a vision tower reads, as the checkpoint's own processor would cut them.

Sizes, roundings and pixels are Pillow's; tests compare them with Pillow and the transformers processors.
Everything here is pure and thread-safe: decode threads call `ImageProcessor.prepare`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from vila2.ops.resize import HAS_RESIZE, Interpolation, Pixels, resize_pixels

MODES = ("resize", "pad", "center_crop", "dynamic", "dynamic_s2", "s2")
INTERPOLATIONS: dict[Interpolation, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}

_STRIP = 8  # an image this many times longer than the crop is not resized whole


@dataclass(frozen=True, slots=True, eq=False)
class PreparedImage:
    """The tiles of one image, row by row, and what they will cost the language model.

    `grid` is (rows, columns) of the aspect-ratio tiling; None where the image is one plain tile. `num_tokens`
    visual tokens come out of the projector, in `num_placeholders` chunks of equal length.
    """

    tiles: Pixels  # (n, size, size, 3)
    mode: str
    grid: tuple[int, int] | None
    num_tokens: int
    num_placeholders: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """How a checkpoint wants its images.

    - `resize`: to a square, aspect ratio not kept (VILA1.5); `pad`: to a square with the mean colour first;
      `center_crop`: the transformers default for the tower.
    - `dynamic`: a grid of tiles of the nearest aspect ratio, then the whole image as a last tile (NVILA-Lite).
    - `dynamic_s2`: square grids of the smaller scales, then an aspect-ratio grid of the largest (NVILA).
    - `s2`: one tile of the largest scale; the model cuts its scales from that (VILA1.5-S2).

    The dynamic modes tile only when the request has exactly one image. `shortest_edge` says that the tower's
    processor resizes the shortest edge and crops the centre (CLIP); None, that it resizes to a square (SigLIP).
    `tokens_per_tile` counts what the projector makes of one tile (in s2 mode: of one image). Pixels are
    Pillow's, bit for bit; unless `exact`, a machine without our kernel may be at most two grey levels off.
    """

    mode: str
    image_size: int
    tokens_per_tile: int
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    shortest_edge: int | None = None
    interpolation: Interpolation = "bicubic"
    min_tiles: int = 1
    max_tiles: int = 12
    s2_scales: tuple[int, ...] = ()
    s2_resize_output_to_scale_idx: int = 0
    exact: bool = True

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"unknown image mode {self.mode!r}: expected one of {', '.join(MODES)}")
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise ValueError(f"unknown interpolation {self.interpolation!r}: expected one of {known}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be positive, got {self.image_size}")
        if self.mode == "center_crop" and self.shortest_edge is None:
            raise ValueError("center_crop needs shortest_edge")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ValueError(f"tiles must satisfy 1 <= min <= max, got {self.min_tiles} and {self.max_tiles}")
        if self.mode in ("s2", "dynamic_s2"):
            scales, index = self.s2_scales, self.s2_resize_output_to_scale_idx
            if not scales or list(scales) != sorted(set(scales)) or scales[0] < 1:
                raise ValueError(f"s2_scales must be positive and ascending, got {scales}")
            if not -len(scales) <= index < len(scales):
                raise ValueError(f"s2_resize_output_to_scale_idx {index} is outside {len(scales)} scales")
        if self.mode == "dynamic_s2" and self._scale_side(-1) ** 2 > self.max_tiles:
            raise ValueError(
                f"scales {self.s2_scales} need {self._scale_side(-1) ** 2} tiles, max_tiles is {self.max_tiles}"
            )

    @property
    def max_tokens(self) -> int:
        """The most visual tokens that one image can become."""
        if self.mode == "dynamic":
            tiles = self.max_tiles + (self.max_tiles > 1)
        elif self.mode == "dynamic_s2":
            tiles = self._output_tiles((1, self.max_tiles))
        else:
            tiles = 1
        return tiles * self.tokens_per_tile

    def prepare(self, image: Pixels, num_images: int = 1) -> PreparedImage:
        """Cut one RGB image (height, width, 3), one of the `num_images` of its request, into tiles."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"an image must be uint8 (height, width, 3), got {image.dtype} {image.shape}")
        height, width = image.shape[:2]
        grid: tuple[int, int] | None = None
        if self.mode in ("dynamic", "dynamic_s2") and num_images == 1:
            least = self.min_tiles if self.mode == "dynamic" else self._scale_side(-1) ** 2
            grid = closest_grid(width, height, least, self.max_tiles, self.image_size)
            tiles = self._tile(image, grid)
        else:
            tiles = self._whole(image)[None]
        chunks = len(tiles) if self.mode == "dynamic" else 1
        return PreparedImage(
            tiles=tiles,
            mode=self.mode,
            grid=grid,
            num_tokens=self.tokens_per_tile
            * (chunks if self.mode == "dynamic" else self._output_tiles(grid)),
            num_placeholders=chunks,
            width=width,
            height=height,
        )

    def _scale_side(self, index: int) -> int:
        """Tiles along one side of the square grid of scale `index`."""
        return self.s2_scales[index] // self.s2_scales[0]

    def _output_tiles(self, grid: tuple[int, int] | None) -> int:
        """How many tiles the features of one image are cut into for the projector."""
        if self.mode != "dynamic_s2" or grid is None:
            return 1
        index = self.s2_resize_output_to_scale_idx % len(self.s2_scales)
        return grid[0] * grid[1] if index == len(self.s2_scales) - 1 else self._scale_side(index) ** 2

    def _tile(self, image: Pixels, grid: tuple[int, int]) -> Pixels:
        size = self.image_size
        if self.mode == "dynamic":
            parts = [self._grid_tiles(image, grid)]
            if len(parts[0]) > 1:
                parts.append(self._resize(image, size, size)[None])
        else:
            sides = [self._scale_side(i) for i in range(len(self.s2_scales) - 1)]
            parts = [self._grid_tiles(image, (side, side)) for side in sides] + [
                self._grid_tiles(image, grid)
            ]
        tiles = np.concatenate(parts)
        if self.shortest_edge in (None, size):
            return tiles
        return np.stack([self._processor(tile) for tile in tiles])

    def _grid_tiles(self, image: Pixels, grid: tuple[int, int]) -> Pixels:
        """Resize to `grid` (rows, columns) of tiles and cut them row by row."""
        rows, columns, size = *grid, self.image_size
        resized = self._resize(image, rows * size, columns * size)
        tiles = resized.reshape(rows, size, columns, size, 3).swapaxes(1, 2)
        return np.ascontiguousarray(tiles).reshape(rows * columns, size, size, 3)

    def _whole(self, image: Pixels) -> Pixels:
        """The image as one tile."""
        if self.mode == "s2":
            return self._resize(image, self.s2_scales[-1], self.s2_scales[-1])
        if self.mode == "resize":
            image = self._resize(image, self.image_size, self.image_size)
        elif self.mode == "pad":
            image = pad_to_square(image, self.image_mean)
        return self._processor(image)

    def _resize(self, image: Pixels, height: int, width: int) -> Pixels:
        """VILA's own resizing, which comes before the tower's processor and is always bicubic."""
        return resize(image, height, width, exact=self.exact)

    def _processor(self, image: Pixels) -> Pixels:
        """What the tower's transformers processor does before it rescales and normalises."""
        if self.shortest_edge is None:
            return resize(image, self.image_size, self.image_size, self.interpolation, self.exact)
        return resize_and_crop(image, self.shortest_edge, self.image_size, self.interpolation, self.exact)


def resize(
    image: Pixels, height: int, width: int, interpolation: Interpolation = "bicubic", exact: bool = True
) -> Pixels:
    """Resize (h, w, 3) to (height, width, 3) as Pillow 13 does, whatever Pillow is installed; or return `image`.

    Where our kernel is not built, Pillow itself does it, or unless `exact` torch: twice as fast, with weights of
    16 bits, so that a stray value is two grey levels off.
    """
    old_height, old_width = image.shape[:2]
    if (old_height, old_width) == (height, width):
        return image
    if HAS_RESIZE:
        return resize_pixels(image, height, width, interpolation)
    # Pillow before 13 has one order of the passes only: each is asked for by itself.
    if height < old_height and old_height - height > 2 * (old_width - width):
        passes = [(height, old_width), (height, width)]
    else:
        passes = [(old_height, width), (height, width)]
    if exact:
        picture = Image.fromarray(image)
        for rows, columns in passes:
            picture = picture.resize((columns, rows), INTERPOLATIONS[interpolation])
        return np.array(picture)
    if not image.flags.writeable:  # torch warns of memory that it must not write; it never would here
        image = image.copy()
    # The uint8 kernel is picked by these strides.
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    for shape in passes:
        pixels = functional.interpolate(pixels, size=shape, mode=interpolation, antialias=True)
    return np.ascontiguousarray(pixels[0].permute(1, 2, 0).numpy())


def resize_and_crop(
    image: Pixels, shortest_edge: int, size: int, interpolation: Interpolation = "bicubic", exact: bool = True
) -> Pixels:
    """Resize the shortest edge, then crop the centre to `size` x `size`, black where the image is smaller.

    The long edge is cut down to a whole number, as transformers does. Of a very long strip only the crop is made,
    so that memory stays bounded; there a value may be two grey levels off.
    """
    height, width = image.shape[:2]
    long = int(shortest_edge * max(height, width) / min(height, width))
    new_height, new_width = (long, shortest_edge) if width <= height else (shortest_edge, long)
    top, left = (new_height - size) // 2, (new_width - size) // 2
    if long > _STRIP * max(shortest_edge, size) and size <= shortest_edge:
        rows = (top * height / new_height, min((top + size) * height / new_height, height))
        columns = (left * width / new_width, min((left + size) * width / new_width, width))
        picture, sampler = Image.fromarray(image), INTERPOLATIONS[interpolation]
        if new_height < height > width:  # the order that `resize` would take
            picture = picture.resize((width, size), sampler, box=(0, rows[0], width, rows[1]))
            return np.array(picture.resize((size, size), sampler, box=(columns[0], 0, columns[1], size)))
        picture = picture.resize((size, height), sampler, box=(columns[0], 0, columns[1], height))
        return np.array(picture.resize((size, size), sampler, box=(0, rows[0], size, rows[1])))
    resized = resize(image, new_height, new_width, interpolation, exact)
    if size <= shortest_edge:
        return np.ascontiguousarray(resized[top : top + size, left : left + size])
    # Negative offsets: the crop reaches beyond the image.
    canvas = np.zeros((size, size, 3), dtype=np.uint8)
    source = resized[max(top, 0) : top + size, max(left, 0) : left + size]
    down, right = max(-top, 0), max(-left, 0)
    canvas[down : down + source.shape[0], right : right + source.shape[1]] = source
    return canvas


def pad_to_square(image: Pixels, mean: tuple[float, float, float]) -> Pixels:
    """Centre the image on a square of the colour `int(255 * mean)`; the odd pixel of padding goes after it."""
    height, width = image.shape[:2]
    if height == width:
        return image
    side = max(height, width)
    canvas = np.empty((side, side, 3), dtype=np.uint8)
    canvas[:] = [int(value * 255) for value in mean]
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = image
    return canvas


def closest_grid(width: int, height: int, min_tiles: int, max_tiles: int, tile_size: int) -> tuple[int, int]:
    """The grid (rows, columns) of `min_tiles` to `max_tiles` tiles whose aspect ratio is nearest to the image's.

    InternVL's rule: smaller grids are tried first, and of grids equally near a larger one wins only if the
    image has more than half as many pixels as that grid.
    """
    aspect = width / height
    grids = [
        (rows, columns)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if rows * columns >= min_tiles
    ]
    best, best_distance = (1, 1), float("inf")
    for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(aspect - columns / rows)
        large_enough = width * height > 0.5 * tile_size * tile_size * rows * columns
        if distance < best_distance or (distance == best_distance and large_enough):
            best, best_distance = (rows, columns), distance
    return best
