"""`vila2-fast report`: what a loop came to, as a table and as one page to look at."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

if TYPE_CHECKING:
    from vila2.augment.results import Against, Results

FILE_NAME = "report.html"
_WIDE = 1000  # columns: wider than any table
_FIRST = (
    "objects.f1",
    "chair.i",
    "captions.relations_true",
    "relation.accuracy",
    "reading.exact",
    "grounding.accuracy",
    "pope.f1",
)


@click.command()
@click.argument("run")
@click.option("--out", metavar="FILE", help="Where the page goes. [RUN/report.html]")
@click.option(
    "--metric", "metrics", multiple=True, metavar="NAME", help="Only these; repeatable. [the main ones]"
)
@click.option("--all", "every", is_flag=True, help="Every metric.")
@click.option(
    "--images", type=click.IntRange(0), default=60, show_default=True, help="Images in the gallery."
)
@click.option(
    "--markdown", "as_markdown", is_flag=True, help="Print tables for a README: every metric, and gains."
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def report(
    run: str,
    out: str | None,
    metrics: tuple[str, ...],
    every: bool,
    images: int,
    as_markdown: bool,
    as_json: bool,
) -> None:
    """Write the report of the loop in the folder RUN: metrics by round with 95 % intervals over scenes and seeds,
    against the controls and the oracle.

    \b
    vila2-fast report runs/loop-tiny
    vila2-fast report runs/loop --all --json > results.json
    vila2-fast report runs/loop --out docs/loop.html --images 40 --markdown
    """
    from vila2.augment.results import read_results
    from vila2.report.page import write_page

    results = read_results(Path(run))
    page = Path(out) if out else Path(run) / FILE_NAME
    write_page(page, results, images)
    if as_json:
        click.echo(json.dumps(results.to_json(), ensure_ascii=False))
        return
    if as_markdown:
        _print_markdown(results, metrics, every)
        return
    _show(results, metrics, every)
    click.echo(f"the page: {page}")


def _show(results: "Results", metrics: tuple[str, ...], every: bool) -> None:
    from vila2.augment.results import table

    for split, found in results.metrics.items():
        names = list(found) if every else [name for name in metrics or _FIRST if name in found]
        click.echo(f"{split} ({results.say_seeds()}; 95 % intervals; shares in per cent)")
        _table(table(results, split, names))
        shown = [pair for pair in results.against[split] if "best round" in (pair.model, pair.other)]
        for pair in shown or results.against[split]:
            click.echo(_gains(pair, names, results))
        click.echo("")
    for text in results.encodes:
        click.echo(text)


def _print_markdown(results: "Results", metrics: tuple[str, ...], every: bool) -> None:
    """The test split, or dev where nothing else was measured; specialists, which are means, on dev."""
    from vila2.augment.results import markdown, specialists_markdown

    split = next(iter(results.metrics))
    click.echo(
        f"{split} split, {results.say_seeds()}; 95 % intervals over scenes and seeds; shares in per cent. "
        "Gains are counted so that more is better, and bold where their interval leaves 0 out.\n"
    )
    main = list(results.metrics[split]) if every else metrics or _FIRST
    click.echo("\n".join(markdown(results, split, metrics, main)))
    specialists = specialists_markdown(results, "dev", main)
    if specialists:
        click.echo("\nThe specialists themselves, dev split:\n")
        click.echo("\n".join(specialists))


def _gains(pair: "Against", names: list[str], results: "Results") -> str:
    told = []
    for name in names:
        gain = pair.gains.get(name)
        if gain is None:
            continue
        scale, digits = (100.0, 1) if name in results.shares else (1.0, 2)
        text = f"{name} {gain.value * scale:+.{digits}f}"
        if gain.low is not None and gain.high is not None:
            text += f" ({gain.low * scale:+.{digits}f} to {gain.high * scale:+.{digits}f})"
        told.append(text)
    return f"{pair.model} over {pair.other}: {'; '.join(told)}"


def _table(rows: list[list[str]]) -> None:
    """Columns as wide as what stands in them: a figure is never cut, whatever the terminal's width."""
    from rich.console import Console
    from rich.table import Table

    head, *body = rows
    table = Table(box=None, pad_edge=False)
    for i, title in enumerate(head):
        table.add_column(title, justify="left" if i == 0 else "right", no_wrap=True)
    for row in body:
        table.add_row(*row)
    Console(width=_WIDE, highlight=False, markup=False).print(table)
