"""A checkpoint on disk to a model, and back.

Everything is checked from JSON and safetensors headers first: a checkpoint that cannot work is refused by name
before memory is taken for it. Weights are then copied tensor by tensor from mapped files into the one model.
"""

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vila2.errors import CheckpointError
from vila2.model.digest import checkpoint_digest
from vila2.model.images import ImageProcessor
from vila2.model.layout import Layout
from vila2.model.llava_format import is_llava, read_llava
from vila2.model.prompt import turn_end_ids
from vila2.model.shipped import checkpoint_path
from vila2.model.tokenizer import Tokenizer, load_tokenizer
from vila2.model.vila_format import is_vila, read_vila
from vila2.model.vila_writer import save_vila
from vila2.model.vlm import ModelConfig, VisionLanguageModel
from vila2.model.weight_files import read_json
from vila2.model.weight_map import Found

__all__ = ["CheckpointInfo", "LoadedCheckpoint", "inspect_checkpoint", "load_checkpoint", "save_vila"]

KINDS = "VILA1.5 and NVILA folders, and LLaVA in the transformers layout"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is, known without reading its weights. `dtypes` counts parameters by type in the files."""

    path: Path
    layout: Layout

    @property
    def kind(self) -> str:
        """vila1.5, nvila or llava."""
        return self.layout.kind

    @property
    def config(self) -> ModelConfig:
        return self.layout.config

    @property
    def num_parameters(self) -> int:
        """Parameters that the model reads."""
        return sum(math.prod(entry.shape) for entry in self.layout.entries)

    @property
    def num_bytes(self) -> int:
        """Bytes of these parameters in the files."""
        return sum(entry.num_bytes for entry in self.layout.entries)

    @property
    def dtypes(self) -> Mapping[str, int]:
        counts: Counter[str] = Counter()
        for entry in self.layout.entries:
            counts[entry.dtype] += math.prod(entry.shape)
        return counts

    @cached_property
    def digest(self) -> str:
        """A digest of all contents. Hashes the weights the first time, at about 1 GB/s; remembered afterwards."""
        layout = self.layout
        return checkpoint_digest(layout.root, layout.small_files, layout.weight_files)


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A checkpoint in memory. `digest` names its contents."""

    model: VisionLanguageModel
    tokenizer: Tokenizer
    image_processor: ImageProcessor
    config: ModelConfig
    digest: str


def inspect_checkpoint(path: str | Path) -> CheckpointInfo:
    """Check a checkpoint and say what it is, from headers and JSON alone. CheckpointError says what is wrong.

    A name of `vila2.model.shipped` stands for the checkpoint that ships under it.
    """
    path = checkpoint_path(path)
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {found}: a checkpoint is a folder ({KINDS})")
    # VILA's own training leaves the parts in a folder "model".
    root = path if (path / "config.json").is_file() or not (path / "model").is_dir() else path / "model"
    config = read_json(root / "config.json")
    try:
        return CheckpointInfo(path, _read_layout(path, root, config))
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        # Each reader names what it knows to be wrong; a value of an absurd type may still trip it up.
        raise CheckpointError(
            f"{path}: a config of this checkpoint has a value of the wrong kind: {error}"
        ) from error


def _read_layout(path: Path, root: Path, config: Mapping[str, Any]) -> Layout:
    if is_llava(config):
        return read_llava(root, config)
    if "mm_vision_tower" in config and "vision_tower_cfg" not in config:
        raise CheckpointError(
            f"{path} is in the layout of the first LLaVA and VILA 1.0, with one folder and mm_vision_tower; "
            f"known are {KINDS}"
        )
    if is_vila(root, config):
        return read_vila(root, config)
    kind = config.get("model_type", "no model_type")
    raise CheckpointError(f"{path} is of an unknown kind ({kind}); known are {KINDS}")


def load_checkpoint(
    path: str | Path, *, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> LoadedCheckpoint:
    """Load a checkpoint with its weights as `dtype` on `device`; CheckpointError says why it cannot be used."""
    info = inspect_checkpoint(path)
    tokenizer = open_tokenizer(info.layout.tokenizer_folder, info.config)
    with torch.device("meta"):
        model = VisionLanguageModel.from_config(info.config)
    model.to(dtype).to_empty(device=device)
    fill_weights(model, info.layout.sources)
    model.requires_grad_(False)
    model.eval()
    return LoadedCheckpoint(model, tokenizer, info.config.image_processor(), info.config, info.digest)


def open_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer in `folder` as the model of `config` needs it; CheckpointError if they do not belong together.

    Added tokens may lie beyond the embeddings (`<image>` has none, and is never looked up); text may not.
    """
    tokenizer = load_tokenizer(folder)
    rows = config.decoder.vocab_size
    if tokenizer.text_vocab_size > rows:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.text_vocab_size} tokens of text, the language model "
            f"embeddings for {rows}: the tokenizer belongs to another model"
        )
    if config.token_newline:
        tokenizer.add_image_token()
    tokenizer.add_eos_ids(turn_end_ids(tokenizer))
    return tokenizer


@torch.no_grad()
def fill_weights(model: VisionLanguageModel, sources: Mapping[str, tuple[Found, ...]]) -> None:
    """Copy the tensors of a checked checkpoint into `model`, one at a time."""
    parameters: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    with ExitStack() as stack:
        handles: dict[Path, Any] = {}
        for name, parts in sources.items():
            row = 0
            for found in parts:
                file = found.entry.file
                if file not in handles:
                    handles[file] = stack.enter_context(safe_open(file, framework="pt"))
                tensor = handles[file].get_tensor(found.name)
                rows = parameters[name][row : row + len(tensor)]
                rows.copy_(tensor.view(rows.shape))
                row += len(tensor)
            assert row == len(parameters[name]), name
