"""LLaVA checkpoints in the transformers layout: one folder, one config.json, three generations of weight names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vila2.errors import CheckpointError
from vila2.model.hf_config import decoder_config, refuse_quantised, vision_config
from vila2.model.image_config import read_image_settings
from vila2.model.layout import Layout, small_files
from vila2.model.projector import ProjectorConfig
from vila2.model.tokenizer import has_chat_template
from vila2.model.vision import VisionConfig
from vila2.model.vlm import ModelConfig
from vila2.model.weight_files import WeightFiles, find_weight_files
from vila2.model.weight_map import Found, Name, match_weights, plain_vision_name

# transformers up to 4.51 wrote the first form, 4.52 to 4.5x the second, 5 the first again without "vision_model.".
_LLM_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("lm_head.", "lm_head."),
)
_VISION_PREFIXES = ("model.vision_tower.", "vision_tower.")
_PROJECTOR_PREFIXES = ("model.multi_modal_projector.", "multi_modal_projector.")
_PROJECTOR_NAMES = {"linear_1": "layers.0", "linear_2": "layers.2"}


def is_llava(config: Mapping[str, Any]) -> bool:
    """Is this the config.json of a LLaVA checkpoint in the transformers layout?"""
    parts = (config.get("text_config"), config.get("vision_config"))
    return config.get("model_type") == "llava" and all(isinstance(part, Mapping) for part in parts)


def read_llava(root: Path, config: Mapping[str, Any]) -> Layout:
    """Check the checkpoint `root` from its JSON and headers. CheckpointError names whatever is wrong."""
    where = str(root / "config.json")
    refuse_quantised(config, where)
    model = _model_config(root, config, where)
    weights = find_weight_files(root, root)
    return Layout(
        kind="llava",
        root=root,
        config=model,
        tokenizer_folder=root,
        sources=match_weights(_by_part(weights), model, str(root)),
        weight_files=weights.files,
        small_files=small_files(root),
    )


def _model_config(root: Path, config: Mapping[str, Any], where: str) -> ModelConfig:
    text = dict(config["text_config"])
    # An older file says it once for the whole model.
    text.setdefault("tie_word_embeddings", config.get("tie_word_embeddings", False))
    decoder = decoder_config(text, f"{where} (text_config)")
    vision = vision_config(
        config["vision_config"],
        config.get("vision_feature_layer", -2),
        config.get("vision_feature_select_strategy", "default"),
        f"{where} (vision_config)",
    )
    if config.get("projector_hidden_act", "gelu") != "gelu":
        raise CheckpointError(
            f"{where}: projector_hidden_act {config['projector_hidden_act']!r} is not supported"
        )
    settings = read_image_settings(root)
    _refuse_other_size(settings.size, vision, root)
    mode = "pad" if settings.pads else "resize" if settings.shortest_edge is None else "center_crop"
    if mode == "resize" and settings.interpolation != "bicubic":
        raise CheckpointError(f"{root}: a {settings.interpolation} resize to a square is not supported")
    try:
        return ModelConfig(
            vision=vision,
            projector=ProjectorConfig(
                kind="mlp2x_gelu",
                input_width=vision.width,
                hidden_size=decoder.hidden_size,
                bias=bool(config.get("multimodal_projector_bias", True)),
            ),
            decoder=decoder,
            image_mode=mode,
            image_size=vision.image_size,
            image_mean=settings.mean,
            image_std=settings.std,
            shortest_edge=settings.shortest_edge,
            interpolation=settings.interpolation,
            token_newline=False,
            template="auto" if has_chat_template(root) else "vicuna_v1",
        )
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _refuse_other_size(size: int, vision: VisionConfig, root: Path) -> None:
    if size != vision.image_size:
        raise CheckpointError(
            f"{root}: the image processor makes {size} pixels a side, the vision tower reads {vision.image_size}"
        )


def _by_part(weights: WeightFiles) -> dict[Name, Found]:
    return {_plain_name(name): Found(name, entry) for name, entry in weights.tensors.items()}


def _plain_name(name: str) -> Name:
    for prefix in _VISION_PREFIXES:
        if name.startswith(prefix):
            return "vision_tower", plain_vision_name(name.removeprefix(prefix))
    for prefix in _PROJECTOR_PREFIXES:
        if name.startswith(prefix):
            layer, _, rest = name.removeprefix(prefix).partition(".")
            return "mm_projector", f"{_PROJECTOR_NAMES.get(layer, layer)}.{rest}"
    for prefix, plain in _LLM_PREFIXES:
        if name.startswith(prefix):
            return "llm", plain + name.removeprefix(prefix)
    return "", name
