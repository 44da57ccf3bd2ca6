"""`vila2-fast world`: scenes with ground truth, as tars that every command reads, or as one picture to look at."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

if TYPE_CHECKING:
    from vila2.world.shards import ShardPlan

SPLITS = (
    "pretrain",
    "instruct",
    "dev",
    "heldout",
)  # a test compares these with vila2.world, which imports numpy
STYLES = ("fluent", "second")
TEXTS = ("alt", "detailed", "brief", "spatial", "grounding", "ocr", "layout")
PLAN = "world.json"
MEASURED = 5000  # scenes whose alt-texts are counted for the last line


@click.group()
def world() -> None:
    """Scenes of known objects: rendered images with true (or web-like) texts and every fact about them."""


@world.command()
@click.argument("folder", metavar="DIR")
@click.option("--scenes", type=click.IntRange(min=1), required=True, help="How many.")
@click.option("--seed", type=int, default=0, help="Another seed is another world. [0]")
@click.option(
    "--split", type=click.Choice(SPLITS), default="pretrain", help="No two share a scene. [pretrain]"
)
@click.option("--image-size", type=click.IntRange(min=16, max=2048), default=128, help="Pixels a side. [128]")
@click.option("--style", type=click.Choice(STYLES), default="fluent", help="How things are drawn. [fluent]")
@click.option("--text", type=click.Choice(TEXTS), default="alt", help="What KEY.txt holds. [alt]")
@click.option(
    "--shard-size", type=click.IntRange(min=1, max=100_000), default=1000, help="Scenes a tar. [1000]"
)
@click.option("--format", "image_format", type=click.Choice(["jpg", "png"]), default="jpg", help="[jpg]")
@click.option("--wrong", type=click.FloatRange(0, 1), help="How many names in alt-texts are wrong. [0.15]")
@click.option("--vague", type=click.FloatRange(0, 1), help="How many alt-texts name nothing. [0.10]")
@click.option(
    "--junk", type=click.FloatRange(0, 1), help="How many alt-texts are about something else. [0.10]"
)
@click.option("--sign", type=click.FloatRange(0, 1), help="How many scenes have a sign. [0.40]")
@click.option("--themes", default="", metavar="A,B", help="Only names of these themes, like farm,home. [all]")
@click.option("--sign-words", type=click.IntRange(1), metavar="N", help="Signs carry one of N words. [all]")
def make(folder: str, **options: Any) -> None:
    """Write scenes to DIR as WebDataset tars: KEY.jpg, KEY.txt (a text), KEY.json (the whole truth).

    The same command gives the same bytes; one that was interrupted goes on where it stopped.

    \b
    vila2-fast world make scenes/ --scenes 10000 --seed 1
    vila2-fast recaption scenes/ --out captions/
    """
    from vila2.data.files import atomic_write, make_folder, write_error
    from vila2.world.shards import shard_bytes

    plan = _plan(options)
    target = Path(folder)
    make_folder(target)
    _claim(target, plan)
    missing = [(name, scenes) for name, scenes in plan.shards() if not (target / name).exists()]
    with _bar(sum(len(scenes) for _, scenes in missing)) as step:
        for name, scenes in missing:
            data = shard_bytes(plan, scenes, step)
            try:
                atomic_write(target / name, data)
            except OSError as exc:
                raise write_error(target / name, exc) from exc
    _report(target, plan, len(missing))


@world.command()
@click.argument("file", metavar="FILE.png")
@click.option("--scenes", type=click.IntRange(min=1, max=1000), default=24, help="How many. [24]")
@click.option("--first", type=click.IntRange(min=0), default=0, help="The number of the first scene. [0]")
@click.option("--seed", type=int, default=0, help="[0]")
@click.option("--split", type=click.Choice(SPLITS), default="pretrain", help="[pretrain]")
@click.option("--image-size", type=click.IntRange(min=16, max=512), default=168, help="Pixels a side. [168]")
@click.option("--style", type=click.Choice(STYLES), default="fluent", help="[fluent]")
@click.option("--text", type=click.Choice(TEXTS), default="detailed", help="What stands below. [detailed]")
def sheet(
    file: str, scenes: int, first: int, seed: int, split: str, image_size: int, style: str, text: str
) -> None:
    """Draw scenes on one picture, each with a text below it.

    \b
    vila2-fast world sheet scenes.png --split heldout --style second
    """
    from vila2.data.files import atomic_write, write_error
    from vila2.world import World, WorldSettings
    from vila2.world.shards import text_of
    from vila2.world.sheet import sheet_png

    made = World(WorldSettings(image_size=image_size, seed=seed, style=style))
    shown = [made.scene(split, first + number) for number in range(scenes)]
    data = sheet_png([made.render(s) for s in shown], [text_of(s, text, made.settings.alt) for s in shown])
    try:
        atomic_write(Path(file), data)
    except OSError as exc:
        raise write_error(Path(file), exc) from exc
    click.echo(f"{scenes} scenes -> {file}")


def _plan(options: dict[str, Any]) -> "ShardPlan":
    from vila2.world import AltNoise, WorldSettings
    from vila2.world.shards import ShardPlan

    def given(**named: Any) -> dict[str, Any]:
        return {name: value for name, value in named.items() if value is not None}

    noise = AltNoise(**given(wrong=options["wrong"], vague=options["vague"], junk=options["junk"]))
    settings = WorldSettings(
        image_size=options["image_size"],
        seed=options["seed"],
        style=options["style"],
        alt=noise,
        themes=tuple(name.strip() for name in options["themes"].split(",") if name.strip()),
        **given(sign=options["sign"], sign_words=options["sign_words"]),
    )
    return ShardPlan(
        settings,
        split=options["split"],
        scenes=options["scenes"],
        text=options["text"],
        format=options["image_format"],
        shard_size=options["shard_size"],
    )


def _claim(target: Path, plan: "ShardPlan") -> None:
    """Write the plan into the folder, or check that the one there is the same."""
    from vila2.data.files import atomic_write, write_error
    from vila2.errors import UsageError

    file = target / PLAN
    text = json.dumps(plan.record(), indent=2) + "\n"
    if file.exists():
        if file.read_text(encoding="utf-8") != text:
            raise UsageError(f"{target} holds a world of other settings (see {file}); choose another folder")
        return
    if any(target.glob("*.tar")):
        raise UsageError(f"{target} holds tars of another origin; choose another folder")
    try:
        atomic_write(file, text.encode())
    except OSError as exc:
        raise write_error(file, exc) from exc


def _report(target: Path, plan: "ShardPlan", made: int) -> None:
    from vila2.world import World
    from vila2.world.texts import alt_rates

    shards = len(plan.shards())
    kept = f" ({shards - made} were there)" if made < shards else ""
    click.echo(f"{plan.scenes} scenes in {shards} tars{kept} -> {target}")
    if plan.text == "alt":
        measured = min(plan.scenes, MEASURED)
        rates = alt_rates(World(plan.settings), plan.split, measured)
        words = rates.pop("words")
        shown = ", ".join(f"{rate:.1%} {kind}" for kind, rate in rates.items())
        of = f"of the first {measured} " if measured < plan.scenes else ""
        click.echo(f"  {of}alt-texts: {shown}; {words:.1f} words each")


@contextmanager
def _bar(total: int) -> Iterator[Callable[[], None]]:
    """What to call after each scene: a bar on a terminal, nothing elsewhere."""
    if not total or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("scenes", total=total)
        yield lambda: bar.advance(task)
