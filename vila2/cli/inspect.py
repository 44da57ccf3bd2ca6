"""`vila2-fast inspect`: what a checkpoint is, from its headers alone."""

import json
from typing import Any

import rich_click as click


@click.command()
@click.argument("checkpoint")
@click.option(
    "--digest/--no-digest", default=True, help="Also hash the weights (about 1 s a GB, the first time)."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(checkpoint: str, digest: bool, as_json: bool) -> None:
    """Check CHECKPOINT (or an engine directory) and say what it is, or what is wrong. Reads no weights into memory.

    \b
    vila2-fast inspect VILA1.5-3b/
    """
    from dataclasses import asdict

    from vila2.backends.engine_dir import is_engine, read_engine
    from vila2.model.checkpoint import inspect_checkpoint

    if is_engine(checkpoint):
        record = read_engine(checkpoint).to_json()
        if as_json:
            click.echo(json.dumps(record, indent=2))
        else:
            click.echo("\n".join(f"{name}: {_short(value)}" for name, value in record.items()))
        return
    info = inspect_checkpoint(checkpoint)
    report: dict[str, Any] = {
        "path": str(info.path),
        "kind": info.kind,
        "parameters": info.num_parameters,
        "bytes": info.num_bytes,
        "dtypes": dict(info.dtypes),
        "digest": info.digest if digest else None,
        "config": asdict(info.config),
    }
    if as_json:
        click.echo(json.dumps(report, indent=2, default=str))
        return
    types = ", ".join(f"{count / 1e6:.1f} M {name}" for name, count in report["dtypes"].items())
    click.echo(f"{report['path']}: {report['kind']}, {report['parameters'] / 1e6:.1f} M parameters ({types})")
    click.echo(f"  {report['bytes'] / 2**30:.2f} GiB" + (f", digest {report['digest']}" if digest else ""))
    for name, value in report["config"].items():
        click.echo(f"  {name}: {_short(value)}")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={_short(inner)}" for name, inner in value.items() if inner is not None)
    return str(value)
