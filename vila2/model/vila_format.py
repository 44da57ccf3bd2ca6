"""VILA checkpoints (VILA1.5 and NVILA): config.json beside the folders llm, vision_tower and mm_projector."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vila2.errors import CheckpointError
from vila2.model.hf_config import decoder_config, refuse_quantised, vision_config
from vila2.model.image_config import ImageSettings, read_image_settings
from vila2.model.layout import Layout, small_files
from vila2.model.projector import ProjectorConfig
from vila2.model.prompt import TEMPLATES, template_of_name
from vila2.model.tokenizer import has_chat_template
from vila2.model.vision import VisionConfig
from vila2.model.vlm import ModelConfig
from vila2.model.weight_files import find_weight_files, read_json, some
from vila2.model.weight_map import PARTS, Found, Name, match_weights, plain_vision_name

Json = Mapping[str, Any]

GENERATION_KEY = "vila2_generation"  # written by us, so that nobody has to guess again
GENERATIONS = ("vila1.5", "nvila")
_UNSUPPORTED = ("ps3", "mm_use_im_start_end", "high_res_pos_embed")
_FIRST_NVILA_VERSION = (4, 46)


def is_vila(root: Path, config: Json) -> bool:
    """Is this the folder and the config.json of a VILA checkpoint?"""
    keys = any(f"{part}_cfg" in config for part in PARTS)
    return keys or config.get("model_type") in ("llava_llama", "vila") or (root / "llm").is_dir()


def read_vila(root: Path, config: Json) -> Layout:
    """Check the checkpoint `root` from its JSON and headers. CheckpointError names whatever is wrong.

    The parts are always root/<part>: the paths inside the config (`_name_or_path`, `resume_path`) are those of the
    machine that trained it.
    """
    missing = [f"{part}/" for part in PARTS if not (root / part).is_dir()]
    if missing:
        raise CheckpointError(f"{root} lacks {some(missing)}: the checkpoint is incomplete")
    refuse_quantised(config, str(root / "config.json"))
    weights = {part: find_weight_files(root / part, root) for part in PARTS}
    parts = {part: _part_config(root, config, part) for part in PARTS}
    nvila = is_nvila(config, parts["llm"], parts["mm_projector"])
    model = _model_config(root, config, parts, nvila)
    found: dict[Name, Found] = {}
    for part, files in weights.items():
        for name, entry in files.tensors.items():
            plain = plain_vision_name(name) if part == "vision_tower" else name
            found[part, plain] = Found(name, entry)
    return Layout(
        kind="nvila" if nvila else "vila1.5",
        root=root,
        config=model,
        tokenizer_folder=root / "llm",
        sources=match_weights(found, model, str(root)),
        weight_files=tuple(path for part in PARTS for path in weights[part].files),
        small_files=small_files(root, *(root / part for part in PARTS)),
    )


def _part_config(root: Path, config: Json, part: str) -> Json:
    """The part's own config.json, as VILA's code reads it, else the copy in the root's."""
    path = root / part / "config.json"
    copy = config.get(f"{part}_cfg")
    if path.is_file() or not isinstance(copy, Mapping):
        return read_json(path)
    return copy


def is_nvila(config: Json, llm: Json, projector: Json) -> bool:
    """NVILA, or VILA1.5? They share every file and differ in what is computed.

    VILA1.5's `mlp_downsample` gives its tokens column by column and the prompt has a newline after the image; since
    NVILA's release (code of December 2024) tokens go row by row and the newline's embedding follows the features.
    No key says which of the two trained a checkpoint, so, in this order:
    1. our own key, in checkpoints that we wrote;
    2. a Qwen2 language model, or aspect-ratio tiles: VILA1.5 had neither;
    3. the transformers version that wrote the projector, else the root config: NVILA trained with 4.46, VILA1.5
       with 4.36. The projector's comes first, because the root config is rewritten (with version "2.0" and NVILA's
       default keys) when an old checkpoint is converted for remote code, while the projector's file is copied;
    4. keys that only the NVILA code writes.
    """
    if config.get(GENERATION_KEY) in GENERATIONS:
        return bool(config[GENERATION_KEY] == "nvila")
    tiled = config.get("dynamic_s2") or config.get("image_aspect_ratio") in ("dynamic", "dynamic_s2")
    if tiled or llm.get("model_type") == "qwen2":
        return True
    for source in (projector, config):
        version = _version(source.get("transformers_version"))
        if version is not None:
            return version >= _FIRST_NVILA_VERSION
    return config.get("min_tiles") is not None or str(config.get("version")) == "2.0"


def _version(text: Any) -> tuple[int, int] | None:
    try:
        major, minor = str(text).split(".")[:2]
        return int(major), int(minor)
    except ValueError:
        return None


def _model_config(root: Path, config: Json, parts: Mapping[str, Json], nvila: bool) -> ModelConfig:
    where = str(root / "config.json")
    _refuse_unsupported(config, where)
    decoder = decoder_config(parts["llm"], str(root / "llm" / "config.json"))
    vision = vision_config(
        parts["vision_tower"],
        config.get("mm_vision_select_layer", -2),
        config.get("mm_vision_select_feature", "patch"),
        str(root / "vision_tower" / "config.json"),
    )
    settings = read_image_settings(root / "vision_tower")
    mode = _image_mode(config, settings, vision, where)
    scales = _scales(config, vision.image_size, where) if mode in ("s2", "dynamic_s2") else ()
    kind = str(parts["mm_projector"].get("mm_projector_type", config.get("mm_projector_type")))
    try:
        return ModelConfig(
            vision=vision,
            projector=ProjectorConfig(
                kind=kind,
                input_width=vision.width * max(1, len(scales)),
                hidden_size=decoder.hidden_size,
                column_major=kind == "mlp_downsample" and not nvila,
            ),
            decoder=decoder,
            image_mode=mode,
            image_size=vision.image_size,
            image_mean=settings.mean,
            image_std=settings.std,
            shortest_edge=settings.shortest_edge,
            interpolation=settings.interpolation,
            min_tiles=int(_or(config.get("min_tiles"), 1)),
            max_tiles=int(_or(config.get("max_tiles"), 12)),
            s2_scales=scales,
            s2_resize_output_to_scale_idx=int(_or(config.get("s2_resize_output_to_scale_idx"), 0)),
            token_newline=nvila and _ends_with_newline(config, where),
            template=_template(root, config, nvila),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def _or(value: Any, default: int) -> Any:
    return default if value is None else value


def _refuse_unsupported(config: Json, where: str) -> None:
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if used:
        raise CheckpointError(f"{where}: {some(used)} is set, which is not supported")


def _image_mode(config: Json, settings: ImageSettings, vision: VisionConfig, where: str) -> str:
    mode = config.get("image_aspect_ratio")
    if config.get("dynamic_s2") or mode == "dynamic_s2":
        return "dynamic_s2"
    if config.get("s2"):
        if mode != "resize":
            raise CheckpointError(f"{where}: s2 with image_aspect_ratio {mode!r} is not supported")
        return "s2"
    if settings.size != vision.image_size:
        raise CheckpointError(
            f"{where}: the image processor makes {settings.size} pixels a side, the vision tower reads "
            f"{vision.image_size}"
        )
    if mode in ("resize", "pad", "dynamic"):
        return str(mode)
    if mode is None:  # the tower's own processor
        return "resize" if settings.shortest_edge is None else "center_crop"
    raise CheckpointError(
        f"{where}: image_aspect_ratio {mode!r} is not supported; known are resize, pad, dynamic, dynamic_s2"
    )


def _scales(config: Json, tile: int, where: str) -> tuple[int, ...]:
    """`s2_scales`, in the files a string: "448,896,1344". Every scale is cut into tiles of the tower's size."""
    value = config.get("s2_scales")
    try:
        parts = value.split(",") if isinstance(value, str) else list(value or ())
        scales = tuple(sorted(int(part) for part in parts))
    except (TypeError, ValueError):
        raise CheckpointError(f"{where}: s2_scales {value!r} is no list of numbers") from None
    split = int(_or(config.get("s2_max_split_size"), tile))
    if scales[:1] != (tile,) or split != tile:
        raise CheckpointError(
            f"{where}: s2_scales {value!r} with tiles of {split} do not fit a vision tower of {tile} pixels"
        )
    return scales


def _ends_with_newline(config: Json, where: str) -> bool:
    """Do the tokens of "\\n" follow each image's features? By the image encoder's settings, a JSON string."""
    encoder = config.get("image_encoder")
    try:
        settings = json.loads(encoder) if isinstance(encoder, str) else dict(encoder or {})
    except ValueError:
        raise CheckpointError(f"{where}: image_encoder {encoder!r} is not valid JSON") from None
    name = str(settings.get("_target_", "BasicImageEncoder")).rpartition(".")[2]
    end = settings.get("end_tokens", "\n")
    if name != "BasicImageEncoder" or settings.get("start_tokens") or end not in ("\n", None):
        raise CheckpointError(f"{where}: the image encoder {encoder!r} is not supported")
    return end is not None


def _template(root: Path, config: Json, nvila: bool) -> str:
    """What the config says, else by the name of a released VILA1.5 model, else the tokenizer's own."""
    if config.get("chat_template") in TEMPLATES:
        return str(config["chat_template"])
    by_name = None if nvila else template_of_name(root)
    return by_name or ("auto" if has_chat_template(root / "llm") else "vicuna_v1")
