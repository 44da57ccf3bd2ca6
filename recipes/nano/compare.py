"""Does a nano that was trained again do what its card says? Figures on held-out scenes, beside those that ship.

    python recipes/nano/compare.py runs/nano

Exits 1 if a figure's confidence interval lies wholly on the worse side of the card's.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ship import CHECKPOINTS, TARGETS, measure, trained


def lines(found: Mapping[str, Any], card: Mapping[str, Any]) -> tuple[list[str], int]:
    """A line a figure (`low`, `value` and `high` of both), and how many fall behind the card."""
    shown, behind = [], 0
    for name, (words, _) in TARGETS.items():
        ours, theirs = found.get(name), card.get(name)
        place = _place(ours, theirs, name == "chair.i")
        behind += place == "worse"
        shown.append(f"{words:45} {_percent(ours)}   card {_percent(theirs)}   {place}")
    return shown, behind


def _place(ours: Mapping[str, float] | None, theirs: Mapping[str, float] | None, less_is_better: bool) -> str:
    if ours is None or theirs is None:
        return "worse" if ours is None and theirs is not None else "not on the card"
    if theirs["low"] <= ours["value"] <= theirs["high"]:
        return "within"
    if ours["low"] <= theirs["high"] and theirs["low"] <= ours["high"]:
        return "intervals meet"
    return "worse" if (ours["value"] > theirs["value"]) == less_is_better else "better"


def _percent(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return "nothing to count"
    value, low, high = (100 * figure[key] for key in ("value", "low", "high"))
    return f"{value:5.1f} % ({low:.1f} to {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/nano"))
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--card", type=Path, default=CHECKPOINTS / "nano" / "figures.json")
    args = parser.parse_args()
    card = json.loads(args.card.read_text(encoding="utf-8"))
    behind = 0
    for style, recorded in card.items():
        found = measure(trained(args.run), style, args.scenes).summary()
        shown, worse = lines(found["metrics"], recorded["metrics"])
        print(f"{style} style, {args.scenes} scenes", *shown, sep="\n  ")
        behind += worse
    if behind:
        raise SystemExit(f"{behind} figures are worse than the card's")


if __name__ == "__main__":
    main()
