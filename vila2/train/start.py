"""The model that a stage starts from: a checkpoint, or parts put together, each from a folder of its own or fresh."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vila2.errors import CheckpointError
from vila2.model.checkpoint import fill_weights, inspect_checkpoint, load_checkpoint
from vila2.model.decoder import DecoderConfig
from vila2.model.digest import checkpoint_digest
from vila2.model.hf_config import decoder_config, vision_config
from vila2.model.image_config import ImageSettings, read_image_settings
from vila2.model.layout import small_files
from vila2.model.llava_format import is_llava
from vila2.model.projector import ProjectorConfig
from vila2.model.prompt import turn_end_ids
from vila2.model.tokenizer import Tokenizer, load_tokenizer
from vila2.model.vila_format import is_vila
from vila2.model.vision import VisionConfig, strip_hf_prefix
from vila2.model.vlm import ModelConfig, VisionLanguageModel
from vila2.model.weight_files import find_weight_files, read_json, some
from vila2.model.weight_map import Found, Shape, decoder_table, vision_table
from vila2.train.mixture import derived_seed
from vila2.train.recipe import DecoderPart, ModelSettings, ProjectorPart, Recipe, VisionPart

Sources = dict[str, tuple[Found, ...]]
_RESIDUAL_OUTPUTS = (".o.", ".down.", ".out.", ".fc2.")


@dataclass(frozen=True, slots=True)
class Start:
    """A model in memory, every weight of it frozen, and what its checkpoint needs beside the weights."""

    model: VisionLanguageModel
    tokenizer: Tokenizer
    tokenizer_folder: Path
    config: ModelConfig


@dataclass(frozen=True, slots=True)
class _PartFound:
    """A part of a model on disk. `sources`: our weights' names -> tensors; none of a fresh part."""

    config: Any
    sources: Sources
    images: ImageSettings | None = None
    tokenizer_folder: Path | None = None


def load_base(recipe: Recipe, dtype: torch.dtype, device: str | torch.device) -> Start:
    """What the recipe starts from. CheckpointError or UsageError says why it cannot be used."""
    if recipe.base is not None:
        return load_trained(Path(recipe.base), dtype, device)
    assert recipe.model is not None
    return assemble(recipe.model, recipe.seed, dtype, device)


def load_trained(path: Path, dtype: torch.dtype, device: str | torch.device) -> Start:
    """A whole checkpoint."""
    loaded = load_checkpoint(path, dtype=dtype, device=device)
    if not loaded.config.projector.bias:
        raise CheckpointError(f"{path}: the projector has no bias, which the VILA layout cannot hold")
    return Start(
        loaded.model, loaded.tokenizer, inspect_checkpoint(path).layout.tokenizer_folder, loaded.config
    )


def base_digests(recipe: Recipe) -> dict[str, str]:
    """What names the contents that the recipe starts from, to notice when they change under a run."""
    if recipe.base is not None:
        return {"base": inspect_checkpoint(recipe.base).digest}
    assert recipe.model is not None
    folders = {
        part: getattr(recipe.model, part).weights
        for part in ("vision", "projector", "decoder")
        if getattr(recipe.model, part).weights is not None
    }
    return {part: _folder_digest(Path(folder)) for part, folder in folders.items()}


def assemble(settings: ModelSettings, seed: int, dtype: torch.dtype, device: str | torch.device) -> Start:
    """Put the parts together; fresh ones follow from `seed` alone."""
    vision = _vision(settings.vision)
    decoder = _decoder(settings.decoder, settings.tokenizer)
    folder = Path(settings.tokenizer) if settings.tokenizer else decoder.tokenizer_folder
    assert folder is not None
    tokenizer = load_tokenizer(folder)
    config = _model_config(settings, vision, decoder)
    if tokenizer.text_vocab_size > config.decoder.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.text_vocab_size} tokens of text, the decoder embeddings for "
            f"{config.decoder.vocab_size}"
        )
    if config.token_newline:
        tokenizer.add_image_token()
    tokenizer.add_eos_ids(turn_end_ids(tokenizer))
    projector = _projector(settings.projector, config.projector)
    with torch.device("meta"):
        model = VisionLanguageModel.from_config(config)
    model.to(dtype).to_empty(device=device)
    for name, part in (("vision", vision), ("projector", projector), ("decoder", decoder)):
        if part.sources:
            fill_weights(model, part.sources)
        else:
            layers = config.vision.num_layers_run if name == "vision" else config.decoder.num_layers
            fresh_weights(getattr(model, name), derived_seed(seed, name), layers)
    model.requires_grad_(False)
    model.eval()
    return Start(model, tokenizer, folder, config)


@torch.no_grad()
def fresh_weights(module: nn.Module, seed: int, num_layers: int) -> None:
    """Draw every weight of a part: matrices keep the scale of their input, what ends a residual branch is smaller."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    for name, parameter in module.named_parameters():
        parameter.copy_(_drawn(name, parameter, generator, num_layers))


def _drawn(name: str, parameter: Tensor, generator: torch.Generator, num_layers: int) -> Tensor:
    shape = tuple(parameter.shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1 and name.endswith("weight"):  # of a norm
        return torch.ones(shape)
    values = torch.randn(shape, generator=generator)
    if name.startswith(("embed_tokens", "lm_head", "position_embedding", "class_embedding")):
        return values * 0.02
    scale = 1 / math.sqrt(shape[-1])
    if any(part in f".{name}" for part in _RESIDUAL_OUTPUTS):
        scale /= math.sqrt(2 * num_layers)
    return values * scale


def _vision(part: VisionPart) -> _PartFound:
    if part.weights is None:
        inner = part.inner_width or 4 * part.width
        gelu, eps = ("quick_gelu", 1e-5) if part.kind == "clip" else ("gelu_pytorch_tanh", 1e-6)
        last = -1 if part.select_layer is None else part.select_layer
        config = VisionConfig(
            kind=part.kind,
            image_size=part.image_size,
            patch_size=part.patch_size,
            width=part.width,
            inner_width=inner,
            num_layers=part.num_layers,
            num_heads=part.num_heads,
            activation=gelu,
            norm_eps=eps,
            select_layer=last,
            select_feature="patch" if part.kind == "clip" else "cls_patch",
        )
        return _PartFound(config, {})
    path = Path(part.weights)
    if _is_whole(path):
        layout = inspect_checkpoint(path).layout
        if part.select_layer is not None:
            raise CheckpointError(f"{path}: the layer of a VILA checkpoint's tower is chosen already")
        return _PartFound(layout.config.vision, _only(layout.sources, "vision"), _images_of(layout.config))
    config_file = path / "config.json"
    json = read_json(config_file)
    clip = "clip" in str((json.get("architectures") or [json.get("model_type")])[0]).lower()
    select = -2 if part.select_layer is None else part.select_layer
    config = vision_config(json, select, "patch" if clip else "cls_patch", str(config_file))
    files = find_weight_files(path, path)
    found = {strip_hf_prefix(name): Found(name, entry) for name, entry in files.tensors.items()}
    return _PartFound(
        config, _matched("vision", vision_table(config), found, path), read_image_settings(path)
    )


def _decoder(part: DecoderPart, tokenizer: str | None) -> _PartFound:
    if part.weights is None:
        assert tokenizer is not None
        vocabulary = part.vocab_size or len(load_tokenizer(tokenizer))
        inner = part.intermediate_size or 32 * math.ceil(part.hidden_size * 8 / 3 / 32)
        if part.hidden_size % part.num_heads:
            raise CheckpointError(
                f"model.decoder: {part.num_heads} heads do not divide a width of {part.hidden_size}"
            )
        return _PartFound(
            DecoderConfig(
                vocab_size=vocabulary,
                hidden_size=part.hidden_size,
                intermediate_size=inner,
                num_layers=part.num_layers,
                num_heads=part.num_heads,
                num_kv_heads=part.num_kv_heads or part.num_heads,
                head_dim=part.hidden_size // part.num_heads,
                max_positions=part.max_positions,
                rope_theta=part.rope_theta,
                tie_embeddings=part.tie_embeddings,
            ),
            {},
        )
    path = Path(part.weights)
    if _is_whole(path):
        layout = inspect_checkpoint(path).layout
        return _PartFound(
            layout.config.decoder,
            _only(layout.sources, "decoder"),
            tokenizer_folder=layout.tokenizer_folder,
        )
    config = decoder_config(read_json(path / "config.json"), str(path / "config.json"))
    files = find_weight_files(path, path)
    found = {name: Found(name, entry) for name, entry in files.tensors.items()}
    return _PartFound(config, _matched("decoder", decoder_table(config), found, path), tokenizer_folder=path)


def _projector(part: ProjectorPart, wanted: ProjectorConfig) -> _PartFound:
    if part.weights is None:
        return _PartFound(wanted, {})
    layout = inspect_checkpoint(part.weights).layout
    if layout.config.projector != wanted:
        raise CheckpointError(
            f"{part.weights}: its projector is {layout.config.projector}, the model needs {wanted}"
        )
    return _PartFound(wanted, _only(layout.sources, "projector"))


def _model_config(settings: ModelSettings, vision: _PartFound, decoder: _PartFound) -> ModelConfig:
    kind = settings.projector.kind
    if settings.projector.weights is not None:
        kind = inspect_checkpoint(settings.projector.weights).config.projector.kind
    nvila = settings.generation == "nvila"
    images: dict[str, Any] = {}
    if vision.images is not None:
        images = {"image_mean": vision.images.mean, "image_std": vision.images.std}
    try:
        return ModelConfig(
            vision=vision.config,
            projector=ProjectorConfig(
                kind=kind,
                input_width=vision.config.width,
                hidden_size=decoder.config.hidden_size,
                column_major=kind == "mlp_downsample" and not nvila,
            ),
            decoder=decoder.config,
            image_mode=settings.image_mode,
            image_size=vision.config.image_size,
            token_newline=nvila,
            template=settings.template,
            **images,
        )
    except ValueError as error:
        raise CheckpointError(f"the parts of the model do not fit: {error}") from None


def _is_whole(path: Path) -> bool:
    """Is this a VILA or LLaVA checkpoint, rather than one part?"""
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder: a part of a model lies in one")
    file = path / "config.json"
    if not file.is_file():
        return (path / "model" / "config.json").is_file()
    config = read_json(file)
    return is_llava(config) or is_vila(path, config)


def _only(sources: Mapping[str, tuple[Found, ...]], part: str) -> Sources:
    return {name: found for name, found in sources.items() if name.startswith(f"{part}.")}


def _images_of(config: ModelConfig) -> ImageSettings:
    return ImageSettings(
        config.image_size,
        config.shortest_edge,
        config.interpolation,
        config.image_mean,
        config.image_std,
        pads=False,
    )


def _matched(
    part: str, table: Mapping[str, tuple[str, Shape]], found: Mapping[str, Found], where: Path
) -> Sources:
    """Our names -> the tensors of a folder that holds one part. CheckpointError names what is missing or misshapen."""
    missing = [name for name in table if name not in found]
    if missing:
        raise CheckpointError(f"{where}: {len(missing)} weights are missing: {some(missing)}")
    wrong = [name for name, (_, shape) in table.items() if found[name].entry.shape != shape]
    if wrong:
        raise CheckpointError(f"{where}: weights have a shape that the config contradicts: {some(wrong)}")
    sources: Sources = {}
    for name, (own, _) in table.items():
        sources[f"{part}.{own}"] = (*sources.get(f"{part}.{own}", ()), found[name])
    return sources


def _folder_digest(path: Path) -> str:
    if _is_whole(path):
        return inspect_checkpoint(path).digest
    files = find_weight_files(path, path).files
    return checkpoint_digest(path, (*small_files(path), *files), files)
