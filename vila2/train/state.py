"""The state of a stage on disk: enough to go on as if nothing had happened.

`state.json` names the files that belong to it and is replaced last, so at any moment it stands for one whole state:
that of before or that of after. Tensors are in safetensors, one file a process; nothing is pickled. A tensor that is
sharded is in several files, its pieces along the first axis, so any number of processes can read it.
"""

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from vila2.data.files import atomic_write, make_folder, remove_leftovers, replacing, write_error
from vila2.errors import OutputError
from vila2.train.sharding import Processes

STATE_FILE = "state.json"
_FORMAT = 1
_RNG = "rng"


@dataclass(frozen=True, slots=True)
class SavedState:
    """What was saved after `step` steps. `tensors` are read when they are asked for."""

    step: int
    values: dict[str, Any]
    tensors: "LazyTensors"


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of several files by name, each whole; use as a context manager."""

    def __init__(self, files: list[Path]) -> None:
        self._stack = ExitStack()
        self._files = [self._stack.enter_context(safe_open(file, framework="pt")) for file in files]
        self._places: dict[str, list[Any]] = {}
        for file in self._files:
            for name in file.keys():  # noqa: SIM118 - no mapping
                self._places.setdefault(name, []).append(file)

    def __enter__(self) -> "LazyTensors":
        return self

    def __exit__(self, *error: object) -> None:
        self._places = {}
        self._stack.close()

    def __getitem__(self, name: str) -> Tensor:
        pieces = [file.get_tensor(name) for file in self._places[name]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Joined(Mapping[str, Any]):
    """The tensors under a prefix, and numbers beside them: one mapping, as an optimiser's state dict."""

    def __init__(self, tensors: LazyTensors, prefix: str, numbers: Mapping[str, Any]) -> None:
        self._tensors, self._prefix, self._numbers = tensors, prefix, numbers

    def __getitem__(self, name: str) -> Any:
        return self._numbers[name] if name in self._numbers else self._tensors[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        yield from self._numbers
        for name in self._tensors:
            if name.startswith(self._prefix):
                yield name.removeprefix(self._prefix)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def save_state(
    folder: Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], processes: Processes
) -> None:
    """Make this the state in `folder`. Every process calls it with its own shards. OutputError if it cannot."""
    make_folder(folder)
    names = [f"step-{step:08d}-rank-{rank:05d}.safetensors" for rank in range(processes.world_size)]
    own = {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for name, tensor in tensors.items()
        if processes.is_main or isinstance(tensor, DTensor)
    }
    rng_tensors, rng_values = _rng_state()
    own |= {f"{_RNG}-{processes.rank}/{name}": tensor for name, tensor in rng_tensors.items()}
    try:
        with replacing(folder / names[processes.rank]) as temporary:
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in own.items()}
            save_file(plain, temporary, metadata={_RNG: json.dumps(rng_values)})
        processes.barrier()
        if processes.is_main:
            content = {"format": _FORMAT, "step": step, "files": names, "values": dict(values)}
            atomic_write(folder / STATE_FILE, json.dumps(content, indent=1).encode())
            for old in folder.glob("step-*.safetensors"):
                if old.name not in names:
                    old.unlink()
        processes.barrier()
    except OSError as error:
        raise write_error(folder, error) from error


def saved_step(folder: Path) -> int | None:
    """The step of the state in `folder`, or None where there is none."""
    content = _read(folder)
    return None if content is None else int(content["step"])


def load_state(folder: Path) -> SavedState | None:
    """The state in `folder`, or None. OutputError if it is damaged. Close `tensors` after use."""
    content = _read(folder)
    if content is None:
        return None
    files = [folder / name for name in content["files"]]
    try:
        tensors = LazyTensors(files)
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{folder}: the saved state cannot be read ({error}): remove the folder to start the stage anew"
        ) from None
    except Exception as error:  # safetensors has an error type of its own, not exported
        raise OutputError(
            f"{folder}: the saved state is damaged ({error}): remove the folder to start the stage anew"
        ) from None
    return SavedState(int(content["step"]), content["values"], tensors)


def remove_unfinished(folder: Path) -> None:
    """Remove what a process that was killed while it wrote left behind. Call it when nobody else writes."""
    if folder.is_dir():
        remove_leftovers(folder, "*")
        content = _read(folder)
        kept = set() if content is None else set(content["files"])
        for file in folder.glob("step-*.safetensors"):
            if file.name not in kept:
                file.unlink()


def restore_rng(folder: Path, state: SavedState, rank: int) -> None:
    """Set the random states of python, numpy and torch to those of this rank; a new rank keeps its own."""
    file = folder / f"step-{state.step:08d}-rank-{rank:05d}.safetensors"
    if not file.is_file():
        return
    with safe_open(file, framework="pt") as opened:
        values = json.loads(opened.metadata()[_RNG])
        version, numbers, gauss = values["python"]
        random.setstate((version, tuple(numbers), gauss))
        kind, keys, *rest = values["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002 - what libraries use
        torch.set_rng_state(opened.get_tensor(f"{_RNG}-{rank}/torch"))
        if "cuda" in values and torch.cuda.is_available():
            torch.cuda.set_rng_state(opened.get_tensor(f"{_RNG}-{rank}/cuda"))


def _rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"torch": torch.get_rng_state()}
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    values: dict[str, Any] = {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
        values["cuda"] = True
    return tensors, values


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / STATE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path} cannot be read ({error}): remove {folder} to start the stage anew"
        ) from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise OutputError(f"{path} was written by another version: remove {folder} to start the stage anew")
    return content
