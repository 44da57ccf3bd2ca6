"""How a loop shows where it stands: a line when a step begins, and the step's own progress below it."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol

from vila2.augment.context import Begun
from vila2.cli.progress import JSON_EVERY_S, PLAIN_EVERY_S, print_event
from vila2.cli.progress import line_of as recaption_line
from vila2.cli.train_progress import line_of as train_line


class Show(Protocol):
    def __call__(self, step: str, progress: Any) -> None: ...


@contextmanager
def shown(as_json: bool) -> Iterator[Show]:
    """What to call with each progress; `Begun` says that a step begins."""
    last = 0.0
    live = not as_json and sys.stderr.isatty()
    every = JSON_EVERY_S if as_json else 0.2 if live else PLAIN_EVERY_S

    def show(step: str, progress: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if not isinstance(progress, Begun) and now - last < every:
            return
        last = now
        if as_json:
            event = "step" if isinstance(progress, Begun) else "progress"
            print_event(event, {"step": step, **_values(progress)})
        elif live:
            print(f"\r\033[K{step} {_line(progress)}", end="", file=sys.stderr, flush=True)
        else:
            print(f"{step} {_line(progress)}", file=sys.stderr, flush=True)

    yield show
    if live:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _line(progress: Any) -> str:
    if isinstance(progress, Begun):
        return f"({progress.why})"
    if isinstance(progress, tuple):
        return f"{progress[0]}/{progress[1]}"
    return train_line(progress) if hasattr(progress, "stage") else recaption_line(progress)


def _values(progress: Any) -> dict[str, Any]:
    if isinstance(progress, Begun):
        return {"why": progress.why}
    if isinstance(progress, tuple):
        return {"done": progress[0], "total": progress[1]}
    return {"of": asdict(progress)}
