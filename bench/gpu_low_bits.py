"""FP8 and 4-bit weights on a GPU: each product against its reference and its rivals, then captions with both.

A product in FP8 by torch's `_scaled_mm` is what the engine runs on capability 9.0; the Triton one beside it is what 8.9
and odd sizes get. For 4-bit weights both ways are timed on both sides of `MAX_FUSED_ROWS`, which is a prediction until
this has run. Captions are those of `gpu_captions`, random weights rounded on the device; what weights hold changes no
time, so nothing is scaled or clipped for it.
"""

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import gpu_captions
import torch
from gpu_kernels import BF16, Case, Shapes, results_of, shapes_for
from gpu_report import Report, Result
from torch.nn import functional

FP8 = torch.float8_e4m3fn
FEW_ROWS = (1, 16, 64, 256, 1024)


def measure(report: Report, *, dry: bool, deadline: float) -> Iterator[Result]:
    """Results of products and of what comes before them, then captions a second in each precision."""
    shapes = shapes_for(report)
    lack = None if dry else _lack()
    if lack is not None:
        report.skip("fp8", lack)
    makers = (int4_cases,) if lack is not None else (fp8_cases, before_cases, int4_cases)
    for make in makers:
        for case in make(shapes):
            if time.monotonic() > deadline:
                report.skip(case.name, "no time was left")
                return
            yield from results_of(report, case)
    yield from _captions(report, ("int4",) if lack is not None else ("fp8", "int4"), dry, deadline)


def _lack() -> str | None:
    from vila2.ops.fp8 import fp8_lack

    return fp8_lack()


def fp8_cases(s: Shapes) -> Iterator[Case]:
    """The product of one layer, for many rows (arithmetic) and for a batch that decodes (bytes of weights)."""
    from vila2.kernels.fp8_linear import fp8_product_triton
    from vila2.ops.fp8 import fp8_product, fp8_product_reference, quantize_fp8_weight
    from vila2.ops.token_quant import quantize_tokens_reference

    plain = s.randn(2 * s.inner, s.hidden) / s.hidden**0.5
    weight = quantize_fp8_weight(plain)
    for rows in (s.rows, s.sequences):
        x = s.randn(rows, s.hidden)
        given = quantize_tokens_reference(x, FP8)
        is_many = rows == s.rows
        sizes: dict[str, Any] = (
            {"flops": 2.0 * rows * plain.numel()} if is_many else {"moved": 1.0 * plain.numel()}
        )
        shape = f"{rows} x {s.hidden} x {2 * s.inner}"

        def triton(given: Any = given) -> Any:
            return fp8_product_triton(*given, weight.values, weight.scales, None, BF16)

        def reference(given: Any = given) -> Any:
            return fp8_product_reference(*given, weight, BF16)

        yield Case(
            "fp8 product",
            shape,
            lambda given=given: fp8_product(*given, weight, BF16),
            reference,
            **sizes,
            # Twice the bf16 product in arithmetic and in bytes, less what scaling costs.
            rival=lambda x=x: functional.linear(x, plain),
            rival_name="in bf16",
            rival_bar=1.5,
        )
        yield Case(
            "fp8 product by Triton",
            shape,
            triton,
            reference,
            **sizes,
            rival=None if s.device.type != "cuda" else _fast_product(given, weight),
            rival_name="by torch, short sums",
        )


def _fast_product(given: Any, weight: Any) -> Callable[[], Any]:
    """torch's product with sums that stay in the matrix units: faster, and off by what the reference shows."""
    x, scales = given
    return lambda: torch._scaled_mm(
        x,
        weight.values.t(),
        scale_a=scales[:, None],
        scale_b=weight.scales[None],
        out_dtype=BF16,
        use_fast_accum=True,
    )


def before_cases(s: Shapes) -> Iterator[Case]:
    """Norms and activations that end in FP8, against the two kernels that they replace."""
    from vila2.kernels import quantize_after as kernels
    from vila2.kernels.gelu import gelu_triton
    from vila2.kernels.quantize import quantize_tokens_triton
    from vila2.kernels.silu_mul import silu_mul_triton
    from vila2.ops import token_quant as ops

    kind = "gelu_pytorch_tanh"
    x, weight = s.randn(s.rows, s.hidden), s.randn(s.hidden)
    # The kernel writes the sum where the residual was; both begin with zeros, and x + 0 stays x the first time.
    residual = torch.zeros_like(x)
    expected = ops.add_rms_norm_quantize_reference(x, torch.zeros_like(x), weight, 1e-6, FP8)[:2]
    yield Case(
        "rms_norm to fp8",
        f"{s.rows} x {s.hidden}",
        lambda: kernels.add_rms_norm_quantize_triton(x, residual, weight, 1e-6, FP8),
        lambda: expected,
        moved=3.5 * x.nbytes,
        bar=0.85,
        tolerance=5e-3,
    )
    gate_up = s.randn(s.rows, 2 * s.inner)
    yield Case(
        "silu_mul to fp8",
        f"{s.rows} x {s.inner}",
        lambda: kernels.silu_mul_quantize_triton(gate_up, FP8),
        lambda: ops.silu_mul_quantize_reference(gate_up, FP8),
        moved=1.25 * gate_up.nbytes,
        bar=0.85,
        rival=lambda: quantize_tokens_triton(silu_mul_triton(gate_up), FP8),
        rival_name="in two kernels",
        rival_bar=1.0,
        tolerance=5e-3,
    )
    y = s.randn(s.images * s.patches, s.tower_inner)
    yield Case(
        "gelu to fp8",
        f"{len(y)} x {s.tower_inner}",
        lambda: kernels.gelu_quantize_triton(y, kind, FP8),
        lambda: ops.gelu_quantize_reference(y, kind, FP8),
        moved=1.5 * y.nbytes,
        bar=0.85,
        rival=lambda: quantize_tokens_triton(gelu_triton(y, kind), FP8),
        rival_name="in two kernels",
        rival_bar=1.0,
        tolerance=5e-3,
    )
    z, norm, bias = s.randn(s.images * s.patches, s.width), s.randn(s.width), s.randn(s.width)
    yield Case(
        "layer_norm to fp8",
        f"{len(z)} x {s.width}",
        lambda: kernels.layer_norm_quantize_triton(z, norm, bias, 1e-6, FP8),
        lambda: ops.layer_norm_quantize_reference(z, norm, bias, 1e-6, FP8),
        moved=1.5 * z.nbytes,
        bar=0.85,
        tolerance=5e-3,
    )


def int4_cases(s: Shapes) -> Iterator[Case]:
    """Few rows from 4 bits, against spreading the weight first and against the bf16 product."""
    from vila2.kernels.int4_linear import int4_linear_triton, int4_spread_triton
    from vila2.ops.int4 import int4_linear_reference, quantize_int4_weight

    plain = s.randn(2 * s.inner, s.hidden) / s.hidden**0.5
    weight = quantize_int4_weight(plain)
    parts = (weight.values, weight.scales, weight.zeros)
    read = float(sum(part.nbytes for part in parts))
    yield Case(
        "int4 spread",
        f"{2 * s.inner} x {s.hidden}",
        lambda: int4_spread_triton(*parts, s.hidden, BF16),
        lambda: weight.dequantized().to(BF16),
        moved=read + 2.0 * plain.numel(),
        bar=0.85,
        tolerance=1e-6,
    )
    for rows in FEW_ROWS if s.rows > 100 else (1, 3):
        x = s.randn(rows, s.hidden)
        shape = f"{rows} x {s.hidden} x {2 * s.inner}"

        def ours(x: Any = x) -> Any:
            return int4_linear_triton(x, *parts, None)

        yield Case(
            "int4 product",
            shape,
            ours,
            lambda x=x: int4_linear_reference(x, weight),
            moved=read,
            bar=0.7 if rows <= 64 else None,
            rival=lambda x=x: functional.linear(x, int4_spread_triton(*parts, s.hidden, BF16)),
            rival_name="spread first",
        )
        yield Case("int4 product, again", shape, ours, ours, rival=lambda x=x: functional.linear(x, plain),
                   rival_name="in bf16")  # fmt: skip


def _captions(report: Report, precisions: tuple[str, ...], dry: bool, deadline: float) -> Iterator[Result]:
    """Captions a second with each precision, over those in bf16 measured a moment before."""
    from vila2.model.quantize_cuda import quantize_fp8, quantize_int4

    quantize = {"fp8": quantize_fp8, "int4": quantize_int4}
    size = gpu_captions.DRY if dry else gpu_captions.SIZES[-1]
    new = 4 if dry else gpu_captions.NEW_TOKENS
    plain = 0.0
    for precision in ("bf16", *precisions):
        if time.monotonic() > deadline:
            report.skip(f"captions {size.name} {precision}", "no time was left")
            return
        model = gpu_captions.build(size, report.device, dry=dry)
        if precision in quantize:
            quantize[precision](model)
        rate = gpu_captions.ours(model, size, new)
        plain = plain or rate
        yield Result(
            f"captions {size.name} {precision}",
            f"{model.config.tokens_per_tile}+{gpu_captions.TEXT_TOKENS} in, {new} out",
            rate,
            "captions/s",
            rate / plain if precision != "bf16" else None,
            "bf16" if precision != "bf16" else "",
            1.3 if precision == "fp8" else None,
        )
        del model
        gc.collect()
        if not dry:
            torch.cuda.empty_cache()
