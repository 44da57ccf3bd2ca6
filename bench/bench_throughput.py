"""The rows of `vila2-fast bench throughput` for a checkpoint, over precisions, batch sizes and lengths.

    python bench/bench_throughput.py .cache/llava-small

The engine alone, and the whole pipeline from JPEGs in tars to committed rows; see vila2.evaluate.throughput.
"""

import argparse
from pathlib import Path

from common import append_row, facts

from vila2.config import RecaptionSettings
from vila2.evaluate.throughput import throughput


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "int8"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--new-tokens", nargs="+", type=int, default=[64])
    parser.add_argument("--images", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-row", action="store_true", help="print only; leave bench/results alone")
    args = parser.parse_args()
    shared = facts()  # now: the checkout may change while this runs
    for precision in args.precisions:
        settings = RecaptionSettings(source=".", out=".", model=str(args.checkpoint), precision=precision)
        result = throughput(
            settings,
            batch_sizes=args.batch_sizes,
            new_tokens=args.new_tokens,
            images=args.images,
            rounds=args.rounds,
            observe=lambda line: print(line, flush=True),
        )
        for row in [] if args.no_row else result.rows:
            machine = {"model": args.checkpoint.resolve().name, "precision": precision}
            append_row("throughput", {**shared, **machine, "ceiling_gflops": result.ceiling / 1e9, **row})


if __name__ == "__main__":
    main()
