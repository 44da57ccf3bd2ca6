"""Benchmark workers: one process an engine, run in turns, so that memory, threads and caches stay its own.

A worker prints `{"ready": ...}`, then answers each JSON line on its standard input with one on its standard
output. An idle worker sleeps in a read, so two engines can take turns on one machine without disturbing each other.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO


class _Pipe:
    """To whom a worker answers."""

    file: TextIO = sys.stdout


def own_output() -> None:
    """Keep the pipe for the protocol: what a library prints or logs to its standard output goes to the standard error
    instead."""
    _Pipe.file = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)


def serve(ready: dict[str, Any], answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The worker's side: answer until the standard input ends. `answer` is timed; it may add its own fields."""
    _reply({"ready": ready})
    for line in sys.stdin:
        started = time.perf_counter()
        fields = answer(json.loads(line))
        _reply({"seconds": time.perf_counter() - started, **fields})


def _reply(message: dict[str, Any]) -> None:
    _Pipe.file.write(json.dumps(message) + "\n")
    _Pipe.file.flush()


class Worker:
    """The benchmark's side: `ask(**fields)` waits for the answer. Raises RuntimeError if the process ends.

    `python` may be that of another environment; `log` takes what the process writes to its standard error.
    """

    def __init__(
        self, script: Path, *arguments: str, python: Path | None = None, log: Path | None = None
    ) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent),
            "TRANSFORMERS_VERBOSITY": "error",
        }
        with log.open("w", encoding="utf-8") if log else nullcontext() as errors:
            self.process = subprocess.Popen(
                [str(python or sys.executable), str(script), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        try:
            self.ready: dict[str, Any] = self._read()["ready"]
        except BaseException:
            self.process.kill()  # it must not run on beside the others
            raise

    def ask(self, **fields: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(fields) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")
        message: dict[str, Any] = json.loads(line)
        return message

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
