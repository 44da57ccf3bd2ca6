"""Folders of built engines: what one was made from, who may use it, how it appears whole, and when it goes.

    engine.json           the spec (checkpoint's digest, versions, GPU, precision, limits) and the model's config
    tokenizer/            the checkpoint's tokenizer files
    vision.safetensors    tower and projector, run by our own batched vision stage
    llm/                  generation "engine": the TensorRT engine of the language model
    model/                generation "pytorch": the checkpoint that the PyTorch backend loads
    cache/                what TensorRT-LLM, Triton and torch keep between runs

A folder is built beside its place under a lock, synced and renamed: one without a readable engine.json does not count.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vila2.data.files import sync_file, sync_folder
from vila2.data.lock import waiting_lock
from vila2.errors import CheckpointError, OutputError
from vila2.model.checkpoint import inspect_checkpoint
from vila2.model.digest import cache_folder

FORMAT = 1
ENGINE_FILE = "engine.json"
USED_FILE = "used"  # its time is that of the last run
_BUILDING, _REMOVING = ".building", ".removing"
ABANDONED_AFTER_S = 24 * 3600.0  # no build takes this long


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """All that decides what an engine is: equal specs are the same engine."""

    digest: str
    generation: str
    precision: str
    gpu: Mapping[str, Any]  # name, compute capability, memory
    versions: Mapping[str, str]
    limits: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: str = ""  # a digest of what quantisation was calibrated on

    @property
    def key(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


@dataclass(frozen=True, slots=True)
class EngineFolder:
    """A built engine on disk."""

    path: Path
    spec: EngineSpec
    name: str  # of the model
    checkpoint: str
    created: float
    config: Mapping[str, Any]  # of the model, as JSON

    def mark_used(self) -> None:
        """Note the time for `prune`. A folder that cannot be written is used all the same."""
        with suppress(OSError):
            (self.path / USED_FILE).touch()


def engines_root() -> Path:
    """Where engines are cached. OutputError where there is no home directory."""
    try:
        return cache_folder() / "engines"
    except RuntimeError:
        raise OutputError(
            "there is no home directory to keep engines in: set XDG_CACHE_HOME, or give --out"
        ) from None


def engine_place(root: Path, name: str, spec: EngineSpec) -> Path:
    """Where the engine of a spec lies in a cache: readable, and another folder for every other spec."""
    plain = "".join(char if char.isalnum() or char in "._-" else "-" for char in name)[:60]
    return root / f"{plain}-trtllm-{spec.precision}-{spec.key}"


def read_engine(path: Path) -> EngineFolder:
    """What an engine folder says of itself. CheckpointError when it is none, or broken."""
    file = path / ENGINE_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.get("backend") != "trtllm":
            raise CheckpointError(f"{path} is no TensorRT-LLM engine")
        if values["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has the format {values['format']}, this version reads {FORMAT}: build it again"
            )
        return EngineFolder(
            path=path,
            spec=EngineSpec(**values["spec"]),
            name=str(values["name"]),
            checkpoint=str(values["checkpoint"]),
            created=float(values["created"]),
            config=values["config"],
        )
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read: {error.strerror}; `vila2-fast build` makes an engine"
        ) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is broken ({' '.join(str(error).split())}): build it again") from None


def publish(
    out: Path,
    spec: EngineSpec,
    name: str,
    checkpoint: str,
    config: Mapping[str, Any],
    make: Callable[[Path], None],
    observe: Callable[[str], None] = lambda stage: None,
) -> EngineFolder:
    """The engine at `out`: the one that is there if it has this spec, else a new one, which `make` fills a folder with.

    Builders of one place wait for one another. OutputError if it cannot be written; whatever `make` raises. Either
    way nothing half-built remains.
    """
    if out.exists() and not (out / ENGINE_FILE).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is no engine: choose another folder")
    with _as_output_error(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        observe("waiting for another builder")
        with waiting_lock(out.with_name(f".{out.name}.lock")):
            present = _present(out, spec)
            if present is not None:
                return present
            for leftover in out.parent.glob(f".{out.name}.*"):
                if leftover.name.endswith((_BUILDING, _REMOVING)):
                    shutil.rmtree(leftover, ignore_errors=True)
            temporary = out.with_name(f".{out.name}.{os.getpid()}{_BUILDING}")
            temporary.mkdir()
            try:
                make(temporary)
                found = EngineFolder(out, spec, name, checkpoint, time.time(), config)
                _write(temporary, found)
                _replace(temporary, out)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            return found


def _present(out: Path, spec: EngineSpec) -> EngineFolder | None:
    try:
        found = read_engine(out)
    except CheckpointError:
        return None
    return found if found.spec.key == spec.key else None


def _write(folder: Path, found: EngineFolder) -> None:
    values = {
        "format": FORMAT, "backend": "trtllm", "precision": found.spec.precision, "name": found.name,
        "checkpoint": found.checkpoint, "created": found.created, "spec": asdict(found.spec), "config": found.config,
    }  # fmt: skip
    (folder / ENGINE_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            sync_file(path)


def _replace(temporary: Path, out: Path) -> None:
    """Put the new folder in its place; a folder cannot be renamed over one that has files."""
    old = out.with_name(f".{out.name}.{os.getpid()}{_REMOVING}")
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _as_output_error(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"cannot write the engine {out}: {reason}; free space or choose another folder"
        ) from error


# ---- the cache as a whole ----


@dataclass(frozen=True, slots=True)
class Listed:
    """An engine of either backend in a cache folder. `problem` says why it is no longer valid, or nothing."""

    path: Path
    backend: str
    name: str
    precision: str
    checkpoint: str
    num_bytes: int
    created: float
    used: float
    problem: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "valid": not self.problem}


def list_engines(
    root: Path, *, versions: Mapping[str, str] | None = None, gpu: Mapping[str, Any] | None = None
) -> list[Listed]:
    """All engines in `root`, the latest used first. `versions` and `gpu` are of this machine, if they are known."""
    folders = (
        [path for path in root.glob("*") if path.is_dir() and not path.name.startswith(".")]
        if root.is_dir()
        else []
    )
    listed = [_describe(path, versions, gpu) for path in folders]
    return sorted(listed, key=lambda one: -one.used)


def _describe(path: Path, versions: Mapping[str, str] | None, gpu: Mapping[str, Any] | None) -> Listed:
    size = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
    stamp = path.stat().st_mtime
    try:
        values = json.loads((path / ENGINE_FILE).read_text(encoding="utf-8"))
        backend = str(values.get("backend", "native"))
        name, checkpoint = str(values["name"]), str(values["checkpoint"])
        spec = values.get("spec", {})
        digest, precision = str(spec.get("digest") or values["digest"]), str(values["precision"])
        created = float(values.get("created", stamp))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Listed(
            path, "?", path.name, "?", "?", size, stamp, stamp, "not whole: no readable engine.json"
        )
    used_file = path / USED_FILE
    used = max(created, used_file.stat().st_mtime if used_file.is_file() else created)
    problem = _problem(checkpoint, digest)
    if not problem and backend == "trtllm":
        problem = _difference(spec.get("versions", {}), versions) or _difference(spec.get("gpu", {}), gpu)
    return Listed(path, backend, name, precision, checkpoint, size, created, used, problem)


def _problem(checkpoint: str, digest: str) -> str:
    """Why an engine is no longer its checkpoint's; an engine whose checkpoint is gone still serves."""
    if not Path(checkpoint).is_dir():
        return ""
    try:
        now = inspect_checkpoint(checkpoint).digest
    except (CheckpointError, OSError):
        return ""
    return "" if now == digest else "the checkpoint has changed"


def _difference(built: Mapping[str, Any], here: Mapping[str, Any] | None) -> str:
    if here is None:
        return ""
    names = [name for name in built if name in here and built[name] != here[name]]
    return "; ".join(f"built with {name} {built[name]}, here is {here[name]}" for name in names)


def prune(
    root: Path, listed: list[Listed], *, max_bytes: int, max_age_s: float, now: float | None = None
) -> list[Listed]:
    """Remove what is invalid, unused for `max_age_s`, or too much (the longest unused first); leftovers of dead builds.

    Returns what was removed. OutputError if something cannot be.
    """
    now = time.time() if now is None else now
    with _as_output_error(root):
        for leftover in root.glob(f".*{_BUILDING}"):
            if leftover.stat().st_mtime < now - ABANDONED_AFTER_S:
                shutil.rmtree(leftover, ignore_errors=True)
        for leftover in root.glob(f".*{_REMOVING}"):
            shutil.rmtree(leftover, ignore_errors=True)
        removed, total = [], 0
        for one in sorted(listed, key=lambda one: -one.used):
            keep = not one.problem and one.used >= now - max_age_s and total + one.num_bytes <= max_bytes
            total += one.num_bytes if keep else 0
            if not keep:
                _remove(one.path)
                removed.append(one)
    return removed


def _remove(path: Path) -> None:
    """Under the builders' lock, and out of sight in one step: a folder that is half gone must not count."""
    with waiting_lock(path.with_name(f".{path.name}.lock")):
        gone = path.with_name(f".{path.name}.{os.getpid()}{_REMOVING}")
        with suppress(FileNotFoundError):
            path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
