"""Everything that wants a GPU, in one command: kernels, captions end to end, FP8 and int4, training, JPEG decoding.

    python bench/gpu_check.py [--minutes 8] [--only kernels,captions,precision,training,decode] [--commit ID] [--dry]

Each bar is a ratio measured in this run. Rows go to bench/results/gpu.csv and a short table is printed last; the exit
status is 1 if a result is wrong (a bar that is missed is said, and is no failure). It needs torch, triton and
transformers (and torchvision for JPEG) and no installed vila2, git or network. `--dry` runs the same code on tiny
shapes without a GPU, the kernels in Triton's interpreter, and writes no rows.

Each section has a share of the time, which one that is done early leaves to those after it; what a section has no time
for is skipped, and said. Nothing is begun in the last tenth, so that what has begun can end.
"""

import argparse
import gc
import importlib.util
import os
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Section -> its share of the time: captions load models of 3 and 8 billion parameters and run them twice.
SHARES = {"kernels": 0.26, "captions": 0.36, "precision": 0.22, "training": 0.12, "decode": 0.04}
SECTIONS = tuple(SHARES)
_BEGIN_WITHIN = 0.9  # of the time


def prepare_imports(dry: bool) -> None:
    """Make vila2 and its kernels importable from the tree, and choose the interpreter before a kernel is defined."""
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
    for folder in (str(ROOT), str(ROOT / "bench")):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    if importlib.util.find_spec("vila2.kernels") is None:
        package = types.ModuleType("vila2.kernels")
        package.__path__ = [str(ROOT / "kernels")]
        sys.modules["vila2.kernels"] = package
    if dry:
        from vila2.kernels.interpreter import mend_interpreter

        mend_interpreter()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="be done after about this many")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--commit", default="", help="what to write into the rows where git cannot say it")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, no GPU, no rows")
    options = parser.parse_args()
    prepare_imports(options.dry)
    import torch

    if not options.dry and not torch.cuda.is_available():
        print(
            "gpu_check: torch sees no CUDA device here; --dry runs the same code without one", file=sys.stderr
        )
        return 2
    return run(options.only.split(","), options.minutes, dry=options.dry, commit=options.commit)


def deadlines(sections: list[str], seconds: float) -> list[float]:
    """When each section must begin nothing more, in seconds from the start."""
    whole = sum(SHARES[name] for name in sections)
    ends = accumulate(SHARES[name] / whole for name in sections)
    return [_BEGIN_WITHIN * seconds * end for end in ends]


def run(sections: list[str], minutes: float, *, dry: bool, commit: str = "") -> int:
    """Run the sections in order while there is time; returns the exit status."""
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        print(f"gpu_check: unknown section {unknown[0]!r}; known are {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    import gpu_captions
    import gpu_decode
    import gpu_kernels
    import gpu_low_bits
    import gpu_training
    from gpu_report import Report, device_facts

    modules: dict[str, Callable[..., Iterator[object]]] = {
        "kernels": gpu_kernels.measure,
        "captions": gpu_captions.measure,
        "precision": gpu_low_bits.measure,
        "training": gpu_training.measure,
        "decode": gpu_decode.measure,
    }
    facts = device_facts(dry=dry)
    report = Report({**facts, "commit": facts["commit"] or commit}, keeps_rows=not dry)
    start = time.monotonic()
    for name, end in zip(sections, deadlines(sections, 60 * minutes), strict=True):
        deadline = start + end
        if time.monotonic() > deadline:
            report.skip(name, "no time was left")
            continue
        try:
            for result in modules[name](report, dry=dry, deadline=deadline):
                report.add(name, result)
        except Exception:
            # One broken part must not hide the figures of the others.
            report.fail(name, traceback.format_exc())
        release(dry=dry)
    return report.close()


def release(*, dry: bool) -> None:
    """Give back what a section held, so that the next one finds the card as the first one did."""
    import torch

    gc.collect()
    if not dry:
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
