"""Products in FP8 and with 4-bit weights, and what comes before them, on the shapes of an 8B VILA."""

import torch

from tests.kernels.aot_cases import BF16, F32, HIDDEN, INNER, Case, meta

FP8, U8 = torch.float8_e4m3fn, torch.uint8


def _fp8_product(rows: int) -> None:
    from vila2.kernels.fp8_linear import fp8_product_triton

    x_scales, w_scales = meta(rows, dtype=F32), meta(HIDDEN, dtype=F32)
    for bias in (None, meta(HIDDEN)):
        x, weight = meta(rows, HIDDEN, dtype=FP8), meta(HIDDEN, HIDDEN, dtype=FP8)
        fp8_product_triton(x, x_scales, weight, w_scales, bias, BF16)


def _int4_product(rows: int, dtype: torch.dtype = BF16) -> None:
    from vila2.kernels.int4_linear import int4_linear_triton

    for columns, depth in ((2 * INNER, HIDDEN), (HIDDEN, INNER)):
        groups = depth // 128
        values, zeros = meta(groups, columns, 64, dtype=U8), meta(groups, columns, dtype=U8)
        int4_linear_triton(meta(rows, depth, dtype=dtype), values, meta(groups, columns), zeros, None)


def _int4_spread() -> None:
    from vila2.kernels.int4_linear import int4_spread_triton

    # A part of the columns, as the op takes it: its first axis is not contiguous with the others.
    values, scales = meta(32, 2 * INNER, 64, dtype=U8)[:, :8192], meta(32, 2 * INNER)[:, :8192]
    int4_spread_triton(values, scales, meta(32, 2 * INNER, dtype=U8)[:, :8192], HIDDEN, BF16)


def _quantize_after(dtype: torch.dtype) -> None:
    from vila2.kernels.quantize_after import (
        add_rms_norm_quantize_triton,
        gelu_quantize_triton,
        layer_norm_quantize_triton,
        silu_mul_quantize_triton,
    )

    add_rms_norm_quantize_triton(meta(300, HIDDEN), meta(300, HIDDEN), meta(HIDDEN), 1e-6, dtype)
    layer_norm_quantize_triton(meta(729, 1152), meta(1152), meta(1152), 1e-6, dtype)
    silu_mul_quantize_triton(meta(300, 2 * INNER), dtype)
    gelu_quantize_triton(meta(729, 4304), "gelu_pytorch_tanh", dtype)


FP8_CASES = (
    *(Case(f"fp8 product of {rows} rows", lambda rows=rows: _fp8_product(rows), 89) for rows in (8, 64, 512)),
    Case("what ends in FP8", lambda: _quantize_after(FP8), 89),
)
LOW_BIT_CASES = (
    *FP8_CASES,
    *(
        Case(f"int4 product of {rows} rows", lambda rows=rows: _int4_product(rows))
        for rows in (1, 8, 64, 256)
    ),
    Case("int4 product of 8 rows float32", lambda: _int4_product(8, F32), 80, 90),
    Case("int4 spread", _int4_spread),
    Case("what ends in int8", lambda: _quantize_after(torch.int8)),
)
