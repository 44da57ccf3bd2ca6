"""`vila2-fast engines`: the engines in the cache, whether they still fit, and room made by removing some."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

if TYPE_CHECKING:
    from vila2.backends.trtllm_engine import Listed

_DAY_S = 86400.0


@click.command()
@click.option("--root", metavar="DIR", help="Where the engines are. [the user's cache]")
@click.option(
    "--prune", is_flag=True, help="Remove the invalid, the long unused, and what is beyond --max-gib."
)
@click.option(
    "--max-age-days",
    type=click.FloatRange(0),
    default=60,
    show_default=True,
    metavar="N",
    help="With --prune: how long an engine may be unused.",
)
@click.option(
    "--max-gib",
    type=click.FloatRange(0),
    default=256,
    show_default=True,
    metavar="N",
    help="With --prune: how much may remain; the longest unused go first.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON lines on stdout.")
def engines(root: str | None, prune: bool, max_age_days: float, max_gib: float, as_json: bool) -> None:
    """List built engines: size, age, precision, checkpoint, and whether they are still valid.

    An engine is invalid when its checkpoint has changed, or when it was built with another GPU or version of
    tensorrt_llm than are here.
    """
    from vila2.backends.trtllm_engine import engines_root, list_engines
    from vila2.backends.trtllm_engine import prune as remove

    folder = engines_root() if root is None else Path(root).expanduser()
    versions, gpu = _here()
    listed = list_engines(folder, versions=versions, gpu=gpu)
    removed = []
    if prune:
        removed = remove(folder, listed, max_bytes=int(max_gib * 2**30), max_age_s=max_age_days * _DAY_S)
    gone = {one.path for one in removed}
    if as_json:
        for one in listed:
            click.echo(json.dumps({**one.to_json(), "removed": one.path in gone}))
        return
    for one in listed:
        click.echo(("removed  " if one.path in gone else "") + _line(one))
    left = [one for one in listed if one.path not in gone]
    size = sum(one.num_bytes for one in left) / 2**30
    click.echo(f"{len(left)} engines, {size:.2f} GiB in {folder}")


def _here() -> tuple[dict[str, str] | None, dict[str, Any] | None]:
    """The versions and the GPU to compare with; None where there is no tensorrt_llm to run an engine."""
    from vila2.backends.trtllm_api import load_api
    from vila2.backends.trtllm_build import this_gpu
    from vila2.errors import UsageError

    try:
        return dict(load_api().versions), this_gpu()
    except UsageError as error:
        print(f"TensorRT-LLM engines are not compared with this machine: {error}", file=sys.stderr)
        return None, None


def _line(one: "Listed") -> str:
    now = time.time()
    state = "valid" if not one.problem else f"invalid: {one.problem}"
    return (
        f"{one.path.name}  {one.backend} {one.precision}  {one.num_bytes / 2**20:.1f} MiB  "
        f"built {_ago(now - one.created)}, used {_ago(now - one.used)}  {one.checkpoint}  {state}"
    )


def _ago(seconds: float) -> str:
    for unit, length in (("days", _DAY_S), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"
