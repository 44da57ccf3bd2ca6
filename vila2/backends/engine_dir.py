"""An engine directory: a checkpoint packed for one kind of device and precision, ready to be mapped and run.

    engine.json           what it was made from, for what, with which limits, and how good it is
    weights.safetensors   the packed weights (see vila2.model.packed)
    tokenizer/            the checkpoint's tokenizer files

Nothing else is needed to run it; the checkpoint may be gone.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vila2 import __version__
from vila2.backends.compute import ComputePlan, wants_narrow
from vila2.errors import CheckpointError, UsageError
from vila2.model.checkpoint import LoadedCheckpoint, inspect_checkpoint, open_tokenizer
from vila2.model.decoder import DecoderConfig
from vila2.model.packed import load_packed
from vila2.model.projector import ProjectorConfig
from vila2.model.vision import VisionConfig
from vila2.model.vlm import ModelConfig
from vila2.ops.linear import panel_layout

BACKEND = "native"
FORMAT = 2  # of the directory; another number is another layout of files or weights
ENGINE_FILE = "engine.json"
WEIGHTS_FILE = "weights.safetensors"
TOKENIZER_FOLDER = "tokenizer"
BYTE_LAYOUT = "bytes-panels-16x4"  # the same on every instruction set
LOW_BIT_LAYOUTS = {"fp8": "e4m3-columns", "int4": "nibbles-groups-128"}


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """What engine.json says. `layout` names how the weights lie; `quality` is None where it was not measured."""

    name: str
    checkpoint: str  # where it was built from
    digest: str  # of the checkpoint's contents
    device: str
    precision: str
    layout: str
    weight_bytes: int
    samples: int  # that int8 weights were rounded for, at most
    config: ModelConfig
    limits: Mapping[str, int]
    quality: Mapping[str, Any] | None
    versions: Mapping[str, str]
    is_narrow: bool | None = (
        None  # of int8 weights (see vila2.ops.quant); None in other precisions and older records
    )

    def to_json(self) -> dict[str, Any]:
        return {"backend": BACKEND, "format": FORMAT, **asdict(self)}


def is_engine(path: str | Path) -> bool:
    """Whether a folder is an engine directory."""
    return (Path(path) / ENGINE_FILE).is_file()


def read_engine(path: str | Path) -> EngineRecord:
    """What an engine directory says of itself. CheckpointError if it is broken or of another version's format."""
    file = Path(path) / ENGINE_FILE
    again = "build it again with `vila2-fast build`"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["backend"] != BACKEND:
            raise UsageError(f"{path} is an engine of the backend {values['backend']}: add --backend")
        if values["format"] != FORMAT:
            raise CheckpointError(
                f"{path} is an engine of format {values['format']}, this version reads {FORMAT}: {again}"
            )
        del values["backend"], values["format"]
        return EngineRecord(**{**values, "config": read_model_config(values["config"])})
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is broken ({' '.join(str(error).split())}): {again}") from None


def check_engine(path: str | Path, record: EngineRecord, layout: str) -> None:
    """Refuse an engine that cannot run as `layout`, or whose checkpoint has changed since. CheckpointError."""
    again = f"build it again with `vila2-fast build {record.checkpoint} --precision {record.precision} --out {path}`"
    if record.layout != layout:
        raise CheckpointError(f"{path} holds weights as {record.layout}, this run needs {layout}: {again}")
    weights = Path(path) / WEIGHTS_FILE
    found = weights.stat().st_size if weights.is_file() else 0
    if found != record.weight_bytes:
        raise CheckpointError(
            f"{weights} has {found} bytes instead of {record.weight_bytes}: copy the engine again, or {again}"
        )
    if Path(record.checkpoint).is_dir() and _digest_of(record.checkpoint) not in (None, record.digest):
        raise CheckpointError(
            f"{path} is stale: the checkpoint {record.checkpoint} has changed since; {again}"
        )


def load_engine(path: str | Path, record: EngineRecord, device: str = "cpu") -> LoadedCheckpoint:
    """The model of a checked engine directory, its weights mapped; on another device than the CPU, copied there."""
    tokenizer = open_tokenizer(Path(path) / TOKENIZER_FOLDER, record.config)
    model = load_packed(record.config, Path(path) / WEIGHTS_FILE, device)
    return LoadedCheckpoint(model, tokenizer, record.config.image_processor(), record.config, record.digest)


def misfit(record: EngineRecord) -> str | None:
    """What an engine of int8 weights costs on this CPU because it was built on one of another kind; None if nothing."""
    if record.is_narrow is None or record.is_narrow == wants_narrow():
        return None
    if record.is_narrow:
        return "rounded for CPUs without VNNI, more coarsely than this one needs"
    return "rounded for CPUs with VNNI, which this one lacks: slower here than an engine built here"


def layout_of(plan: ComputePlan) -> str:
    """How this machine's products want the weights of a plan."""
    if plan.packed_dtype is torch.int8:
        return BYTE_LAYOUT
    if plan.low_bits is not None:
        return LOW_BIT_LAYOUTS[plan.low_bits]
    if plan.packed_dtype is not None:
        return panel_layout(plan.packed_dtype)
    return f"{str(plan.model_dtype).removeprefix('torch.')}-plain"


def versions() -> dict[str, str]:
    """What built an engine."""
    return {"vila2": __version__, "torch": torch.__version__}


def check_asked(path: str | Path, record: EngineRecord, precision: str, device: str) -> None:
    """UsageError if a run asks an engine for what it was not built for."""
    if precision not in ("auto", record.precision):
        raise UsageError(
            f"{path} was built for {record.precision}, not {precision}: leave --precision out, or build another"
        )
    # What is built for a GPU also runs on the CPU, emulated, if that is asked for by name.
    if device not in ("auto", record.device) and record.device == "cpu":
        raise UsageError(
            f"{path} was built for {record.device}: leave out --device {device}, or build another"
        )


def _digest_of(checkpoint: str) -> str | None:
    try:
        return inspect_checkpoint(checkpoint).digest
    except (CheckpointError, OSError):
        return None  # something else lies there now: the engine is whole without it


def read_model_config(values: Mapping[str, Any]) -> ModelConfig:
    """A model's config from its JSON (`asdict`). KeyError, TypeError or ValueError if it does not fit."""
    fields = dict(values)
    fields["vision"] = VisionConfig(**fields["vision"])
    fields["projector"] = ProjectorConfig(**fields["projector"])
    fields["decoder"] = DecoderConfig(**fields["decoder"])
    for name in ("image_mean", "image_std", "s2_scales"):
        fields[name] = tuple(fields[name])
    return ModelConfig(**fields)
