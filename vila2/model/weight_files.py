"""What the weight files of a folder hold, known from JSON and safetensors headers alone.

No tensor is read here, so a checkpoint of any size is checked in milliseconds. Nothing is ever unpickled: `.bin`,
`.pt` and `.pth` files are refused with the command that converts them.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vila2.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies and what it is; `dtype` as in the header ("BF16")."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return DTYPE_BYTES.get(self.dtype, 1) * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The tensors of one folder by name, and the files that hold them."""

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorEntry]


def some(names: Iterable[str], limit: int = 5) -> str:
    """At most `limit` of the names, and how many more there are."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:limit])
    return shown if len(ordered) <= limit else f"{shown} and {len(ordered) - limit} more"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError if it is missing, broken or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not valid JSON: download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def find_weight_files(folder: Path, root: Path) -> WeightFiles:
    """Check and list the weights in `folder`, a part of the checkpoint `root`. CheckpointError names what is wrong."""
    if not folder.is_dir():
        raise CheckpointError(f"{root}: the folder {folder.name}/ is missing: the checkpoint is incomplete")
    if (folder / SINGLE_FILE).is_file():
        tensors = _read_header(folder / SINGLE_FILE)
        return WeightFiles(folder, (folder / SINGLE_FILE,), tensors)
    if (folder / INDEX_FILE).is_file():
        return _read_sharded(folder)
    raise CheckpointError(_why_no_weights(folder, root))


def _why_no_weights(folder: Path, root: Path) -> str:
    names = [path.name for path in folder.iterdir()]
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return (
            f"{folder} holds pickled weights ({some(pickles)}), which can run code when they are opened: "
            f"convert them with `vila2-fast convert {root} NEW_FOLDER`"
        )
    if any(name.endswith(".safetensors") for name in names):
        return f"{folder / INDEX_FILE} is missing: the checkpoint is incomplete"
    return f"{folder} holds no weights ({SINGLE_FILE} or {INDEX_FILE}): the checkpoint is incomplete"


def _read_sharded(folder: Path) -> WeightFiles:
    index = folder / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    for name in set(map(str, weight_map.values())):
        if not _stays_inside(name):
            raise CheckpointError(f"{index} names the file {name!r}, which is not inside its folder")
    paths = {name: folder / name for name in sorted(set(map(str, weight_map.values())))}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {some(missing)}: the checkpoint is incomplete, download it again"
        )
    headers = {name: _read_header(path) for name, path in paths.items()}
    absent = [tensor for tensor, name in weight_map.items() if tensor not in headers[str(name)]]
    if absent:
        raise CheckpointError(f"{index} places {some(absent)} in files that do not hold them")
    tensors = {tensor: entry for header in headers.values() for tensor, entry in header.items()}
    return WeightFiles(folder, tuple(paths.values()), tensors)


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file. CheckpointError if the file is cut short or its header is broken."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else _MAX_HEADER_BYTES + 1
            header = json.loads(file.read(length)) if length <= _MAX_HEADER_BYTES else None
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"} if header else {}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        tensors = {
            name: TensorEntry(path, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
            for name, entry in entries.items()
        }
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is not a valid safetensors file: download it again") from None
    if not tensors:
        raise CheckpointError(f"{path} is empty or not a safetensors file: download it again")
    expected = 8 + length + end
    if path.stat().st_size != expected:
        raise CheckpointError(
            f"{path} has {path.stat().st_size} bytes where its header promises {expected}: download it again"
        )
    return tensors
