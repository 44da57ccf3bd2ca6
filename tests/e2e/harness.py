"""Runs the real command line in processes of its own, quickly: they are forked from one that has torch loaded.

A fresh process spends seconds on imports. The fork server has done them, and has run no tensor operation, so a
process forked from it behaves like a fresh one: its own signals, its own exit code, its own death.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila2.data import files
from vila2.data.verify import iter_rows

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "vila2.backends.native",
        "vila2.backends.http_captioner",
        "vila2.recaption.estimate",
        "vila2.recaption.export",
        "vila2.train.trainer",
        "vila2.train.estimate",
        "vila2.world",
        "transformers.modeling_utils",  # loading a tokenizer brings it in
        "transformers.models.auto.tokenization_auto",
        "tests.e2e.harness",
    ]
)

TIMEOUT_S = 180.0  # generous: machines are slow when they are shared


@dataclass(frozen=True)
class Done:
    """A process that ended. `code` is negative for a signal."""

    code: int
    stdout: str
    stderr: str


def _child(
    arguments: list[str], stdout: str, stderr: str, fault: str, environment: Mapping[str, str]
) -> None:
    os.environ.update(environment)
    for number, path in ((1, stdout), (2, stderr)):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    files._fault = files._Fault(fault)  # what VILA2_FAULT sets when a process starts

    from vila2.cli.main import main

    os._exit(main(arguments))


class Process:
    """A command under way."""

    def __init__(
        self,
        folder: Path,
        arguments: list[str],
        fault: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._stdout, self._stderr = folder / "stdout.txt", folder / "stderr.txt"
        folder.mkdir(parents=True, exist_ok=True)
        self._process = _context.Process(
            target=_child,
            args=(arguments, str(self._stdout), str(self._stderr), fault, environment or {}),
        )
        self._process.start()

    def send(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self) -> Done:
        self._process.join(TIMEOUT_S)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError(f"hung; stderr: {self._stderr.read_text()}")
        return Done(self._process.exitcode, self._stdout.read_text(), self._stderr.read_text())


_number = 0


def vila2_fast(tmp: Path, *arguments: str | Path, fault: str = "") -> Done:
    """Run `vila2-fast` to its end."""
    return start(tmp, *arguments, fault=fault).wait()


def start(
    tmp: Path, *arguments: str | Path, fault: str = "", environment: Mapping[str, str] | None = None
) -> Process:
    global _number  # noqa: PLW0603 - names the folder of each process's output
    _number += 1
    return Process(tmp / f"process-{_number}", [str(argument) for argument in arguments], fault, environment)


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until `condition` holds, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def captions(out: Path) -> dict[tuple[str, str], str]:
    """(key, prompt) -> caption of all rows; fails on a row that is there twice."""
    found: dict[tuple[str, str], str] = {}
    for row in iter_rows(out):
        place = (row["key"], row["prompt"])
        assert place not in found
        found[place] = row["caption"]
    return found


def statuses(out: Path) -> dict[str, str]:
    """key -> status, or the kind of error."""
    return {row["key"]: row["error_kind"] or row["status"] for row in iter_rows(out)}


def rows(out: Path) -> list[dict[str, Any]]:
    return list(iter_rows(out))
