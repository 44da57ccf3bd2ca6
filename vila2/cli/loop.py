"""`vila2-fast loop`: VILA²'s rounds and specialists as one command that goes on where it stopped."""

import sys
from typing import TYPE_CHECKING

import rich_click as click

if TYPE_CHECKING:
    from vila2.augment.loop import LoopSummary
    from vila2.augment.probe import LoopEstimate
    from vila2.augment.recipe import LoopRecipe

INTERRUPTED_EXIT = 130


@click.command()
@click.argument("recipe")
@click.option("--out", metavar="DIR", help="The run folder; the same command again continues it.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the recipe, like rounds.max=2; repeatable.",
)
@click.option("--until", metavar="STEP", help="Stop after this step, or after all steps below a folder.")
@click.option("--from", "first", metavar="STEP", help="Do this step, and all that follows from it, again.")
@click.option(
    "--seed",
    type=click.IntRange(0),
    metavar="N",
    help="Only this seed's steps, beside processes of other seeds.",
)
@click.option("--dry-run", is_flag=True, help="Show the steps, and what they will take by a measured probe.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines on stdout.")
def loop(
    recipe: str,
    out: str | None,
    overrides: tuple[str, ...],
    until: str | None,
    first: str | None,
    seed: int | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Train, recaption with what was trained, train again: the rounds of RECIPE until the gain saturates, then the
    specialists. Every step that is complete is skipped.

    \b
    vila2-fast loop recipes/loop/world-tiny.toml --out runs/loop
    vila2-fast loop recipe.toml --dry-run
    vila2-fast loop recipe.toml --until round-1
    vila2-fast loop recipe.toml --from round-2/train
    vila2-fast loop recipe.toml --seed 0 & vila2-fast loop recipe.toml --seed 1
    """
    from vila2.augment.recipe import read_loop_recipe

    settings = read_loop_recipe(recipe, overrides, out)
    if dry_run:
        return _dry_run(settings, as_json)
    return _run(settings, until, first, seed, as_json)


def _run(recipe: "LoopRecipe", until: str | None, first: str | None, seed: int | None, as_json: bool) -> int:
    from dataclasses import asdict

    from vila2.augment.loop import Loop
    from vila2.cli.loop_progress import shown
    from vila2.cli.progress import print_event
    from vila2.recaption.interrupt import Interrupts

    interrupts = Interrupts()
    with interrupts.installed(), shown(as_json) as show:
        summary = Loop(recipe, observe=show, interrupts=interrupts, until=until, first=first, seed=seed).run()
    if as_json:
        print_event("summary", asdict(summary))
    else:
        print(_describe(summary))
    if summary.interrupted:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return INTERRUPTED_EXIT
    return 0


def _describe(summary: "LoopSummary") -> str:
    lines = [f"{len(summary.done)} steps done, {summary.skipped} were complete -> {summary.out}"]
    if summary.next_step:
        lines.append(f"next: {summary.next_step}")
    return "\n".join(lines)


def _dry_run(recipe: "LoopRecipe", as_json: bool) -> int:
    from vila2.augment.context import Stopped
    from vila2.augment.probe import estimate
    from vila2.cli.progress import print_event

    try:
        result = estimate(recipe)
    except Stopped:  # the command that makes a small base was told to
        print("stopped; nothing was written", file=sys.stderr)
        return INTERRUPTED_EXIT
    if as_json:
        print_event("estimate", result.to_json())
    else:
        print(_describe_estimate(result))
    return 0


def _describe_estimate(result: "LoopEstimate") -> str:
    from vila2.cli.progress import clock

    lines = [f"{name}: complete" for name in result.complete]
    width = max((len(step.step) for step in result.steps), default=0)
    for step in result.steps:
        figures = f"{clock(step.seconds):>8} {_size(step.disk_bytes):>9}" if step.basis else " " * 18
        lines.append(f"{step.step:<{width}}  {figures}  {step.why}{' (begun)' if step.begun else ''}")
    lines += result.encodes
    money = f", {result.cost:.2f} {result.currency}" if result.cost else ""
    lines.append(
        f"{len(result.steps)} steps left: {clock(result.seconds)} (h:mm:ss), {_size(result.disk_bytes)} on disk"
        f"{money}, on this machine's {result.device}; probed in {result.probe_s:.0f} s. "
        "Rounds after saturation fall away."
    )
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
