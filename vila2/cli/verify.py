"""`vila2-fast verify`: prove that an output folder is complete."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

if TYPE_CHECKING:
    from vila2.data.verify import Finding, VerifyReport


@click.command()
@click.argument("out")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(out: str, as_json: bool) -> int:
    """Prove that every sample of the source has exactly one row a prompt in OUT.

    Exit code 0 if so, 1 if not; what is wrong is counted, with examples. Rows with status error count as rows.

    \b
    vila2-fast verify captions/
    """
    from vila2.data import verify as check
    from vila2.recaption.output import Finished

    finished = Finished(Path(out))
    report = check.verify(finished.out, finished.open_source(), finished.prompts.names)
    if as_json:
        click.echo(json.dumps(_as_json(report)))
        return 0 if report.is_complete else 1
    click.echo(
        f"{report.num_samples} samples, {len(report.prompts)} prompts ({', '.join(report.prompts)}), "
        f"{report.num_rows} rows"
    )
    for title, counts in (("status", report.by_status), ("error_kind", report.by_error_kind)):
        if counts:
            click.echo(f"{title}: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    _show("missing", report.missing)
    _show("more than once", report.duplicate)
    _show("not in the source", report.unknown)
    click.echo("complete" if report.is_complete else "NOT complete")
    return 0 if report.is_complete else 1


def _as_json(report: "VerifyReport") -> dict[str, Any]:
    findings = {"missing": report.missing, "duplicate": report.duplicate, "unknown": report.unknown}
    return {
        "complete": report.is_complete,
        "samples": report.num_samples,
        "prompts": list(report.prompts),
        "rows": report.num_rows,
        "status": dict(report.by_status),
        "error_kind": dict(report.by_error_kind),
        **{name: {"count": f.count, "examples": f.examples} for name, f in findings.items()},
    }


def _show(title: str, finding: "Finding") -> None:
    if finding.count:
        examples = ", ".join(f"{shard}[{index}] {prompt}" for shard, index, prompt in finding.examples)
        click.echo(f"{title}: {finding.count}, such as {examples}")
