"""Hugging Face config.json of language models and vision towers, to our configs.

A key that a file leaves out takes the default that transformers gives it. A setting that we do not implement is an
error by name: ignored, it would give wrong captions.
"""

from collections.abc import Mapping
from typing import Any

from vila2.errors import CheckpointError
from vila2.model.decoder import DecoderConfig
from vila2.model.vision import VisionConfig

Json = Mapping[str, Any]

_LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
# model_type -> what transformers assumes where the file is silent
DECODER_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_DEFAULTS,
    "qwen2": _LLAMA_DEFAULTS
    | {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
}


_DECODER_LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
    "num_hidden_layers": 1000,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "max_position_embeddings": 2**24,
}
_VISION_LIMITS = {
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
    "num_hidden_layers": 1000,
    "num_attention_heads": 2**16,
    "image_size": 2**14,
    "patch_size": 2**14,
}


def refuse_quantised(config: Json, where: str) -> None:
    """CheckpointError if `config` says that its weights are quantised."""
    quantisation = config.get("quantization_config")
    if quantisation:
        method = (
            quantisation.get("quant_method", "unknown") if isinstance(quantisation, Mapping) else quantisation
        )
        raise CheckpointError(
            f"{where}: the weights are quantised ({method}), which is not supported: use the bf16 or fp16 release"
        )


def decoder_config(config: Json, where: str) -> DecoderConfig:
    """The decoder of a Llama or Qwen2 config.json; `where` names the file in errors."""
    refuse_quantised(config, where)
    kind = str(config.get("model_type", "llama"))
    if kind not in DECODER_DEFAULTS:
        known = ", ".join(sorted(DECODER_DEFAULTS))
        raise CheckpointError(f"{where}: the language model {kind!r} is not supported; known are {known}")
    values = DECODER_DEFAULTS[kind] | {key: value for key, value in config.items() if value is not None}
    llama_bias = kind == "llama" and bool(values.get("attention_bias", False))
    try:
        _refuse_variants(values)
        _refuse_implausible(values, _DECODER_LIMITS)
        theta, scaling = _rope(values)
        num_heads = int(values["num_attention_heads"])
        return DecoderConfig(
            vocab_size=int(values["vocab_size"]),
            hidden_size=int(values["hidden_size"]),
            intermediate_size=int(values["intermediate_size"]),
            num_layers=int(values["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=int(values.get("num_key_value_heads", num_heads)),
            head_dim=int(values.get("head_dim", int(values["hidden_size"]) // num_heads)),
            max_positions=int(values["max_position_embeddings"]),
            rms_norm_eps=float(values["rms_norm_eps"]),
            rope_theta=theta,
            rope_scaling=scaling,
            qkv_bias=kind == "qwen2" or llama_bias,
            o_bias=llama_bias,
            mlp_bias=kind == "llama" and bool(values.get("mlp_bias", False)),
            tie_embeddings=bool(values["tie_word_embeddings"]),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def _refuse_variants(values: Json) -> None:
    if values["hidden_act"] != "silu":
        raise ValueError(f"hidden_act {values['hidden_act']!r} is not supported; known is silu")
    sliding = values.get("use_sliding_window") and values.get("sliding_window")
    if sliding and int(sliding) < int(values["max_position_embeddings"]):
        raise ValueError("sliding window attention is not supported")
    if float(values.get("partial_rotary_factor", 1)) != 1:
        raise ValueError("partial_rotary_factor is not supported")


def _refuse_implausible(values: Json, limits: Mapping[str, int]) -> None:
    """ValueError for a size that no model has: what follows makes tables and lists of these sizes."""
    for key, limit in limits.items():
        if key in values and not 1 <= int(values[key]) <= limit:
            raise ValueError(f"{key} must lie in [1, {limit}], got {values[key]}")


def _rope(values: Json) -> tuple[float, dict[str, Any] | None]:
    """`(theta, scaling)` from transformers 5's `rope_parameters`, or from `rope_theta` and `rope_scaling`."""
    parameters = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = float(parameters.pop("rope_theta", values["rope_theta"]))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise ValueError(f"rope scaling {kind!r} is not supported; known are default, linear, llama3")
    if kind == "llama3" and "original_max_position_embeddings" not in parameters:
        parameters["original_max_position_embeddings"] = values["max_position_embeddings"]
    return theta, parameters


def decoder_json(config: DecoderConfig) -> dict[str, Any]:
    """A config.json that `decoder_config` and transformers read back as `config`."""
    qwen = config.qkv_bias and not config.o_bias
    return {
        "architectures": ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"],
        "model_type": "qwen2" if qwen else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": dict(config.rope_scaling) if config.rope_scaling else None,
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
    }


# kind of tower -> what transformers assumes where its config.json is silent
VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "siglip": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    "clip": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
}


def vision_config(config: Json, select_layer: Any, select_feature: Any, where: str) -> VisionConfig:
    """The tower of a SigLIP or CLIP config.json, with the layer and the tokens that the projector reads."""
    refuse_quantised(config, where)
    config = config.get("vision_config") or config  # a whole SigLIP or CLIP, of which this is one half
    kind = _vision_kind(config, where)
    values = VISION_DEFAULTS[kind] | {key: value for key, value in config.items() if value is not None}
    if not isinstance(select_layer, int):
        raise CheckpointError(
            f"{where}: features of several vision layers ({select_layer}) are not supported"
        )
    try:
        _refuse_implausible(values, _VISION_LIMITS)
        return VisionConfig(
            kind=kind,
            image_size=int(values["image_size"]),
            patch_size=int(values["patch_size"]),
            width=int(values["hidden_size"]),
            inner_width=int(values["intermediate_size"]),
            num_layers=int(values["num_hidden_layers"]),
            num_heads=int(values["num_attention_heads"]),
            activation=str(values["hidden_act"]),
            norm_eps=float(values["layer_norm_eps"]),
            select_layer=select_layer,
            select_feature=str(select_feature),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def _vision_kind(config: Json, where: str) -> str:
    """siglip or clip, by the architecture as VILA does, else by model_type."""
    names = [*(config.get("architectures") or []), config.get("model_type") or ""]
    for name in map(str, names):
        for kind in VISION_DEFAULTS:
            if name.lower().startswith(kind) and not name.lower().startswith("siglip2"):
                return kind
    known = ", ".join(VISION_DEFAULTS)
    raise CheckpointError(f"{where}: the vision tower {str(names[0])!r} is not supported; known are {known}")


def vision_json(config: VisionConfig) -> dict[str, Any]:
    """A config.json of the layers that `config` runs; their last output is what it selects."""
    name = {"siglip": "Siglip", "clip": "CLIP"}[config.kind]
    return {
        "architectures": [f"{name}VisionModel"],
        "model_type": f"{config.kind}_vision_model",
        "hidden_size": config.width,
        "intermediate_size": config.inner_width,
        "num_hidden_layers": config.num_layers_run,
        "num_attention_heads": config.num_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_eps,
    }
