"""The image settings of a checkpoint: preprocessor_config.json, or the `image_processor` of processor_config.json
(all that transformers 5 writes)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila2.errors import CheckpointError
from vila2.model.weight_files import read_json
from vila2.ops.resize import Interpolation

Rgb = tuple[float, float, float]

_RESAMPLE: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """`size` is the side of the tower's square input. `shortest_edge`: resize that, then crop the centre; None:
    resize to the square. `pads`: first to a square. Mean and std are for values in 0..1."""

    size: int
    shortest_edge: int | None
    interpolation: Interpolation
    mean: Rgb
    std: Rgb
    pads: bool


def read_image_settings(folder: Path) -> ImageSettings:
    """The settings in `folder`; CheckpointError if there are none or they are of a kind that we do not implement."""
    path = folder / "preprocessor_config.json"
    if path.is_file():
        return _settings(read_json(path), path)
    path = folder / "processor_config.json"
    config = read_json(path).get("image_processor") if path.is_file() else None
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{folder} lacks preprocessor_config.json: the checkpoint is incomplete")
    return _settings(config, path)


def _settings(config: Mapping[str, Any], path: Path) -> ImageSettings:
    try:
        if not config.get("do_resize", True):
            raise ValueError("do_resize false is not supported")
        size, crop = config.get("size"), config.get("crop_size")
        crops = bool(config.get("do_center_crop", crop is not None))
        shortest_edge = _shortest_edge(size)
        if crops and shortest_edge is None:
            shortest_edge = _side(size)  # a square resize and a crop of the same square is no crop
            if _side(crop) != shortest_edge:
                raise ValueError(f"a crop of {crop} after a resize to {size} is not supported")
            shortest_edge, crops = None, False
        resample = config.get("resample", 3)
        if resample not in _RESAMPLE:
            raise ValueError(f"resample {resample} is not supported (2: bilinear, 3: bicubic)")
        if shortest_edge is not None and not crops:
            raise ValueError("do_center_crop false with a shortest_edge gives images of many sizes")
        mean, std = _normalisation(config)
        return ImageSettings(
            size=_side(crop if crops else size),
            shortest_edge=shortest_edge,
            interpolation=_RESAMPLE[resample],
            mean=mean,
            std=std,
            pads=bool(config.get("do_pad", False)),
        )
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _shortest_edge(size: Any) -> int | None:
    if isinstance(size, Mapping) and size.get("shortest_edge") is not None:
        return int(size["shortest_edge"])
    return None


def _side(size: Any) -> int:
    """The side of a square given as a number or as {height, width}."""
    if isinstance(size, Mapping):
        if size["height"] != size["width"]:
            raise ValueError(f"images of {size['height']} x {size['width']} are not square")
        return int(size["height"])
    return int(size)


def _normalisation(config: Mapping[str, Any]) -> tuple[Rgb, Rgb]:
    """Mean and std for grey levels divided by 255, whatever factor the processor uses."""
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if config.get("do_normalize", True):
        mean, std = _rgb(config["image_mean"]), _rgb(config["image_std"])
    factor = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0
    scale = factor * 255
    if abs(scale - 1) < 1e-6:
        return mean, std
    return _rgb([value / scale for value in mean]), _rgb([value / scale for value in std])


def _rgb(values: Any) -> Rgb:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def image_settings_json(settings: ImageSettings) -> dict[str, Any]:
    """A preprocessor_config.json that reads back as `settings`."""
    square = {"height": settings.size, "width": settings.size}
    numbers = {name: number for number, name in _RESAMPLE.items()}
    config: dict[str, Any] = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": square,
        "resample": numbers[settings.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
    }
    if settings.shortest_edge is not None:
        config |= {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": settings.shortest_edge},
            "do_center_crop": True,
            "crop_size": square,
        }
    return config
