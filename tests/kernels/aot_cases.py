"""Every kernel on the shapes of an 8B VILA (Llama 3, SigLIP-so400m), as the ops call it: what a GPU would compile."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BF16, F32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCAB = 4096, 14336, 32, 8, 128, 128256


@dataclass(frozen=True)
class Case:
    """A call that launches one or more kernels. `max_stack`: bytes a thread that may lie in memory, spills included."""

    name: str
    call: Callable[[], object]
    least_capability: int = 80
    most_capability: int = 100
    max_stack: int = 0


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """A tensor that has everything but values: compiling reads none."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _rms_norm() -> None:
    from vila2.kernels.rms_norm import add_rms_norm_triton, rms_norm_triton

    x = meta(300, HIDDEN)
    rms_norm_triton(x, meta(HIDDEN), 1e-6)
    add_rms_norm_triton(x, meta(300, HIDDEN), meta(HIDDEN), 1e-6)


def _rms_norm_training() -> None:
    from vila2.kernels.rms_norm import add_rms_norm_autograd

    x, residual, weight = (meta(*s).requires_grad_() for s in ((300, HIDDEN), (300, HIDDEN), (HIDDEN,)))
    y, total = add_rms_norm_autograd(x, residual, weight, 1e-6)
    torch.autograd.backward([y, total], [meta(300, HIDDEN), meta(300, HIDDEN)])


def _layer_norm() -> None:
    from vila2.kernels.layer_norm import layer_norm_triton

    layer_norm_triton(meta(729, 1152), meta(1152), meta(1152), 1e-6)


def _rope_store() -> None:
    from vila2.kernels.rope_store import rope_store_triton

    q, k, v = (
        meta(64, (HEADS + 2 * KV_HEADS) * DIM).unflatten(-1, (-1, DIM)).split((HEADS, KV_HEADS, KV_HEADS), 1)
    )
    at, table, cache = meta(64, dtype=I64), meta(8192, DIM // 2, dtype=F32), meta(100, KV_HEADS, 16, DIM)
    rope_store_triton(q, k, v, at, at, table, table, cache, cache)


def _rope() -> None:
    from vila2.kernels.rope import apply_rope_triton

    table, at = meta(8192, DIM // 2, dtype=F32), meta(64, dtype=I64)
    y = apply_rope_triton(meta(64, HEADS, DIM).requires_grad_(), at, table, table)
    y.backward(meta(64, HEADS, DIM))


def _prefill(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    from vila2.kernels.attention_prefill import paged_prefill_triton

    cache = meta(100, kv_heads, 16, dim, dtype=dtype)
    tables, starts, contexts = meta(4, 24, dtype=I32), meta(5, dtype=I32), meta(4, dtype=I32)
    paged_prefill_triton(
        meta(600, heads, dim, dtype=dtype), cache, cache, tables, starts, contexts, dim**-0.5
    )


def _decode(
    sequences: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, shared: bool = False
) -> None:
    from vila2.kernels.attention_decode import paged_decode_triton

    cache = meta(100, kv_heads, 16, dim, dtype=dtype)
    tables, contexts = meta(sequences, 64, dtype=I32), meta(sequences, dtype=I32)
    groups = (contexts, meta(5, dtype=I32), meta(sequences, dtype=I32)) if shared else None
    paged_decode_triton(
        meta(sequences, heads, dim, dtype=dtype), cache, cache, tables, contexts, dim**-0.5, groups
    )


def _silu_mul() -> None:
    from vila2.kernels.silu_mul import silu_mul_autograd

    silu_mul_autograd(meta(300, 2 * INNER).requires_grad_()).backward(meta(300, INNER))


def _gelu() -> None:
    from vila2.kernels.gelu import KINDS, gelu_triton

    for kind in KINDS:
        gelu_triton(meta(729, 4304), kind)


def _patches() -> None:
    from vila2.kernels.patches import image_patches_triton

    images = meta(8, 384, 384, 3, dtype=torch.uint8)
    image_patches_triton(images, 14, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), BF16)


def _downsample() -> None:
    from vila2.kernels.downsample import downsample_norm_triton

    for factor in (2, 3):
        joined = factor**2 * 1152
        downsample_norm_triton(meta(8, 729, 1152), 27, factor, factor == 2, meta(joined), meta(joined), 1e-5)


def _quantize(dtype: torch.dtype) -> None:
    from vila2.kernels.quantize import quantize_tokens_triton

    quantize_tokens_triton(meta(300, HIDDEN), dtype)


def _sample(dtype: torch.dtype) -> None:
    from vila2.kernels.sample import sample_triton

    value, flags = meta(64, dtype=F32), meta(64, dtype=torch.int8)
    sample_triton(
        meta(64, VOCAB, dtype=dtype), value, meta(64, dtype=I32), value, value, meta(2, dtype=I32), flags
    )


def _append() -> None:
    from vila2.kernels.repetition import append_tokens_triton

    count = meta(64, dtype=I32)
    append_tokens_triton(
        meta(64, dtype=I64),
        meta(64, dtype=I64),
        meta(256, 512, dtype=I32),
        count,
        meta(256, 48, dtype=I32),
        meta(64, 3, dtype=I32),
    )


def _softmax_error() -> None:
    from vila2.kernels.softmax_error import softmax_error_triton

    softmax_error_triton(meta(64, VOCAB), meta(64, dtype=I64))


def _ones() -> None:
    """Sizes of 1, which Triton compiles into the kernel: what is a value elsewhere is a constant there."""
    from vila2.kernels.attention_decode import paged_decode_triton
    from vila2.kernels.attention_prefill import paged_prefill_triton
    from vila2.kernels.downsample import downsample_norm_triton
    from vila2.kernels.patches import image_patches_triton
    from vila2.kernels.rms_norm import add_rms_norm_autograd
    from vila2.kernels.rope_store import rope_store_triton
    from vila2.kernels.sample import sample_triton
    from vila2.kernels.softmax_error import softmax_error_triton

    x, one, count = meta(1, 1), meta(1), meta(1, dtype=I32)
    y, total = add_rms_norm_autograd(meta(1, 1).requires_grad_(), meta(1, 1), one, 1e-6)
    torch.autograd.backward([y, total], [x, x])
    q, cache, tables = meta(1, 1, 16), meta(1, 1, 1, 16), meta(1, 1, dtype=I32)
    paged_prefill_triton(q, cache, cache, tables, meta(2, dtype=I32), count, 1.0)
    groups = (count, meta(2, dtype=I32), count)
    paged_decode_triton(q, cache, cache, tables, count, 1.0, groups, spans=1)
    at, table = meta(1, dtype=I64), meta(1, 8, dtype=F32)
    rope_store_triton(q, q, q, at, at, table, table, cache, cache)
    value = meta(1, dtype=F32)
    sample_triton(x, value, count, value, value, count, meta(1, dtype=torch.int8))
    softmax_error_triton(meta(1, 1), at)
    downsample_norm_triton(meta(1, 1, 1), 1, 1, False, one, one, 1e-6)
    image_patches_triton(meta(1, 1, 1, 3, dtype=torch.uint8), 1, (0.5,) * 3, (0.5,) * 3, BF16)


# VILA1.5-8B, NVILA-8B (Qwen2), VILA1.5-3B, and heads as wide as they may be; float32 is what tests of quality run.
ATTENTION_CASES = (
    Case("prefill 32/8 of 128", lambda: _prefill(HEADS, KV_HEADS, DIM, BF16)),
    Case("prefill 28/4 of 128", lambda: _prefill(28, 4, DIM, BF16)),
    Case("prefill 20/20 of 128", lambda: _prefill(20, 20, DIM, BF16)),
    Case("prefill 16/2 of 256", lambda: _prefill(16, 2, 256, BF16)),
    Case("prefill 9/3 of 64 float32", lambda: _prefill(9, 3, 64, F32), most_capability=80),
    Case("prefill 32/8 of 128 float32", lambda: _prefill(HEADS, KV_HEADS, DIM, F32)),
    Case("decode 64 of 32/8 of 128", lambda: _decode(64, HEADS, KV_HEADS, DIM, BF16)),
    Case("decode 256 of 32/8 of 128", lambda: _decode(256, HEADS, KV_HEADS, DIM, BF16)),
    Case("decode 64 of 32/8 of 128 float32", lambda: _decode(64, HEADS, KV_HEADS, DIM, F32)),
    Case("decode 64 with shared prefixes", lambda: _decode(64, HEADS, KV_HEADS, DIM, BF16, shared=True)),
    Case("decode 28/4 of 128 with shared prefixes", lambda: _decode(64, 28, 4, DIM, BF16, shared=True)),
    Case("decode 20/20 of 128 with shared prefixes", lambda: _decode(64, 20, 20, DIM, BF16, shared=True)),
    Case("decode 16/2 of 256 with shared prefixes", lambda: _decode(64, 16, 2, 256, BF16, shared=True)),
    Case("decode float32 with shared prefixes", lambda: _decode(64, HEADS, KV_HEADS, DIM, F32, shared=True)),
)
CASES = (
    *ATTENTION_CASES,
    Case("rms_norm", _rms_norm),
    Case("rms_norm training", _rms_norm_training),
    Case("layer_norm", _layer_norm),
    Case("rope_store", _rope_store),
    Case("rope", _rope),
    Case("silu_mul", _silu_mul),
    Case("gelu", _gelu),
    Case("patches", _patches),
    Case("downsample_norm", _downsample),
    Case("quantize int8", lambda: _quantize(torch.int8)),
    Case("quantize FP8", lambda: _quantize(torch.float8_e4m3fn), least_capability=90),
    Case("sizes of one", _ones, 90, 90),
    Case("sample bfloat16", lambda: _sample(BF16)),
    Case("sample float32", lambda: _sample(F32), 90, 90),
    Case("append_tokens", _append),
    Case("softmax_error", _softmax_error),
)
