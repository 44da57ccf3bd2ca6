"""Tiny random checkpoints in each layout that vila2 reads, written in well under a second.

`from tests.checkpoints import write_vila15` works wherever the repository root is on the path: under
`python -m pytest`, in an editable install, and in scripts run with `PYTHONPATH=.` from the root.

The tensor names are spelled out here, apart from the loader's own table, so that a slip in either shows.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.tiny_tokenizers import CHATML, LLAVA_TEMPLATE, byte_tokenizer, llama_tokenizer, write_tokenizer

SIGLIP_MEAN_STD = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
CLIP_MEAN_STD = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def write_vila15(
    path: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    llm: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    root: Mapping[str, Any] | None = None,
    projector: str = "mlp_downsample",
    num_shards: int = 1,
) -> Path:
    """VILA1.5: Llama, SigLIP with a 5 x 5 grid of patches (9 visual tokens after mlp_downsample), a Llama tokenizer.

    `llm`, `vision` and `root` override keys of the three configs.
    """
    tokenizer = llama_tokenizer()
    llm_config = _llama_config(tokenizer.get_vocab_size()) | dict(llm or {})
    vision_config = _siglip_config(image_size=70) | dict(vision or {})
    root_config = _vila_config("4.36.2", vision_config["hidden_size"], "resize") | dict(root or {})
    _write_vila(Path(path), root_config, llm_config, vision_config, projector, seed, dtype, num_shards)
    write_tokenizer(Path(path) / "llm", tokenizer, bos="<s>", eos="</s>", unk="<unk>")
    return Path(path)


def write_nvila(
    path: str | Path,
    *,
    mode: str = "dynamic_s2",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    llm: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    root: Mapping[str, Any] | None = None,
    projector: str = "mlp_downsample",
    num_shards: int = 1,
) -> Path:
    """NVILA: Qwen2 with its chat template, SigLIP with a 4 x 4 grid of patches a tile (4 visual tokens).

    `mode` is dynamic_s2 (three scales), dynamic (tiles and a thumbnail) or resize.
    """
    tokenizer = byte_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    llm_config = _qwen2_config(tokenizer.get_vocab_size()) | dict(llm or {})
    vision_config = _siglip_config(image_size=56) | dict(vision or {})
    mm_hidden = vision_config["hidden_size"] * (3 if mode == "dynamic_s2" else 1)
    root_config = _vila_config("4.46.0", mm_hidden, mode) | {"chat_template": None, "num_time_tokens": 0}
    if mode == "dynamic_s2":
        root_config |= {
            "dynamic_s2": True,
            "s2_scales": "56,112,168",
            "s2_max_split_size": 56,
            "s2_resize_output_to_scale_idx": -1,
        }
    root_config |= dict(root or {})
    _write_vila(Path(path), root_config, llm_config, vision_config, projector, seed, dtype, num_shards)
    write_tokenizer(Path(path) / "llm", tokenizer, eos="<|im_end|>", chat_template=CHATML)
    return Path(path)


def write_llava(
    path: str | Path,
    *,
    generation: str = "new",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    root: Mapping[str, Any] | None = None,
    chat_template: str | None = LLAVA_TEMPLATE,
    num_shards: int = 1,
) -> Path:
    """LLaVA in the transformers layout: CLIP with 4 x 4 patches (16 visual tokens), Llama.

    `generation` picks the weight names: "old" (language_model.model.*, vision_tower.vision_model.*) or "new"
    (model.language_model.*, model.vision_tower.*).
    """
    tokenizer = llama_tokenizer(extra=("<image>", "<pad>"))
    text_config = _llama_config(tokenizer.get_vocab_size()) | dict(text or {})
    vision_config = _clip_config() | dict(vision or {})
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": tokenizer.token_to_id("<image>"),
        "image_seq_length": (vision_config["image_size"] // vision_config["patch_size"]) ** 2,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": text_config,
        "vision_config": vision_config,
        "tie_word_embeddings": text_config["tie_word_embeddings"],
    } | dict(root or {})
    prefixes = {
        "old": ("language_model.model.", "language_model.lm_head.", "vision_tower.vision_model.", ""),
        "new": ("model.language_model.", "lm_head.", "model.vision_tower.vision_model.", "model."),
    }
    model, head, tower, projector = prefixes[generation]
    shapes = _llama_shapes(text_config, model, head) | _vision_shapes(vision_config, tower)
    hidden, width = text_config["hidden_size"], vision_config["hidden_size"]
    shapes |= _linear(f"{projector}multi_modal_projector.linear_1", hidden, width)
    shapes |= _linear(f"{projector}multi_modal_projector.linear_2", hidden, hidden)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / "config.json", config)
    _write_json(path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": True,
        "do_resize": True,
        "crop_size": {"height": vision_config["image_size"], "width": vision_config["image_size"]},
        "size": {"shortest_edge": vision_config["image_size"]},
        "resample": 3,
        "rescale_factor": 1 / 255,
    } | CLIP_MEAN_STD
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": vision_config["patch_size"],
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
    }
    if generation == "old":
        _write_json(path / "preprocessor_config.json", image_processor)
        _write_json(path / "processor_config.json", processor)
    else:
        _write_json(path / "processor_config.json", processor | {"image_processor": image_processor})
    _write_weights(path, shapes, seed, dtype, num_shards)
    write_tokenizer(path, tokenizer, bos="<s>", eos="</s>", unk="<unk>")
    if chat_template is not None and generation == "old":
        _write_json(path / "chat_template.json", {"chat_template": chat_template})
    elif chat_template is not None:
        (path / "chat_template.jinja").write_text(chat_template)
    return path


# ---- configs ----


def _llama_config(vocab_size: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
        "transformers_version": "4.36.2",
    }


def _qwen2_config(vocab_size: int) -> dict[str, Any]:
    return _llama_config(vocab_size) | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "transformers_version": "4.46.0",
    }


def _siglip_config(image_size: int) -> dict[str, Any]:
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": 14,
        "num_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }


def _clip_config() -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
        "num_channels": 3,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 32,
    }


def _vila_config(version: str, mm_hidden: int, mode: str) -> dict[str, Any]:
    return {
        "_name_or_path": "./vlm",  # stale, as in the released checkpoints
        "resume_path": "runs/train/stage3",
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "transformers_version": version,
        "hidden_size": 64,
        "mm_hidden_size": mm_hidden,
        "image_aspect_ratio": mode,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "cls_patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "model_dtype": "torch.bfloat16",
        "num_video_frames": 8,
        "vision_resolution": -1,
        "interpolate_mode": "linear",
        "s2": False,
        "model_max_length": 1024,
    }


# ---- tensors: name -> shape ----


def _linear(name: str, out_size: int, in_size: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (out_size, in_size)}
    return shapes | ({f"{name}.bias": (out_size,)} if bias else {})


def _norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _llama_shapes(
    config: Mapping[str, Any], prefix: str = "model.", head: str = "lm_head."
) -> dict[str, tuple[int, ...]]:
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv = config["num_key_value_heads"] * head_dim
    bias = config["model_type"] == "qwen2"
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (config["vocab_size"], hidden)}
    for index in range(config["num_hidden_layers"]):
        layer = f"{prefix}layers.{index}"
        shapes |= _linear(f"{layer}.self_attn.q_proj", heads * head_dim, hidden, bias)
        shapes |= _linear(f"{layer}.self_attn.k_proj", kv, hidden, bias)
        shapes |= _linear(f"{layer}.self_attn.v_proj", kv, hidden, bias)
        shapes |= _linear(f"{layer}.self_attn.o_proj", hidden, heads * head_dim, bias=False)
        shapes |= _linear(f"{layer}.mlp.gate_proj", inner, hidden, bias=False)
        shapes |= _linear(f"{layer}.mlp.up_proj", inner, hidden, bias=False)
        shapes |= _linear(f"{layer}.mlp.down_proj", hidden, inner, bias=False)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes[f"{prefix}norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes[f"{head}weight"] = (config["vocab_size"], hidden)
    return shapes


def _vision_shapes(config: Mapping[str, Any], prefix: str = "vision_model.") -> dict[str, tuple[int, ...]]:
    """A whole SiglipVisionModel or CLIPVisionModel, pooling head and last layers included, as they are released."""
    hidden, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    clip = config["model_type"] == "clip_vision_model"
    positions = (config["image_size"] // patch) ** 2 + clip
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        f"{prefix}embeddings.position_embedding.weight": (positions, hidden),
    }
    if clip:
        shapes[f"{prefix}embeddings.class_embedding"] = (hidden,)
        shapes |= _norm(f"{prefix}pre_layrnorm", hidden)
    else:
        shapes[f"{prefix}embeddings.patch_embedding.bias"] = (hidden,)
    for index in range(config["num_hidden_layers"]):
        layer = f"{prefix}encoder.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{part}", hidden, hidden)
        shapes |= _linear(f"{layer}.mlp.fc1", inner, hidden) | _linear(f"{layer}.mlp.fc2", hidden, inner)
        shapes |= _norm(f"{layer}.layer_norm1", hidden) | _norm(f"{layer}.layer_norm2", hidden)
    shapes |= _norm(f"{prefix}post_layernorm", hidden)
    if not clip:
        shapes[f"{prefix}head.probe"] = (1, 1, hidden)
        shapes[f"{prefix}head.attention.in_proj_weight"] = (3 * hidden, hidden)
        shapes[f"{prefix}head.attention.in_proj_bias"] = (3 * hidden,)
        shapes |= _linear(f"{prefix}head.attention.out_proj", hidden, hidden)
        shapes |= _norm(f"{prefix}head.layernorm", hidden)
        shapes |= _linear(f"{prefix}head.mlp.fc1", inner, hidden) | _linear(
            f"{prefix}head.mlp.fc2", hidden, inner
        )
    return shapes


def _projector_shapes(kind: str, mm_hidden: int, hidden: int) -> dict[str, tuple[int, ...]]:
    if kind == "linear":
        return _linear("layers", hidden, mm_hidden)
    if kind.startswith("mlp") and kind.endswith("x_gelu"):
        shapes = _linear("layers.0", hidden, mm_hidden)
        for index in range(1, int(kind[3:-6])):
            shapes |= _linear(f"layers.{2 * index}", hidden, hidden)
        return shapes
    if kind in ("mlp_downsample", "mlp_downsample_2x2_fix"):
        shapes = _norm("layers.1", 4 * mm_hidden) | _linear("layers.2", hidden, 4 * mm_hidden)
        return shapes | _linear("layers.4", hidden, hidden)
    if kind == "mlp_downsample_3x3_fix":
        shapes = _norm("layers.1", 9 * mm_hidden) | _linear("layers.2", 3 * mm_hidden, 9 * mm_hidden)
        shapes |= _norm("layers.4", 3 * mm_hidden) | _linear("layers.5", hidden, 3 * mm_hidden)
        return shapes | _linear("layers.7", hidden, hidden)
    raise ValueError(f"no such projector here: {kind}")


# ---- files ----


def _write_vila(
    path: Path,
    root: dict[str, Any],
    llm: dict[str, Any],
    vision: dict[str, Any],
    projector: str,
    seed: int,
    dtype: torch.dtype,
    num_shards: int,
) -> None:
    if path.exists():
        shutil.rmtree(path)
    projector_config = {
        "architectures": ["MultimodalProjector"],
        "model_type": "v2l_projector",
        "mm_projector_type": projector,
        "transformers_version": root["transformers_version"],
    }
    root = root | {"hidden_size": llm["hidden_size"]}
    stale = {"_name_or_path": "runs/train/stage3/llm"}
    parts = {
        "llm": (llm, _llama_shapes(llm), num_shards),
        "vision_tower": (vision, _vision_shapes(vision), 1),
        "mm_projector": (
            projector_config,
            _projector_shapes(projector, root["mm_hidden_size"], llm["hidden_size"]),
            1,
        ),
    }
    for offset, (name, (config, shapes, shards)) in enumerate(parts.items()):
        folder = path / name
        folder.mkdir(parents=True)
        _write_json(folder / "config.json", config | stale)
        _write_weights(folder, shapes, seed + offset, dtype, shards)
        root[f"{name}_cfg"] = config | stale
    _write_json(path / "config.json", root)
    _write_json(path / "llm" / "generation_config.json", {"eos_token_id": llm["eos_token_id"]})
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    clip = vision["model_type"] == "clip_vision_model"
    processor = {
        "do_resize": True,
        "do_normalize": True,
        "resample": 3,
        "size": size,
        "rescale_factor": 1 / 255,
    }
    processor |= {"image_processor_type": "SiglipImageProcessor"} | SIGLIP_MEAN_STD
    if clip:
        processor |= {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "crop_size": size}
        processor |= {"size": {"shortest_edge": vision["image_size"]}} | CLIP_MEAN_STD
    _write_json(path / "vision_tower" / "preprocessor_config.json", processor)


def _write_weights(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype, num_shards: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _random(name, shape, generator).to(dtype) for name, shape in shapes.items()}
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(num_shards):
        names = list(tensors)[shard::num_shards]
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Wide enough that layers matter and greedy choices are no near ties; norms around one."""
    values = torch.randn(shape, generator=generator)
    is_norm = "norm" in name and name.endswith("weight")
    if is_norm or (len(shape) == 1 and name.endswith(("layers.1.weight", "layers.4.weight"))):
        return 1 + 0.1 * values
    return 0.15 * values if len(shape) > 1 else 0.1 * values


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2))
