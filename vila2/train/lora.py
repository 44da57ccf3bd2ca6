"""Low-rank adapters by peft: added to a model's linear layers in place, merged into its weights at the end."""

import json
import warnings
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from vila2.data.files import atomic_write, make_folder, replacing
from vila2.errors import UsageError
from vila2.model.vlm import VisionLanguageModel
from vila2.train.recipe import LoraSettings

_NAME = "default"  # peft's own name for a first adapter
_A, _B, _BASE = f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight", ".base_layer."
_READS_OR_LOOKS_UP = ("lm_head", "patch_embedding")


def adapter_targets(model: VisionLanguageModel, settings: LoraSettings) -> list[str]:
    """The linear layers that get an adapter: those that mix, in the chosen parts."""
    return [
        f"{part}.{name}"
        for part in settings.parts
        for name, module in getattr(model, part).named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(_READS_OR_LOOKS_UP)
    ]


def add_adapters(model: VisionLanguageModel, settings: LoraSettings) -> None:
    """Put an adapter that changes nothing yet on each target; only adapters of these parts then learn."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UsageError("lora needs the package peft: pip install 'vila2-fast[train]'") from None
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    targets = adapter_targets(model, settings)
    dtypes = {target: model.get_parameter(f"{target}.weight").dtype for target in targets}
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # peft warns of what it cannot know of a model that is not transformers'
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        adapter = _target_of(name)
        parameter.requires_grad_(adapter is not None or name.replace(_BASE, ".") not in frozen)
        if adapter is not None:
            parameter.data = parameter.data.to(dtypes[adapter])


def _target_of(name: str) -> str | None:
    for suffix in (_A, _B):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return None


def merged(state: dict[str, Tensor], settings: LoraSettings) -> dict[str, Tensor]:
    """A whole state dict with adapters, to one without: W + alpha / rank * B A, summed in float32."""
    plain = {name.replace(_BASE, "."): tensor for name, tensor in state.items() if _target_of(name) is None}
    for name, down in adapters_of(state).items():
        if not name.endswith(_A):
            continue
        target = f"{name.removesuffix(_A)}.weight"
        up = state[name.removesuffix(_A) + _B]
        change = up.float() @ down.float() * (settings.alpha / settings.rank)
        plain[target] = (plain[target].float() + change).to(plain[target].dtype)
    return plain


def adapters_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapters' tensors alone."""
    return {name: tensor for name, tensor in state.items() if _target_of(name) is not None}


def save_adapter(folder: Path, state: dict[str, Tensor], settings: LoraSettings) -> None:
    """Keep the adapters as peft does: adapter_config.json and adapter_model.safetensors, under our modules' names."""
    make_folder(folder)
    own = adapters_of(state)
    targets = sorted({target for name in own if (target := _target_of(name)) is not None})
    config = {
        "peft_type": "LORA",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": targets,
        "bias": "none",
        "inference_mode": True,
    }
    with replacing(folder / "adapter_model.safetensors") as temporary:
        renamed = {f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": t for name, t in own.items()}
        save_file({name: tensor.contiguous() for name, tensor in renamed.items()}, temporary)
    atomic_write(folder / "adapter_config.json", json.dumps(config, indent=2).encode())
