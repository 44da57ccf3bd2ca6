"""Print captions of an output folder: `python examples/show_captions.py OUT [HOW_MANY] [--original NAME]`.

The parts are ordinary Parquet files, one row a (sample, prompt): reading them takes pyarrow, nothing of ours.
"""

import argparse
import textwrap
from pathlib import Path

import pyarrow.parquet as pq


def show(label: str, text: str) -> None:
    print(
        textwrap.fill(" ".join(text.split()), 100, initial_indent=f"  {label}: ", subsequent_indent="     ")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("how_many", type=int, nargs="?", default=4)
    parser.add_argument("--original", default="was", help="what to call the text that a sample came with")
    args = parser.parse_args()
    table = pq.read_table(
        args.out / "parts", columns=["key", "prompt", "caption", "original", "status", "error_kind"]
    )
    rows = sorted(table.to_pylist(), key=lambda row: (row["key"], row["prompt"]))
    for row in rows[: args.how_many]:
        print(f"\n{row['key']}  ({row['prompt']}, {row['status']})")
        if row["original"]:
            show(args.original, row["original"])
        show("now", row["caption"] if row["status"] != "error" else row["error_kind"])
    print(f"\n{len(rows)} rows in {args.out}/parts/*.parquet, the run's figures in {args.out}/summary.json")


if __name__ == "__main__":
    main()
