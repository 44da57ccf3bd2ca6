"""`ledger.jsonl`: one line for each step that was carried out, and the clocks that it is told by."""

import json
import os
import platform
import resource
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vila2 import __version__
from vila2.augment.recipe import Cost
from vila2.data.files import atomic_write, write_error
from vila2.data.lock import waiting_lock
from vila2.errors import OutputError

FILE_NAME = "ledger.jsonl"
_VERSIONS_OF = ("torch", "transformers", "pyarrow")


class Ledger:
    """The lines of a run's ledger. A line names its step, its key and when it was finished."""

    def __init__(self, run: Path) -> None:
        self.path = run / FILE_NAME
        self.lines = read_ledger(self.path)

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add those that are not there yet. OutputError if the file cannot be written."""
        try:
            with waiting_lock(
                self.path.with_name(f"{self.path.name}.lock")
            ):  # seeds may be at work side by side
                self._add(lines)
        except OSError as error:
            raise write_error(self.path, error) from error

    def _add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        self.lines = read_ledger(self.path)
        known = {_identity(line) for line in self.lines}
        new = [dict(line) for line in lines if _identity(line) not in known]
        if not new:
            return
        new.sort(key=lambda line: str(line["finished"]))
        self.lines += new
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines)
        atomic_write(self.path, text.encode())


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The lines of a ledger, none if there is no file. OutputError if it is no ledger."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot read the ledger: {error}") from None


def _identity(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return line["step"], line["key"], line["finished"]


class Clock:
    """Wall and processor time since it was made, child processes included once they have ended."""

    def __init__(self, earlier_s: float = 0.0, earlier_cpu_s: float = 0.0) -> None:
        self._start, self._cpu_start = time.monotonic() - earlier_s, _cpu_seconds() - earlier_cpu_s

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def cpu_seconds(self) -> float:
        return _cpu_seconds() - self._cpu_start


def costs(cost: Cost, device: str, seconds: float, cpu_seconds: float, images: int) -> dict[str, Any]:
    """What a step took: processor hours, accelerator hours where it had one, and money by the recipe's prices."""
    cpu_hours = cpu_seconds / 3600
    gpu_hours = seconds / 3600 * cost.gpus if device == "cuda" else 0.0
    money = gpu_hours * cost.gpu_hour if device == "cuda" else cpu_hours * cost.cpu_hour
    hours = gpu_hours if device == "cuda" else cpu_hours
    values: dict[str, Any] = {
        "cpu_hours": round(cpu_hours, 6),
        "gpu_hours": round(gpu_hours, 6),
        "cost": round(money, 6),
    }
    if images:
        per = {"hours": round(hours / images * 1000, 6), "cost": round(money / images * 1000, 6)}
        values |= {"images": images, "per_1000_images": per}
    return {**values, "currency": cost.currency}


def versions() -> dict[str, str]:
    """What carried the step out."""
    return {
        "vila2-fast": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in _VERSIONS_OF},
    }


def now() -> str:
    """UTC, to the millisecond: lines sort by it."""
    seconds = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = os.times()
    return own.user + own.system + children.ru_utime + children.ru_stime


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "none"
