"""Where our product is faster and where a library's: by the number of rows, for the shapes of llava-small.

    python bench/bench_crossovers.py

The library is torch: oneDNN or its BLAS for float32 and for bfloat16 (whichever of the two types it multiplies faster
here: a user may keep float32 weights), FBGEMM's dynamic products for bytes. The head over the vocabulary is measured to
its best token: product and argmax, or both in one pass. The two sides take turns; medians. A number above 1 says how
many times faster ours is. "library from" is the least number of rows from which on it is faster by more than 3 %.
"""

import argparse
import warnings
from collections.abc import Callable

import torch
from bench_ops import median_seconds
from common import append_row, facts
from torch.nn import functional

from vila2.ops.linear import Linear, linear, pack
from vila2.ops.quant import byte_linear, pack_bytes, quantize_weight
from vila2.ops.threads import set_threads
from vila2.ops.top import linear_top

ROWS = (1, 4, 16, 64, 256, 1024)
HEAD_ROWS = (1, 4, 16, 64)
SHAPES = {  # (columns, depth)
    "decoder q, k, v": (960, 576),
    "decoder gate, up": (3072, 576),
    "decoder down": (576, 1536),
    "vision fc1": (3072, 768),
    "vision fc2": (768, 3072),
}
HEAD = (49152, 576)
MARGIN = 1.03


def ours(precision: str, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    if precision == "int8":
        packed = pack_bytes(quantize_weight(weight, narrow=True))
        return lambda x: byte_linear(x, packed)
    stored = pack(weight, None, getattr(torch, precision))
    return lambda x: linear(x, stored)


def library(precision: str, weight: torch.Tensor) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """The library's ways; the fastest of them counts."""
    if precision == "float32":
        return [lambda x: functional.linear(x, weight)]
    if precision == "bfloat16":
        narrow = weight.bfloat16()
        return [
            lambda x: functional.linear(x, weight),
            lambda x: functional.linear(x.bfloat16(), narrow).float(),
        ]
    scales = weight.abs().amax(1) / 127
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this way of quantising will be another one some day
        values = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(values, None)
    return [lambda x: torch.ops.quantized.linear_dynamic(x, packed, True)]


def head_of_ours(precision: str, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    head = Linear(weight.shape[1], weight.shape[0], bias=False)
    if precision == "int8":
        head.set_packed(pack_bytes(quantize_weight(weight, narrow=True)))
    else:
        head.set_packed(pack(weight, None, getattr(torch, precision)))
    none = torch.empty(0, dtype=torch.int64)
    return lambda x: linear_top(x, head, 1, none, torch.zeros(len(x), dtype=torch.uint8))[1]


def best_of(
    products: list[Callable[[torch.Tensor], torch.Tensor]],
) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    return [lambda x, p=product: p(x).argmax(-1) for product in products]


def crossover(times: dict[int, float]) -> str:
    """The least rows from which on the library is faster; "never"."""
    least = ""
    for rows, faster in reversed(times.items()):
        if faster * MARGIN >= 1:
            break
        least = str(rows)
    return least or "never"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.3, help="how long to measure each pair")
    parser.add_argument("--no-row", action="store_true", help="print only; leave bench/results alone")
    options = parser.parse_args()
    set_threads(options.threads)
    torch.manual_seed(0)

    for precision in ("float32", "bfloat16", "int8"):
        for name, shape in {**SHAPES, "head, against product and argmax": HEAD}.items():
            weight = torch.randn(shape) / shape[1] ** 0.5
            if shape == HEAD:  # our own product and argmax are what the pass replaces
                fast, slow = head_of_ours(precision, weight), best_of([ours(precision, weight)])
            else:
                fast, slow = ours(precision, weight), library(precision, weight)
            times: dict[int, float] = {}
            for rows in HEAD_ROWS if shape == HEAD else ROWS:
                x = torch.randn(rows, shape[1])
                seconds = median_seconds(
                    [lambda x=x, way=way: way(x) for way in (fast, *slow)], options.seconds
                )
                times[rows] = min(seconds[1:]) / seconds[0]
            line = "  ".join(f"{rows}: {faster:.2f}" for rows, faster in times.items())
            print(f"{precision:9} {name:34} {line}  library from: {crossover(times)}", flush=True)
            if options.no_row:
                continue
            row = {
                **facts(),
                "threads": options.threads,
                "precision": precision,
                "product": f"{name} ({shape[1]} x {shape[0]})",
                **{f"rows_{rows}": times.get(rows, "") for rows in ROWS},
                "library_from": crossover(times),
            }
            append_row("crossovers", row)


if __name__ == "__main__":
    main()
