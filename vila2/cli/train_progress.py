"""How a training run shows where it stands: a live bar on a terminal, plain lines elsewhere, or JSON lines."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from vila2.cli.progress import JSON_EVERY_S, PLAIN_EVERY_S, clock, print_event

if TYPE_CHECKING:
    from vila2.train.progress import TrainProgress

Show = Callable[["TrainProgress"], None]


@contextmanager
def shown(as_json: bool) -> Iterator[Show]:
    """What to call with each progress: it shows what is due and ignores the rest."""
    if as_json:
        yield _every(JSON_EVERY_S, lambda progress: print_event("progress", asdict(progress)))
    elif sys.stderr.isatty():
        with _live_bar() as show:
            yield show
    else:
        yield _every(PLAIN_EVERY_S, lambda progress: print(line_of(progress), file=sys.stderr, flush=True))


def line_of(progress: "TrainProgress") -> str:
    """Everything about a run on one line."""
    return (
        f"{progress.stage} ({progress.stage_number}/{progress.num_stages}) "
        f"step {progress.step}/{progress.steps}, {figures_of(progress)}"
    )


def figures_of(progress: "TrainProgress") -> str:
    loss = "no labels" if progress.loss is None else f"loss {progress.loss:.4f}"
    held_out = "" if progress.eval_loss is None else f" (held out {progress.eval_loss:.4f})"
    share = "" if progress.share is None else f" ({progress.share:.0%} of the ceiling)"
    return (
        f"{loss}{held_out}, lr {progress.lr:.2e}, {progress.tokens_per_s:.0f} tokens/s, "
        f"{progress.images_per_s:.3g} images/s, {progress.flops_per_s / 1e9:.3g} GFLOP/s{share}, "
        f"{clock(progress.eta_s)} left"
    )


def _every(seconds: float, show: Show) -> Show:
    """Show at most that often; the first, the last of a stage and every held-out loss are always shown."""
    last: float | None = None

    def due(progress: "TrainProgress") -> None:
        nonlocal last
        now = time.monotonic()
        always = progress.step == progress.steps or progress.eval_loss is not None
        if last is None or always or now - last >= seconds:
            last = now
            show(progress)

    return due


@contextmanager
def _live_bar() -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("train", total=None, figures="")

        def show(progress: "TrainProgress") -> None:
            bar.update(
                task,
                description=f"{progress.stage} {progress.stage_number}/{progress.num_stages}",
                completed=progress.step,
                total=progress.steps,
                figures=figures_of(progress),
            )

        yield _every(0.2, show)
