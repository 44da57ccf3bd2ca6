"""`vila2-fast export`: what trainers read."""

from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

if TYPE_CHECKING:
    from vila2.types import Status

FORMATS = ("jsonl", "llava", "webdataset", "vila")


@click.command()
@click.argument("out")
@click.option("--format", "kind", type=click.Choice(FORMATS), required=True, help="What to write.")
@click.option("--to", metavar="DIR", help="The folder to write. [OUT/export-FORMAT]")
@click.option(
    "--merge",
    type=click.Choice(["replace", "concat", "qa"]),
    default="replace",
    help="New captions instead of the originals, after them, or as answers to their prompts. [replace]",
)
@click.option(
    "--prompt", multiple=True, metavar="NAME", help="Only the captions of this prompt; repeatable. [all]"
)
@click.option(
    "--status",
    multiple=True,
    type=click.Choice(["ok", "truncated", "repetitive"]),
    help="Which captions are good enough; repeatable. [ok]",
)
@click.option(
    "--keep-originals", is_flag=True, help="Keep samples without a good caption, with their original."
)
@click.option("--copy-images", is_flag=True, help="llava: write the images as files too.")
@click.option("--captions-only", is_flag=True, help="webdataset: leave the images out.")
@click.option("--force", is_flag=True, help="Replace what is there.")
def export(
    out: str,
    kind: str,
    to: str | None,
    merge: str,
    prompt: tuple[str, ...],
    status: tuple[str, ...],
    keep_originals: bool,
    copy_images: bool,
    captions_only: bool,
    force: bool,
) -> None:
    """Write the captions of OUT (a recaption's output folder) as files that trainers read.

    jsonl: one object a line. llava: a JSON list of conversations. webdataset: new tars with the images.
    vila: the sidecar store of VILA's own training code.

    \b
    vila2-fast export captions/ --format jsonl
    vila2-fast export captions/ --format llava --merge qa --to train/
    vila2-fast export captions/ --format webdataset --merge concat --keep-originals
    """
    from vila2.recaption.export import ExportOptions
    from vila2.recaption.export import export as write

    options = ExportOptions(
        format=kind,  # type: ignore[arg-type]
        merge=merge,  # type: ignore[arg-type]
        prompts=prompt,
        statuses=_statuses(status),
        keep_originals=keep_originals,
        copy_images=copy_images,
        captions_only=captions_only,
    )
    target = Path(to) if to is not None else Path(out) / f"export-{kind}"
    summary = write(Path(out), target, options, force=force)
    left = f" ({summary.left_out} left out: no usable caption)" if summary.left_out else ""
    click.echo(f"{summary.written} samples{left} -> {summary.folder}")


def _statuses(names: tuple[str, ...]) -> "tuple[Status, ...]":
    from vila2.types import Status

    return tuple(Status(name) for name in names or ("ok",))
