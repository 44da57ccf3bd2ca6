"""A model of ours as a VILA checkpoint, which reads back bit for bit."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vila2.model.hf_config import decoder_json, vision_json
from vila2.model.image_config import ImageSettings, image_settings_json
from vila2.model.vila_format import GENERATION_KEY
from vila2.model.vlm import ModelConfig, VisionLanguageModel
from vila2.model.weight_files import INDEX_FILE, SINGLE_FILE
from vila2.model.weight_map import PARTS, split_weights

MAX_SHARD_BYTES = 5 * 10**9
_ENCODER = "llava.model.encoders.BasicImageEncoder"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def save_vila(
    path: str | Path,
    model: VisionLanguageModel,
    tokenizer_files: str | Path | Iterable[Path],
    config: ModelConfig,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model` into the folder `path` in the VILA layout, in the types that its weights have.

    `tokenizer_files` are the files to put beside the language model, or the folder to take them from. Vision layers
    above the selected one, which the model lacks, are left out: the tower that is written ends at that layer.
    Weights of an earlier save in the folder are replaced.
    """
    if not config.projector.bias:
        raise ValueError("the VILA layout has no projectors without bias")
    root = Path(path)
    (root / "config.json").unlink(missing_ok=True)
    weights = split_weights(model.state_dict(), config)
    configs = _part_configs(config)
    for part in PARTS:
        folder = root / part
        folder.mkdir(parents=True, exist_ok=True)
        _write_weights(folder, weights[part], max_shard_bytes)
        _write_json(folder / "config.json", configs[part])
    settings = ImageSettings(
        size=config.image_size,
        shortest_edge=config.shortest_edge,
        interpolation=config.interpolation,
        mean=config.image_mean,
        std=config.image_std,
        pads=False,
    )
    _write_json(root / "vision_tower" / "preprocessor_config.json", image_settings_json(settings))
    if isinstance(tokenizer_files, str | Path):
        tokenizer_files = [
            file for name in TOKENIZER_FILES if (file := Path(tokenizer_files) / name).is_file()
        ]
    for file in tokenizer_files:
        shutil.copyfile(file, root / "llm" / file.name)
    # Last, so that an interrupted save is no checkpoint.
    _write_json(root / "config.json", _root_config(config, configs))


def _part_configs(config: ModelConfig) -> dict[str, dict[str, Any]]:
    return {
        "llm": decoder_json(config.decoder),
        "vision_tower": vision_json(config.vision),
        "mm_projector": {
            "architectures": ["MultimodalProjector"],
            "model_type": "v2l_projector",
            "mm_projector_type": config.projector.kind,
        },
    }


def _root_config(config: ModelConfig, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    scales = config.image_mode in ("s2", "dynamic_s2")
    nvila = config.token_newline or (
        config.projector.kind == "mlp_downsample" and not config.projector.column_major
    )
    return {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        GENERATION_KEY: "nvila" if nvila else "vila1.5",
        "image_encoder": json.dumps(
            {"_target_": _ENCODER} | ({} if config.token_newline else {"end_tokens": None})
        ),
        "hidden_size": config.decoder.hidden_size,
        "mm_hidden_size": config.projector.input_width,
        "image_aspect_ratio": {"s2": "resize", "center_crop": None}.get(config.image_mode, config.image_mode),
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": {"default": "patch", "full": "cls_patch"}.get(
            config.vision.select_feature, config.vision.select_feature
        ),
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "s2": config.image_mode == "s2",
        "dynamic_s2": config.image_mode == "dynamic_s2",
        "s2_scales": ",".join(map(str, config.s2_scales)) if scales else None,
        "s2_max_split_size": config.image_size if scales else None,
        "s2_resize_output_to_scale_idx": config.s2_resize_output_to_scale_idx,
        "min_tiles": config.min_tiles,
        "max_tiles": config.max_tiles,
        "chat_template": config.template,
        **{f"{part}_cfg": dict(parts[part]) for part in PARTS},
    }


def _write_weights(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    for stale in (*folder.glob("model*.safetensors"), folder / INDEX_FILE):
        stale.unlink(missing_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.cpu()
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE_FILE, metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
