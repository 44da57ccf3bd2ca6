"""One table between the weights of a checkpoint and ours, and the check that they fit.

Three parts ("llm", "vision_tower", "mm_projector") with their plain Hugging Face names, whatever the layout calls
them, on one side; the names of `VisionLanguageModel.state_dict()` on the other. A weight of ours may be several of
theirs, one after another (q, k, v; gate, up).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vila2.errors import CheckpointError
from vila2.model.decoder import DecoderConfig
from vila2.model.projector import Projector, ProjectorConfig
from vila2.model.vision import HF_RENAMES, VisionConfig, hf_shapes, is_unused
from vila2.model.vlm import ModelConfig
from vila2.model.weight_files import DTYPE_BYTES, TensorEntry, some

Shape = tuple[int, ...]
Name = tuple[str, str]  # (part, plain Hugging Face name within it)
PARTS = ("llm", "vision_tower", "mm_projector")

_QUANTISED_SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx", ".SCB", ".weight_scale", ".weight_packed")


@dataclass(frozen=True, slots=True)
class Found:
    """A tensor of a checkpoint: its name in the file, and what the header says of it."""

    name: str
    entry: TensorEntry


def decoder_table(config: DecoderConfig) -> dict[str, tuple[str, Shape]]:
    """Hugging Face name -> (our name, shape), in the order in which fused weights are joined."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    table: dict[str, tuple[str, Shape]] = {
        "model.embed_tokens.weight": ("embed_tokens.weight", (vocab, hidden)),
        "model.norm.weight": ("norm.weight", (hidden,)),
    }
    if not config.tie_embeddings:
        table["lm_head.weight"] = ("lm_head.weight", (vocab, hidden))
    products = (
        ("self_attn.q_proj", "qkv", (config.q_size, hidden), config.qkv_bias),
        ("self_attn.k_proj", "qkv", (config.kv_size, hidden), config.qkv_bias),
        ("self_attn.v_proj", "qkv", (config.kv_size, hidden), config.qkv_bias),
        ("self_attn.o_proj", "o", (hidden, config.q_size), config.o_bias),
        ("mlp.gate_proj", "gate_up", (inner, hidden), config.mlp_bias),
        ("mlp.up_proj", "gate_up", (inner, hidden), config.mlp_bias),
        ("mlp.down_proj", "down", (hidden, inner), config.mlp_bias),
    )
    for index in range(config.num_layers):
        theirs, ours = f"model.layers.{index}", f"layers.{index}"
        table[f"{theirs}.input_layernorm.weight"] = (f"{ours}.attn_norm.weight", (hidden,))
        table[f"{theirs}.post_attention_layernorm.weight"] = (f"{ours}.mlp_norm.weight", (hidden,))
        for name, own, shape, bias in products:
            table[f"{theirs}.{name}.weight"] = (f"{ours}.{own}.weight", shape)
            if bias:
                table[f"{theirs}.{name}.bias"] = (f"{ours}.{own}.bias", shape[:1])
    return table


def vision_table(config: VisionConfig) -> dict[str, tuple[str, Shape]]:
    """As `decoder_table`, for the layers that the selected features need."""
    table = {}
    for name, shape in hf_shapes(config).items():
        own = name
        for theirs, ours in HF_RENAMES:
            own = own.replace(theirs, ours)
        for part in ("q_proj", "k_proj", "v_proj"):
            own = own.replace(f".{part}.", ".qkv.")
        table[name] = (own, shape)
    return table


def plain_vision_name(name: str) -> str:
    """A tower's weight without the prefixes that some generations of files have."""
    return name.removeprefix("vision_tower.").removeprefix("vision_model.")


def projector_table(config: ProjectorConfig) -> dict[str, tuple[str, Shape]]:
    """As `decoder_table`; VILA's names are ours."""
    with torch.device("meta"):
        state = Projector(config).state_dict()
    return {name: (name, tuple(weight.shape)) for name, weight in state.items()}


def weight_table(config: ModelConfig) -> dict[Name, tuple[str, Shape]]:
    """(part, Hugging Face name) -> (name in `VisionLanguageModel`, shape in the file)."""
    parts = (
        ("llm", "decoder", decoder_table(config.decoder)),
        ("vision_tower", "vision", vision_table(config.vision)),
        ("mm_projector", "projector", projector_table(config.projector)),
    )
    return {
        (part, name): (f"{own}.{our_name}", shape)
        for part, own, table in parts
        for name, (our_name, shape) in table.items()
    }


def match_weights(
    found: Mapping[Name, Found], config: ModelConfig, where: str
) -> dict[str, tuple[Found, ...]]:
    """Our weights' names -> the tensors that make them up, in order.

    CheckpointError, from headers alone, names weights that are quantised, missing, unknown or of another shape.
    """
    _refuse_quantised(found.values(), where)
    table = weight_table(config)
    missing = [_spell(name) for name in table if name not in found]
    if missing:
        raise CheckpointError(f"{where}: {len(missing)} weights are missing: {some(missing)}")
    unknown = [
        weight.name for name, weight in found.items() if name not in table and not _unread(name, config)
    ]
    if unknown:
        raise CheckpointError(f"{where}: {len(unknown)} weights are unexpected: {some(unknown)}")
    wrong = [
        f"{found[name].name} is {list(found[name].entry.shape)} instead of {list(shape)}"
        for name, (_, shape) in table.items()
        if found[name].entry.shape != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{where}: {len(wrong)} weights have a shape that the config contradicts: {some(wrong)}"
        )
    sources: dict[str, tuple[Found, ...]] = {}
    for name, (own, _) in table.items():
        sources[own] = (*sources.get(own, ()), found[name])
    return sources


def _spell(name: Name) -> str:
    return f"{name[0]}: {name[1]}"


def _refuse_quantised(weights: Iterable[Found], where: str) -> None:
    packed = [
        weight.name
        for weight in weights
        if weight.name.endswith(_QUANTISED_SUFFIXES)
        or (weight.entry.dtype not in DTYPE_BYTES and not weight.name.endswith("position_ids"))
    ]
    if packed:
        raise CheckpointError(
            f"{where}: the weights are quantised ({some(packed, 2)}), which is not supported: "
            "use the bf16 or fp16 release"
        )


def _unread(name: Name, config: ModelConfig) -> bool:
    """Does this weight belong to such a model, although we do not read it?"""
    part, plain = name
    if part == "llm":
        tied_copy = plain == "lm_head.weight" and config.decoder.tie_embeddings
        return tied_copy or plain.endswith("rotary_emb.inv_freq")  # a buffer that old releases saved
    return part == "vision_tower" and is_unused(plain, config.vision)


def split_weights(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, dict[str, Tensor]]:
    """The inverse of loading: our state dict as part -> Hugging Face name -> tensor, in the files' shapes."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    next_row: dict[str, int] = {}
    for (part, name), (own, shape) in weight_table(config).items():
        start = next_row.get(own, 0)
        next_row[own] = start + shape[0]
        parts[part][name] = state[own].detach()[start : start + shape[0]].reshape(shape).contiguous()
    return parts
