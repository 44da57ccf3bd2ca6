"""What a format's reader finds out about a checkpoint before any weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vila2.model.vlm import ModelConfig
from vila2.model.weight_files import TensorEntry
from vila2.model.weight_map import Found


@dataclass(frozen=True, slots=True)
class Layout:
    """A checked checkpoint: `sources` says which tensors make up each weight of ours, in order.

    `kind` is vila1.5, nvila or llava. `weight_files` are all its safetensors files, those of unused weights
    included; `small_files` its configs and tokenizer files, which together with the weights define what it does.
    """

    kind: str
    root: Path
    config: ModelConfig
    tokenizer_folder: Path
    sources: Mapping[str, tuple[Found, ...]]
    weight_files: tuple[Path, ...]
    small_files: tuple[Path, ...]

    @property
    def entries(self) -> list[TensorEntry]:
        """The tensors that are read, each once."""
        return [found.entry for sources in self.sources.values() for found in sources]


_SMALL_SUFFIXES = (".json", ".jinja", ".model", ".txt")


def small_files(*folders: Path) -> tuple[Path, ...]:
    """The config and tokenizer files of the folders, in order."""
    return tuple(
        path
        for folder in folders
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in _SMALL_SUFFIXES and not path.name.endswith(".index.json")
    )
