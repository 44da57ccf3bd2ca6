"""Print captions of an output folder: `python examples/show_captions.py OUT [HOW_MANY]`.

The parts are ordinary Parquet files, one row a (sample, prompt): reading them takes pyarrow, nothing of ours.
"""

import sys
import textwrap
from pathlib import Path

import pyarrow.parquet as pq


def main(out: Path, how_many: int) -> None:
    table = pq.read_table(
        out / "parts", columns=["key", "prompt", "caption", "original", "status", "error_kind"]
    )
    rows = sorted(table.to_pylist(), key=lambda row: (row["key"], row["prompt"]))
    for row in rows[:how_many]:
        print(f"\n{row['key']}  ({row['prompt']}, {row['status']})")
        if row["original"]:
            print(f"  was: {row['original'].strip()}")
        new = row["caption"] if row["status"] != "error" else row["error_kind"]
        print(
            textwrap.fill(" ".join(new.split()), 100, initial_indent="  now: ", subsequent_indent="       ")
        )
    print(f"\n{len(rows)} rows in {out}/parts/*.parquet, the run's figures in {out}/summary.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 4)
