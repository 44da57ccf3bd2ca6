"""`vila2-fast bench`: what this machine reaches with a checkpoint."""

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from vila2.errors import UsageError

if TYPE_CHECKING:
    from vila2.evaluate.throughput import Throughput


@click.group()
def bench() -> None:
    """Measure this machine: how fast it captions with a checkpoint."""


@bench.command()
@click.argument("checkpoint", required=False)
@click.option(
    "--batch-size",
    "batch_sizes",
    type=click.IntRange(1),
    multiple=True,
    metavar="N",
    help="Captions written at once; repeatable. [the engine's choice]",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(1),
    multiple=True,
    default=(64,),
    show_default=True,
    metavar="N",
    help="Length of each caption; repeatable.",
)
@click.option("--images", type=click.IntRange(1), metavar="N", help="A round. [twice the batch, at least 16]")
@click.option(
    "--image-size",
    type=click.IntRange(16, 4096),
    default=512,
    show_default=True,
    metavar="N",
    help="Side of the drawn images.",
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, metavar="N")
@click.option("--pipeline/--no-pipeline", default=True, help="Also from JPEG files to rows on disk.")
@click.option(
    "--precision", default="auto", show_default=True, metavar="NAME", help="float32, bf16, int8 ..."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads of the model. [all cores]")
@click.option("--prompt-text", metavar="TEXT", help="What is asked. [the first wording of `detailed`]")
@click.option("--csv", "table", metavar="FILE", help="Add the rows to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def throughput(
    checkpoint: str | None,
    batch_sizes: tuple[int, ...],
    new_tokens: tuple[int, ...],
    images: int | None,
    image_size: int,
    rounds: int,
    pipeline: bool,
    table: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Images a second of CHECKPOINT (nano, if none is given): the engine alone, and from JPEG files to rows.

    Captions all have the length that is asked for; images are drawn. The share of the ceiling counts what the model's
    products need against this machine's matrix product, measured in the same run.

    \b
    vila2-fast bench throughput CHECKPOINT
    vila2-fast bench throughput CHECKPOINT --batch-size 1 --batch-size 16 --new-tokens 64 --new-tokens 256
    vila2-fast bench throughput CHECKPOINT --precision int8 --csv speed.csv
    """
    from vila2.cli.progress import print_event
    from vila2.config import DEFAULT_MODEL, RecaptionSettings, make_settings
    from vila2.evaluate.throughput import throughput as measure

    if table is not None:
        _check_columns(Path(table))
    given = {name: value for name, value in options.items() if value is not None}
    settings = make_settings(
        RecaptionSettings, {"source": ".", "out": ".", "model": checkpoint or DEFAULT_MODEL, **given}
    )
    result = measure(
        settings,
        batch_sizes=batch_sizes,
        new_tokens=new_tokens,
        images=images,
        image_size=image_size,
        rounds=rounds,
        with_pipeline=pipeline,
        observe=(lambda line: None) if as_json else click.echo,
    )
    if table is not None:
        _add_rows(Path(table), result)
    if as_json:
        print_event("throughput", result.to_json())
    elif result.ceiling:
        click.echo(f"the ceiling: {result.ceiling / 1e9:.4g} GFLOP/s, this machine's matrix product")


def _check_columns(path: Path) -> None:
    """UsageError, before anything is measured, if the file holds something else."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            found = next(csv.reader(file), _columns())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UsageError(f"--csv {path}: {getattr(error, 'strerror', None) or 'not a CSV file'}") from None
    if found != _columns():
        raise UsageError(f"--csv {path}: it has other columns: choose another file")


def _columns() -> list[str]:
    from vila2.evaluate.throughput import COLUMNS

    return ["model", "compute", *COLUMNS]


def _add_rows(path: Path, result: "Throughput") -> None:
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _columns(), lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            for row in result.rows:
                writer.writerow({"model": result.model, "compute": result.compute, **row})
    except OSError as error:
        raise UsageError(f"--csv {path}: {error.strerror}") from None
