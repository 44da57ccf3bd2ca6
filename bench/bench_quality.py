"""How far each precision's captions are from float32's, by what engines are built with.

    python bench/bench_quality.py vila2/checkpoints/nano
    python bench/bench_quality.py .cache/llava-small

Scenes of the synthetic world that no rounding saw, greedy captions of up to 64 tokens, in the terms of `Quality`. Rows:
bf16, int8 with each weight rounded to its nearest step, and int8 as it is built by default. A minute for nano; ten on
two cores for llava-small.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from common import append_row, facts

STEPS = (("bf16", 0), ("int8", 0), ("int8", 16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--precision", choices=["bf16", "int8"], help="this one alone")
    parser.add_argument("--samples", type=int, help="int8 rounded for so many samples alone")
    parser.add_argument("--no-row", action="store_true", help="print only; leave bench/results alone")
    args = parser.parse_args()

    from vila2.backends.engine_build import build_engine
    from vila2.evaluate.calibration import of_world

    world = of_world(args.checkpoint, args.images)
    calibration = replace(world, max_new_tokens=args.new_tokens, max_kl=None, min_agreement=None)
    steps = [(p, n) for p, n in STEPS if args.precision in (None, p)]
    if args.samples is not None:
        steps = [("int8", args.samples)]
    for precision, samples in steps:
        with tempfile.TemporaryDirectory() as folder:
            begin = perf_counter()
            record = build_engine(
                args.checkpoint, Path(folder) / "engine", precision, calibration=calibration, samples=samples
            )
            seconds = perf_counter() - begin
        quality: dict[str, Any] = dict(record.quality or {})
        row = {
            **facts(),
            "model": Path(args.checkpoint).name,
            "precision": precision,
            "samples": samples if precision == "int8" else "",
            "images": quality["images"],
            "tokens": quality["tokens"],
            "kl": quality["next_token_kl"],
            "agreement": quality["greedy_agreement"],
            "free_agreement": quality["free_agreement"],
            "equal": quality["equal_captions"],
            "near_ties": quality["near_ties"],
            "build_s": seconds,
        }
        print(", ".join(f"{key} {value}" for key, value in row.items() if key not in facts()))
        if not args.no_row:
            append_row("quality", row)


if __name__ == "__main__":
    main()
