"""Pickled checkpoints (`.bin`, `.pt`, `.pth`) to safetensors, without running what a pickle may hold.

Files are opened by torch's restricted unpickler, which makes tensors and plain containers and nothing else.
"""

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vila2.errors import CheckpointError, OutputError
from vila2.model.weight_files import INDEX_FILE, PICKLE_SUFFIXES, SINGLE_FILE, read_json, some

# Left behind by training beside the weights; a model needs none of them.
_TRAINING_STATE = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
_WRAPPERS = ("state_dict", "model", "module")


def convert_checkpoint(src: str | Path, dst: str | Path) -> list[Path]:
    """Copy the checkpoint folder `src` to the new folder `dst`, with safetensors in place of pickled weights.

    Returns the weight files written. `dst` appears whole or not at all. CheckpointError if `src` has no pickled
    weights, or one holds anything but tensors; OutputError if `dst` exists or cannot be written.
    """
    source, target = Path(src), Path(dst)
    if not source.is_dir():
        raise CheckpointError(f"{source} is not a folder")
    if target.exists():
        raise OutputError(f"{target} exists already: choose a new folder")
    if source.resolve() in target.resolve().parents:
        raise OutputError(f"{target} lies inside {source}: choose a folder elsewhere")
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        written = _convert_tree(source, partial)
        if not written:
            raise CheckpointError(f"{source} holds no pickled weights: there is nothing to convert")
        partial.rename(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [target / path for path in written]


def _convert_tree(source: Path, target: Path) -> list[Path]:
    """Returns the weight files written, relative to `target`."""
    written: list[Path] = []
    for name, folders, files in os.walk(source):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        folder, relative = Path(name), Path(name).relative_to(source)
        (target / relative).mkdir(parents=True, exist_ok=True)
        for file in files:
            if not file.startswith(".") and not file.endswith((*PICKLE_SUFFIXES, ".bin.index.json")):
                shutil.copyfile(folder / file, target / relative / file)
        pickles = [
            file
            for file in sorted(files)
            if file.endswith(PICKLE_SUFFIXES) and not file.startswith(_TRAINING_STATE)
        ]
        if pickles:
            written += [relative / file for file in _convert_folder(folder, pickles, target / relative)]
    return written


def _convert_folder(folder: Path, pickles: list[str], target: Path) -> list[str]:
    indexes = sorted(folder.glob("*.bin.index.json"))
    if not indexes:
        if len(pickles) > 1:
            raise CheckpointError(
                f"{folder} holds {some(pickles)}, but no index says how they belong together"
            )
        save_file(_load(folder / pickles[0]), target / SINGLE_FILE, metadata={"format": "pt"})
        return [SINGLE_FILE]
    needed = sorted(set(map(str, dict(read_json(indexes[0]).get("weight_map") or {}).values())))
    missing = [file for file in needed if file not in pickles]
    if missing or not needed:
        raise CheckpointError(
            f"{folder} lacks {some(missing) or 'a weight_map'}: the checkpoint is incomplete"
        )
    weight_map: dict[str, str] = {}
    for number, file in enumerate(needed, 1):
        name = f"model-{number:05d}-of-{len(needed):05d}.safetensors"
        tensors = _load(folder / file)
        save_file(tensors, target / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (target / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return sorted(set(weight_map.values()))


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors of one pickled state dict, each in memory of its own."""
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds more than tensors, or is no torch file: it is not opened, it could run code"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError):
        raise CheckpointError(f"{path} is no torch file, or cut short: download it again") from None
    tensors = _unwrap(content)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors by name")
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():  # tied weights share their memory, which safetensors refuses
        address = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if address in seen else tensor.contiguous()
        seen.add(address)
    return own


def _unwrap(content: Any) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        return {}
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
