"""`vila2-fast evaluate`: figures with intervals, comparisons, CIDEr of caption files, and a judge."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

if TYPE_CHECKING:
    from vila2.evaluate.evaluation import Comparison, Estimate, Evaluation

click.rich_click.OPTION_GROUPS["*evaluate"] = [
    {
        "name": "A checkpoint on the world",
        "options": [
            "--tasks",
            "--split",
            "--style",
            "--scenes",
            "--seed",
            "--limit",
            "--image-size",
            "--out",
        ],
    },
    {
        "name": "Machine",
        "options": ["--device", "--precision", "--batch-size", "--threads", "--max-new-tokens"],
    },
    {"name": "Two results", "options": ["--compare"]},
    {"name": "Output", "options": ["--json", "--help"]},
]

_WIDE = 1000  # columns: wider than any table


@click.command()
@click.argument("checkpoint", required=False)
@click.option(
    "--tasks",
    default="all",
    show_default=True,
    metavar="A,B",
    help="captions, presence, relation, count, position, color, reading, grounding; or all.",
)
@click.option(
    "--split",
    default="heldout",
    show_default=True,
    metavar="NAME",
    help="Whose scenes: pretrain, instruct, dev, heldout.",
)
@click.option(
    "--style", default="fluent", show_default=True, metavar="NAME", help="How they are drawn: fluent, second."
)
@click.option(
    "--scenes", type=click.IntRange(1), default=500, show_default=True, metavar="N", help="How many scenes."
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, metavar="N", help="Which world."
)
@click.option(
    "--limit", type=click.IntRange(1), metavar="N", help="At most N questions a scene. [all there are]"
)
@click.option(
    "--image-size", type=click.IntRange(16), metavar="N", help="Draw at N pixels. [the model's own size]"
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--precision", default="bf16", show_default=True, metavar="NAME", help="As for recaption.")
@click.option(
    "--batch-size", type=click.IntRange(1), metavar="N", help="Answers written at once. [by memory]"
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads of the model. [all cores]")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=192,
    show_default=True,
    metavar="N",
    help="The longest caption.",
)
@click.option("--out", metavar="FILE", help="Write figures and every answer as JSON.")
@click.option("--compare", nargs=2, metavar="A.json B.json", help="What B changes against A, paired.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(
    checkpoint: str | None,
    tasks: str,
    compare: tuple[str, str] | None,
    out: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure CHECKPOINT on scenes whose truth is known, with 95 % intervals over scenes.

    \b
    vila2-fast evaluate CKPT --tasks all --split heldout --scenes 1000 --out ckpt.json
    vila2-fast evaluate CKPT --tasks captions,presence --style second
    vila2-fast evaluate --compare before.json after.json
    """
    if compare:
        if checkpoint:
            raise click.UsageError("--compare takes two result files and no CHECKPOINT")
        return _compare(*compare, as_json)
    if not checkpoint:
        raise click.UsageError("name a CHECKPOINT, or two results with --compare")
    return _measure(
        checkpoint, [name.strip() for name in tasks.split(",") if name.strip()], out, as_json, settings
    )


def _measure(
    checkpoint: str, tasks: list[str], out: str | None, as_json: bool, settings: dict[str, Any]
) -> None:
    from vila2.evaluate import evaluate as measure

    result = measure(checkpoint, tasks, observe=_progress(), **settings)
    if out:
        result.save(out)
    if as_json:
        click.echo(json.dumps(result.summary()))
    else:
        _show_evaluation(result)
        if out:
            click.echo(f"{len(result.records)} answers -> {out}")


def _compare(a: str, b: str, as_json: bool) -> None:
    from vila2.evaluate import compare, load_evaluation

    result = compare(load_evaluation(Path(a)), load_evaluation(Path(b)))
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        _show_comparison(result)


def _progress() -> Any:
    """A counter on a terminal's stderr; nothing elsewhere."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        print(f"\r{done}/{total} scenes", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


def _show_evaluation(result: "Evaluation") -> None:
    settings = result.settings
    click.echo(
        f"{result.checkpoint}: {len(result.records)} answers in {result.seconds:.1f} s, {settings['scenes']} scenes "
        f"of {settings['split']}, style {settings['style']}, seed {settings['seed']}, {settings['image_size']} px"
    )
    rows = [
        (name, _figure(e.value, e.is_share), _interval(e), f"{e.count:.0f}")
        for name, e in result.metrics.items()
    ]
    _table(("", "value", "95 % interval", "of"), rows)


def _show_comparison(result: "Comparison") -> None:
    click.echo(f"A: {result.a}\nB: {result.b}\n{result.scenes} scenes, paired")
    rows = []
    for name, d in result.metrics.items():
        verdict = ""
        if d.low is not None and d.high is not None and d.better and (d.low > 0 or d.high < 0):
            verdict = "better" if (d.value > 0) == (d.better == "higher") else "worse"
        interval = (
            ""
            if d.low is None or d.high is None
            else f"{_signed(d.low, d.is_share)} to {_signed(d.high, d.is_share)}"
        )
        rows.append(
            (
                name,
                _figure(d.a, d.is_share),
                _figure(d.b, d.is_share),
                _signed(d.value, d.is_share),
                interval,
                f"{d.p:.4f}",
                verdict,
            )
        )
    _table(("", "A", "B", "B - A", "95 % interval", "p", "B is"), rows)


def _figure(value: float, is_share: bool) -> str:
    return f"{value * 100:.1f} %" if is_share else f"{value:.2f}"


def _signed(value: float, is_share: bool) -> str:
    return f"{value * 100:+.1f}" if is_share else f"{value:+.2f}"


def _interval(e: "Estimate") -> str:
    if e.low is None or e.high is None:
        return ""
    scale, digits = (100, 1) if e.is_share else (1, 2)
    return f"{e.low * scale:.{digits}f} to {e.high * scale:.{digits}f}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Columns as wide as what stands in them: a figure is never cut, whatever the terminal's width."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for i, title in enumerate(head):
        table.add_column(title, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=_WIDE, highlight=False).print(table)
