"""Each operation against its reference and against what this machine can do, measured in the same run.

    python bench/bench_ops.py [--threads N] [--only NAME] [--no-row]

"of peak" compares with the better of the ceilings that apply: a large float32 matrix product for operations that
count arithmetic, a large copy for those that move bytes. Times are medians; the two sides take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from common import append_row, facts

from vila2.ops import capabilities
from vila2.ops.activations import gelu, gelu_reference, silu_mul, silu_mul_reference
from vila2.ops.attention import (
    paged_attention,
    paged_attention_reference,
    rope_store,
    rope_store_reference,
)
from vila2.ops.linear import linear, linear_reference, pack
from vila2.ops.norms import (
    add_rms_norm,
    add_rms_norm_reference,
    layer_norm,
    layer_norm_reference,
    rms_norm,
    rms_norm_reference,
)
from vila2.ops.patches import image_patches, image_patches_reference
from vila2.ops.quant import best_turn, byte_linear, pack_bytes, quantize_weight
from vila2.ops.rope import rope_tables
from vila2.ops.threads import set_threads

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One operation on one shape. `flops` counts arithmetic; where it is 0, `moved` counts bytes instead."""

    op: str
    shape: str
    fast: Call
    reference: Call
    flops: float = 0.0
    moved: float = 0.0


def median_seconds(calls: list[Call], budget_s: float) -> list[float]:
    """The median time of each call. They take turns, so that a slow spell of the machine hits all of them.

    Each turn begins with 10 ms that do not count: the other side's OpenMP threads spin for that long.
    """
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + budget_s
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, taken in zip(calls, times, strict=True):
            turn = time.perf_counter()
            while True:
                call()
                if time.perf_counter() > turn + 0.01:
                    break
            while True:
                start = time.perf_counter()
                call()
                now = time.perf_counter()
                taken.append(now - start)
                if now > turn + 0.04:
                    break
    return [statistics.median(taken) for taken in times]


def linear_cases() -> Iterator[Case]:
    for depth, columns in ((576, 1536), (3072, 768), (1536, 8960)):
        weight = torch.randn(columns, depth) / depth**0.5
        for dtype in (torch.float32, torch.bfloat16):
            packed = pack(weight, None, dtype)
            label = str(dtype).removeprefix("torch.")
            for rows in (1, 8, 32, 256, 1024):
                x = torch.randn(rows, depth)
                yield Case(
                    f"linear {label}",
                    f"{rows} x {depth} x {columns}",
                    lambda x=x, packed=packed: linear(x, packed),
                    lambda x=x, weight=weight: linear_reference(x, weight),
                    flops=2.0 * rows * depth * columns,
                )


def byte_cases() -> Iterator[Case]:
    """int8 against float32 of torch: of a float32 ceiling they may reach more than all."""
    for depth, columns in ((576, 3072), (1536, 576), (768, 3072), (3072, 768), (576, 49152)):
        weight = torch.randn(columns, depth) / depth**0.5
        for narrow in (True, False):
            packed = pack_bytes(quantize_weight(weight, narrow=narrow))
            for rows in (1, 8, 64, 512) if columns < 49152 else (1, 64):
                x = torch.randn(rows, depth)
                yield Case(
                    f"linear int8 {'narrow' if narrow else 'wide'}",
                    f"{rows} x {depth} x {columns}",
                    lambda x=x, packed=packed: byte_linear(x, packed),
                    lambda x=x, weight=weight: linear_reference(x, weight),
                    flops=2.0 * rows * depth * columns,
                )
    weight = torch.randn(576, 1536) / 1536**0.5
    for turn in (1, best_turn(1536)):
        packed = pack_bytes(quantize_weight(weight, narrow=True), turn=turn)
        for rows in (1, 64):
            x = torch.randn(rows, 1536)
            yield Case(
                f"linear int8 turned by {turn}",
                f"{rows} x 1536 x 576",
                lambda x=x, packed=packed: byte_linear(x, packed),
                lambda x=x: linear_reference(x, weight),
                flops=2.0 * rows * 1536 * 576,
            )


def attention_cases() -> Iterator[Case]:
    heads, kv_heads, dim, block_size = 9, 3, 64, 16
    for dtype in (torch.float32, torch.bfloat16):
        for label, sequences in (
            ("decode 1 at 300", [(1, 300)]),
            ("decode 32 at 300", [(1, 300)] * 32),
            ("prefill 224", [(224, 224)]),
            ("prefill 2048", [(2048, 2048)]),
        ):
            blocks = [-(-length // block_size) for _, length in sequences]
            tables = torch.zeros(len(sequences), max(blocks), dtype=torch.int32)
            order = torch.randperm(sum(blocks)).tolist()
            for row, count in enumerate(blocks):
                tables[row, :count] = torch.tensor(order[:count])
                order = order[count:]
            k_cache, v_cache = (
                torch.randn(sum(blocks), kv_heads, block_size, dim).to(dtype) for _ in range(2)
            )
            counts = torch.tensor([0] + [new for new, _ in sequences])
            q = torch.randn(int(counts.sum()), heads, dim)
            arguments = (
                q,
                k_cache,
                v_cache,
                tables,
                counts.cumsum(0).int(),
                torch.tensor([length for _, length in sequences], dtype=torch.int32),
                dim**-0.5,
            )
            pairs = sum(new * (length - (new - 1) / 2) for new, length in sequences)
            yield Case(
                f"attention {str(dtype).removeprefix('torch.')} cache",
                label,
                lambda a=arguments: paged_attention(*a),
                lambda a=arguments: paged_attention_reference(*a),
                flops=4.0 * pairs * heads * dim,
            )


def row_cases() -> Iterator[Case]:
    for rows in (1, 32, 1024):
        for dtype in (torch.float32, torch.bfloat16):
            label = str(dtype).removeprefix("torch.")
            shape = f"{rows} x 576"
            x, residual, weight = (torch.randn(s).to(dtype) for s in ((rows, 576), (rows, 576), (576,)))
            gate_up = torch.randn(rows, 3072).to(dtype)
            size = x.element_size()
            yield Case(
                f"rms_norm {label}",
                shape,
                lambda x=x, w=weight: rms_norm(x, w, 1e-6),
                lambda x=x, w=weight: rms_norm_reference(x, w, 1e-6),
                moved=2.0 * x.numel() * size,
            )
            yield Case(
                f"add_rms_norm {label}",
                shape,
                lambda x=x, r=residual, w=weight: add_rms_norm(x, r, w, 1e-6),
                lambda x=x, r=residual, w=weight: add_rms_norm_reference(x, r, w, 1e-6),
                moved=4.0 * x.numel() * size,
            )
            yield Case(
                f"layer_norm {label}",
                shape,
                lambda x=x, w=weight: layer_norm(x, w, w, 1e-6),
                lambda x=x, w=weight: layer_norm_reference(x, w, w, 1e-6),
                moved=2.0 * x.numel() * size,
            )
            yield Case(
                f"silu_mul {label}",
                f"{rows} x 3072",
                lambda g=gate_up: silu_mul(g),
                lambda g=gate_up: silu_mul_reference(g),
                moved=1.5 * gate_up.numel() * size,
            )
            yield Case(
                f"gelu_pytorch_tanh {label}",
                f"{rows} x 3072",
                lambda g=gate_up: gelu(g, "gelu_pytorch_tanh"),
                lambda g=gate_up: gelu_reference(g, "gelu_pytorch_tanh"),
                moved=2.0 * gate_up.numel() * size,
            )


def other_cases() -> Iterator[Case]:
    cos, sin = rope_tables(64, 10000.0, 4096)
    caches = [torch.zeros(256, 3, 16, 64) for _ in range(2)]
    for tokens in (1, 32, 1024):
        qkv = torch.randn(tokens, 15, 64)
        arguments = (
            qkv[:, :9],
            qkv[:, 9:12],
            qkv[:, 12:],
            torch.arange(tokens),
            torch.randperm(4096)[:tokens],
            cos,
            sin,
            *caches,
        )
        yield Case(
            "rope_store float32",
            f"{tokens} x 9+3+3 x 64",
            lambda a=arguments: rope_store(*a),
            lambda a=arguments: rope_store_reference(*a),
            moved=2.0 * qkv.numel() * 4,
        )
    images = torch.randint(0, 256, (8, 384, 384, 3), dtype=torch.uint8)
    half = (0.5, 0.5, 0.5)
    for dtype in (torch.float32, torch.bfloat16):
        yield Case(
            f"image_patches {str(dtype).removeprefix('torch.')}",
            "8 x 384 x 384, patch 14",
            lambda d=dtype: image_patches(images, 14, half, half, d),
            lambda d=dtype: image_patches_reference(images, 14, half, half, d),
            moved=images.numel() * (1.0 + dtype.itemsize),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="run the operations whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.5, help="how long to measure each row")
    parser.add_argument("--no-row", action="store_true", help="print only; leave bench/results alone")
    options = parser.parse_args()
    set_threads(options.threads)
    torch.manual_seed(0)

    square, big = torch.randn(1536, 1536), torch.randn(64 * 1024 * 1024)
    copy = torch.empty_like(big)
    product_s, copy_s = median_seconds([lambda: square @ square, lambda: copy.copy_(big)], 2.0)
    peak_gflops = 2 * 1536**3 / product_s / 1e9
    peak_gbytes = 2 * big.numel() * 4 / copy_s / 1e9
    print(f"{facts()['device']}, {options.threads} threads, {capabilities().isa}, torch {torch.__version__}")
    print(f"ceilings: matrix product {peak_gflops:.0f} GFLOP/s, copy {peak_gbytes:.1f} GB/s\n")
    print(
        f"{'operation':26} {'shape':26} {'ours us':>10} {'torch us':>10} {'faster':>7} {'rate':>14} {'of peak':>8}"
    )

    for make in (linear_cases, byte_cases, attention_cases, row_cases, other_cases):
        for case in make():
            if options.only not in case.op:
                continue
            ours, reference = median_seconds([case.fast, case.reference], options.seconds)
            rate = (case.flops or case.moved) / ours / 1e9
            unit, peak = ("GFLOP/s", peak_gflops) if case.flops else ("GB/s", peak_gbytes)
            print(
                f"{case.op:26} {case.shape:26} {ours * 1e6:10.1f} {reference * 1e6:10.1f} "
                f"{reference / ours:6.2f}x {rate:6.1f} {unit:7} {rate / peak:7.0%}",
                flush=True,
            )
            if not options.no_row:
                append_row(
                    "ops",
                    {
                        **facts(),
                        "op": case.op,
                        "shape": case.shape,
                        "ours_us": ours * 1e6,
                        "reference_us": reference * 1e6,
                        "faster": reference / ours,
                        "rate": rate,
                        "unit": unit,
                        "ceiling": peak,
                        "of_ceiling": rate / peak,
                    },
                )


if __name__ == "__main__":
    main()
