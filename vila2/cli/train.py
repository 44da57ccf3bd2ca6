"""`vila2-fast train`: a recipe carried out."""

import os
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

import rich_click as click

if TYPE_CHECKING:
    from vila2.train.estimate import RunEstimate
    from vila2.train.progress import TrainProgress
    from vila2.train.recipe import Recipe
    from vila2.train.trainer import RunSummary

INTERRUPTED_EXIT = 130
_FOREVER = (
    1e6  # a step is finished before the run stops, however long it takes; a second signal ends it at once
)


@click.command()
@click.argument("recipe")
@click.option("--out", metavar="DIR", help="The run folder; the same command again continues it.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the recipe, like stage.align.lr=1e-4; repeatable.",
)
@click.option("--until", metavar="STAGE[:STEP]", help="Stop after this stage, or in it after this step.")
@click.option("--threads", type=int, metavar="N", help="CPU threads. [all cores, shared by the processes]")
@click.option("--dry-run", is_flag=True, help="Show the stages, parameters, time and disk; train nothing.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines on stdout.")
def train(
    recipe: str,
    out: str | None,
    overrides: tuple[str, ...],
    until: str | None,
    threads: int | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Train the model of a RECIPE (TOML or YAML): stage after stage, from data to a checkpoint.

    \b
    vila2-fast train recipes/train/tiny.toml --out runs/tiny
    vila2-fast train recipe.toml --set stage.sft.lr=1e-5 --dry-run
    torchrun --nproc-per-node 8 -m vila2.cli train recipe.toml
    """
    from vila2.train.recipe import read_recipe

    if threads is not None:
        overrides = (*overrides, f"threads={threads}")
    settings = read_recipe(recipe, overrides, out)
    return _dry_run(settings, as_json) if dry_run else _train(settings, until, as_json)


def _train(recipe: "Recipe", until: str | None, as_json: bool) -> int:
    from dataclasses import asdict

    from vila2.cli.progress import print_event
    from vila2.cli.train_progress import shown
    from vila2.recaption.interrupt import Interrupts
    from vila2.train.trainer import Trainer

    interrupts = Interrupts(grace_s=_FOREVER)
    with interrupts.installed(), shown(as_json) if _is_first() else nullcontext(_nothing) as show:
        trainer = Trainer(recipe, observe=show, interrupts=interrupts, until=until)
        summary = trainer.run()
    if not trainer.is_main:
        return 0
    if as_json:
        print_event("summary", asdict(summary))
    else:
        print(_describe(summary))
    if summary.interrupted:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return INTERRUPTED_EXIT
    return 0


def _dry_run(recipe: "Recipe", as_json: bool) -> int:
    from dataclasses import asdict

    from vila2.cli.progress import print_event
    from vila2.train.estimate import estimate

    result = estimate(recipe)
    if not _is_first():
        return 0
    if as_json:
        print_event("estimate", asdict(result))
    else:
        print(_describe_estimate(result))
    return 0


def _is_first() -> bool:
    """Is this the one of a launcher's processes that speaks for all? Known before they have joined."""
    return os.environ.get("RANK", "0") == "0"


def _nothing(progress: "TrainProgress") -> None:
    pass


def _describe(summary: "RunSummary") -> str:
    """The end of a run, for a person."""
    from vila2.cli.progress import clock

    lines = [
        f"{stage.name}: {stage.steps} steps, {stage.tokens} tokens and {stage.images} images in "
        f"{clock(stage.seconds)} -> {stage.checkpoint}"
        for stage in summary.stages
    ]
    if summary.already_done:
        lines.insert(0, f"{summary.already_done} stages were done already")
    if not summary.stages and summary.checkpoint:
        lines.append(f"the checkpoint: {summary.checkpoint}")
    return "\n".join(lines) or f"no stage is done yet -> {summary.out}"


def _describe_estimate(result: "RunEstimate") -> str:
    from vila2.cli.progress import clock

    lines = [f"{result.parameters / 1e6:.2f} M parameters, {result.precision}, {result.threads} threads"]
    for stage in result.stages:
        parts = ", ".join(f"{part} {count / 1e6:.2f} M" for part, count in stage.trainable.items() if count)
        lines.append(
            f"{stage.name}: {stage.steps} steps of {stage.batch_examples} examples; trains {parts}; "
            f"{stage.step_s:.3g} s a step, {clock(stage.seconds)}"
        )
    lines.append(
        f"in all: {clock(result.seconds)} (h:mm:ss, from {result.probed_steps} steps a stage), "
        f"{result.disk_bytes / 2**20:.1f} MiB on disk"
    )
    return "\n".join(lines)
