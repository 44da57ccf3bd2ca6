"""How good `loop --dry-run` is: its estimate of a whole small loop, then that loop, kind of step by kind of step.

    python bench/loop_estimate.py                             (a minute or two on a quiet core)
    python bench/loop_estimate.py recipes/loop_quick.toml

On an otherwise idle machine: the estimate is measured before the loop, so other work must not come or go between.
"""

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from common import ROOT, append_row, facts

from vila2.augment.ledger import read_ledger
from vila2.augment.loop import Loop
from vila2.augment.probe import estimate, folder_bytes
from vila2.augment.recipe import read_loop_recipe

KINDS = ("source", "base", "train", "recaption", "evaluate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default=str(ROOT / "recipes" / "loop" / "world-tiny.toml"))
    parser.add_argument("--until", help="as of vila2-fast loop")
    parser.add_argument("--no-row", action="store_true", help="print only; leave bench/results alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vila2-loop-") as folder:
        run = Path(folder) / "run"
        recipe = read_loop_recipe(args.recipe, out=str(run))
        planned = estimate(recipe)
        Loop(recipe, until=args.until).run()
        lines = {line["step"]: line for line in read_ledger(run / "ledger.jsonl")}
        of_kind: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        disk = [0, 0]
        for step in planned.steps:
            if step.step in lines:  # the others: rounds that saturation ended, or after --until
                of_kind[step.kind][0] += step.seconds
                of_kind[step.kind][1] += lines[step.step]["seconds"]
                disk[0] += step.disk_bytes
        disk[1] = folder_bytes(run)
    of_kind["all"] = [sum(values[i] for values in of_kind.values()) for i in (0, 1)]
    rows: dict[str, list[Any]] = {name: of_kind[name] for name in (*KINDS, "all") if name in of_kind}
    rows["disk, MB"] = [size / 1e6 for size in disk]
    for name, (expected, actual) in rows.items():
        ratio = expected / actual
        print(f"{name:10} estimated {expected:8.1f}   was {actual:8.1f}   {ratio:.2f} times")
        if not args.no_row:
            what = {"recipe": Path(args.recipe).stem, "of": name, "estimated": expected, "was": actual}
            append_row("loop_estimate", {**facts(), **what, "times": ratio})


if __name__ == "__main__":
    main()
