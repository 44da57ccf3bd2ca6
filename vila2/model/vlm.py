"""The whole model: tiles to visual tokens, and the decoder that reads them among the text's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vila2.model.decoder import Decoder, DecoderConfig
from vila2.model.images import ImageProcessor, PreparedImage
from vila2.model.projector import Projector, ProjectorConfig
from vila2.model.vision import VisionConfig, VisionTower
from vila2.ops.resize import Interpolation


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """All that defines a checkpoint's model besides its weights.

    `image_mode` and the fields after it are those of `ImageProcessor`; s2 mode cuts its scales into tiles of
    `image_size`, so a checkpoint's `s2_max_split_size` must be that. `token_newline`: the embedding of "\\n" follows
    each image (NVILA). `template` is the chat template (see `vila2.model.prompt`).
    """

    vision: VisionConfig
    projector: ProjectorConfig
    decoder: DecoderConfig
    image_mode: str
    image_size: int
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    shortest_edge: int | None = None
    interpolation: Interpolation = "bicubic"
    min_tiles: int = 1
    max_tiles: int = 12
    s2_scales: tuple[int, ...] = ()
    s2_resize_output_to_scale_idx: int = 0
    token_newline: bool = False
    image_token: str = "<image>"
    template: str = "auto"

    def __post_init__(self) -> None:
        if self.image_size != self.vision.image_size:
            raise ValueError(
                f"images of {self.image_size} pixels do not fit a tower of {self.vision.image_size}"
            )
        width = self.vision.width * self.num_scales
        if self.projector.input_width != width:
            raise ValueError(
                f"the projector reads {self.projector.input_width} values, the tower gives {width}"
            )
        if self.projector.hidden_size != self.decoder.hidden_size:
            raise ValueError(
                f"the projector gives {self.projector.hidden_size} values, the decoder reads "
                f"{self.decoder.hidden_size}"
            )
        self.image_processor()  # checks the image settings and the token count

    @property
    def num_scales(self) -> int:
        """How many scales' features lie side by side in the projector's input."""
        return len(self.s2_scales) if self.image_mode in ("s2", "dynamic_s2") else 1

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile after the projector; in s2 mode of one image."""
        features = self.vision.num_tokens
        if self.image_mode == "s2":
            side = s2_feature_side(
                self.s2_scales[self.s2_resize_output_to_scale_idx], self.image_size, features
            )
            features = side * side
        elif self.image_mode == "dynamic_s2":
            _side(features)  # stitching needs a square
        return self.projector.num_tokens(features)

    def image_processor(self) -> ImageProcessor:
        """The processor that cuts images as this model reads them."""
        return ImageProcessor(
            mode=self.image_mode,
            image_size=self.image_size,
            tokens_per_tile=self.tokens_per_tile,
            image_mean=self.image_mean,
            shortest_edge=self.shortest_edge,
            interpolation=self.interpolation,
            min_tiles=self.min_tiles,
            max_tiles=self.max_tiles,
            s2_scales=self.s2_scales,
            s2_resize_output_to_scale_idx=self.s2_resize_output_to_scale_idx,
        )


class VisionLanguageModel(nn.Module):
    """Tower, projector and decoder of one checkpoint."""

    def __init__(
        self, vision: VisionTower, projector: Projector, decoder: Decoder, config: ModelConfig
    ) -> None:
        super().__init__()
        self.vision = vision
        self.projector = projector
        self.decoder = decoder
        self.config = config

    @classmethod
    def from_config(cls, config: ModelConfig) -> "VisionLanguageModel":
        """A model with fresh weights, on torch's default device."""
        return cls(
            VisionTower(config.vision, config.image_mean, config.image_std),
            Projector(config.projector),
            Decoder(config.decoder),
            config,
        )

    def encode_images(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        """The visual tokens (num_tokens, hidden) of each image, chunk after chunk where it has several.

        All tiles of all images share the passes through the tower and the projector.
        """
        if not images:
            return []
        wrong = {image.mode for image in images} - {self.config.image_mode}
        if wrong:
            raise ValueError(
                f"images were prepared for {sorted(wrong)}, the model reads {self.config.image_mode}"
            )
        device = self.vision.position_embedding.device
        tiles = torch.from_numpy(np.concatenate([image.tiles for image in images]))
        if device.type == "cuda":
            tiles = (
                tiles.pin_memory()
            )  # the copy then runs beside other work, and the host does not wait for it
        tiles = tiles.to(device, non_blocking=True)
        if self.config.image_mode == "s2":
            tokens = list(self.projector(self._s2_features(tiles)))
        elif self.config.image_mode == "dynamic_s2":
            tokens = self._encode_dynamic_s2(tiles, images)
        else:
            projected = self.projector(self.vision(tiles))
            tokens = [
                part.flatten(0, 1) for part in torch.split(projected, [len(image.tiles) for image in images])
            ]
        for image, part in zip(images, tokens, strict=True):
            assert len(part) == image.num_tokens, (len(part), image.num_tokens)
        return tokens

    def _s2_features(self, images: Tensor) -> Tensor:
        """Images (N, size, size, 3) of the largest scale to features (N, tokens, width * scales).

        As s2wrapper's `forward` in "resize" mode: each scale is resampled (bicubic, not antialiased, in floating
        point), cut into tiles, and its features are stitched and averaged to the grid of the chosen scale.
        """
        config = self.config
        split, grids = config.image_size, []
        for scale in config.s2_scales:
            count = math.ceil(scale / split)
            pixels = _bicubic(_bicubic(images, scale), count * split)
            stitched = stitch(self.vision(_cut(pixels, count)), (count, count))
            side = s2_feature_side(scale, split, config.vision.num_tokens)
            grids.append(_area(stitched, (side, side)))
        shape = (grids[config.s2_resize_output_to_scale_idx].shape[1],) * 2
        return torch.cat([_area(grid, shape) for grid in grids], dim=-1).flatten(1, 2)

    def _encode_dynamic_s2(self, tiles: Tensor, images: Sequence[PreparedImage]) -> list[Tensor]:
        """NVILA: stitch each scale, join the scales' channels, cut into tiles again, project, stitch."""
        features = torch.split(self.vision(tiles), [len(image.tiles) for image in images])
        joined, grids = zip(
            *(self._join_scales(part, image.grid) for part, image in zip(features, images, strict=True)),
            strict=True,
        )
        projected = torch.split(self.projector(torch.cat(joined)), [len(part) for part in joined])
        return [stitch(part, grid).flatten(0, 2) for part, grid in zip(projected, grids, strict=True)]

    def _join_scales(self, features: Tensor, grid: tuple[int, int] | None) -> tuple[Tensor, tuple[int, int]]:
        """One image's tile features, scale after scale, to tiles of joined scales (n, tokens, width * scales).

        Also returns the (rows, columns) that those tiles form. A plain tile stands for every scale.
        """
        scales = self.config.s2_scales
        if grid is None:
            return features.repeat(1, 1, len(scales)), (1, 1)
        grids = [(scale // scales[0],) * 2 for scale in scales[:-1]] + [grid]
        parts = torch.split(features, [rows * columns for rows, columns in grids])
        stitched = [stitch(part, shape) for part, shape in zip(parts, grids, strict=True)]
        index = self.config.s2_resize_output_to_scale_idx
        rows, columns = stitched[index].shape[1:3]
        joined = torch.cat([_area(part, (rows, columns)) for part in stitched], dim=-1)
        return _cut(joined, *grids[index]).flatten(1, 2), grids[index]


def s2_feature_side(scale: int, split: int, num_features: int) -> int:
    """Side of one scale's feature grid in s2 mode, given the `num_features` of one tile of side `split`."""
    count = math.ceil(scale / split)
    return math.ceil(scale / (count * split) * (count * _side(num_features)))


def stitch(tiles: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tiles of features (images * rows * columns, side * side, width), row by row, to images (images, H, W, width)."""
    rows, columns = grid
    side = _side(tiles.shape[1])
    parts = tiles.reshape(-1, rows, columns, side, side, tiles.shape[2]).permute(0, 1, 3, 2, 4, 5)
    return parts.reshape(len(parts), rows * side, columns * side, tiles.shape[2])


def _cut(image: Tensor, rows: int, columns: int | None = None) -> Tensor:
    """Images (images, H, W, channels) to tiles (images * rows * columns, H / rows, W / columns, channels)."""
    columns = rows if columns is None else columns
    count, height, width, channels = image.shape
    parts = image.reshape(count, rows, height // rows, columns, width // columns, channels)
    return parts.permute(0, 1, 3, 2, 4, 5).reshape(-1, height // rows, width // columns, channels)


def _area(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """Resample (images, H, W, channels) to H, W = `shape` by averaging areas, in float32."""
    if image.shape[1:3] == shape:
        return image
    resized = functional.interpolate(image.permute(0, 3, 1, 2).float(), size=shape, mode="area")
    return resized.permute(0, 2, 3, 1).to(image.dtype)


def _bicubic(image: Tensor, side: int) -> Tensor:
    """Resample (images, H, W, 3) to a square of `side`, without antialiasing or rounding: floating point out."""
    if image.shape[1:3] == (side, side):
        return image
    resized = functional.interpolate(image.permute(0, 3, 1, 2).float(), size=(side, side), mode="bicubic")
    return resized.permute(0, 2, 3, 1)


def _side(count: int) -> int:
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"tiles can only be stitched from a square of features, got {count}")
    return side
