"""How a run shows where it stands: a live bar on a terminal, plain lines elsewhere, JSON lines for machines."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from vila2.recaption.processes import Notice
    from vila2.recaption.stats import DraftUse, Progress

PLAIN_EVERY_S = 5.0
JSON_EVERY_S = 1.0


class Show(Protocol):
    def __call__(self, progress: "Progress") -> None: ...


@contextmanager
def shown(as_json: bool) -> Iterator[Show]:
    """What to call with each progress: it shows what is due and ignores the rest."""
    if as_json:
        yield _Every(JSON_EVERY_S, _print_json)
    elif sys.stderr.isatty():
        with _live_bar() as show:
            yield show
    else:
        yield _Every(PLAIN_EVERY_S, _print_line)


def print_event(event: str, values: dict[str, Any]) -> None:
    """One JSON line on stdout."""
    print(json.dumps({"event": event, **values}, ensure_ascii=False), flush=True)


def print_notice(notice: "Notice", *, as_json: bool) -> None:
    """What became of a process: a death on standard error, everything as JSON."""
    if as_json:
        values = asdict(notice)
        print_event("process", {"what": values.pop("event"), **values})
    elif notice.event in ("died", "given_up"):
        what = "died" if notice.event == "died" else "is given up"
        print(f"{notice.device} (process {notice.pid}) {what}: {notice.detail}", file=sys.stderr, flush=True)


def clock(seconds: float | None) -> str:
    """`1:02:03`, `2:03`, or `?`."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def line_of(progress: "Progress") -> str:
    """Everything about a run on one line."""
    return (
        f"{progress.images}/{progress.total_images} images, {_figure(progress.captions_per_s)} captions/s, "
        f"{_figure(progress.tokens_per_s)} tokens/s, queues decode {progress.waiting_decode} "
        f"vision {progress.waiting_model} language {progress.in_model} ({progress.bottleneck}), "
        f"{progress.errors} errors, {clock(progress.eta_s)} left"
        f"{_drafts(progress.drafts)}"
    )


def _drafts(use: "DraftUse") -> str:
    if not use.drafted:
        return ""
    return f", drafts {use.accepted / use.drafted:.0%} right, {use.tokens_per_step:.2f} tokens a step"


def _figure(value: float) -> str:
    """Two digits at least, and no more than are worth reading."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


class _Every:
    def __init__(self, seconds: float, show: Show) -> None:
        self.seconds, self.show = seconds, show
        self.last: float | None = (
            None  # the clock starts with the first progress: loading a model takes its time
        )

    def __call__(self, progress: "Progress") -> None:
        now = time.monotonic()
        if self.last is None:
            self.last = now
        elif now - self.last >= self.seconds:
            self.last = now
            self.show(progress)


def _print_line(progress: "Progress") -> None:
    print(line_of(progress), file=sys.stderr, flush=True)


def _print_json(progress: "Progress") -> None:
    rates = {
        "captions_per_s": round(progress.captions_per_s, 3),
        "tokens_per_s": round(progress.tokens_per_s, 3),
        "eta_s": None if progress.eta_s is None else round(progress.eta_s, 1),
    }
    print_event("progress", {**asdict(progress), "seconds": round(progress.seconds, 3), **rates})


@contextmanager
def _live_bar() -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("recaption", total=None, figures="")

        def show(progress: "Progress") -> None:
            figures = line_of(progress).partition(" images, ")[2]
            bar.update(task, completed=progress.images, total=progress.total_images, figures=figures)

        yield _Every(0.2, show)
