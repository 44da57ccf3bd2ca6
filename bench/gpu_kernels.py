"""Every kernel against its reference, and its time against the copy bandwidth or torch's own kernel.

Shapes are those of an 8B VILA1.5 (Llama 3 and SigLIP-so400m at 384 px); `dry` shrinks them.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu_report import Report, Result, relative_error
from torch import Tensor
from torch.nn import functional

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One kernel on one shape. `moved` bytes or `flops` set the ceiling; a `rival` is timed beside it."""

    name: str
    shape: str
    ours: Callable[[], Any]
    reference: Callable[[], Any]
    moved: float = 0.0
    flops: float = 0.0
    bar: float | None = None  # of the ceiling
    rival: Callable[[], Any] | None = None
    rival_name: str = "by torch"
    rival_bar: float | None = None  # the rival's time over ours
    tolerance: float = 1e-2
    differ: Callable[[Any, Any], float] = relative_error  # how far ours is from the reference


@dataclass(frozen=True)
class Shapes:
    """The sizes that the cases use."""

    device: torch.device
    rows: int = 8192
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    vocab: int = 128256
    images: int = 64
    image: int = 378
    patches: int = 729
    width: int = 1152
    tower_inner: int = 4304
    sequences: int = 256
    context: int = 300
    long_context: int = 4096
    prompts: int = 32
    head_rows: int = 2093  # of a chunk of linear + cross-entropy

    def randn(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype)


def shapes_for(report: Report) -> Shapes:
    """The real sizes, or tiny ones for a dry run."""
    if not report.is_dry:
        return Shapes(report.device)
    return Shapes(report.device, 3, 64, 48, 4, 2, 16, 100, 1, 28, 4, 16, 32, 2, 40, 70, 2, 5)  # fmt: skip


def measure(report: Report, *, dry: bool, deadline: float) -> Iterator[Result]:
    """Results of every case, one after another; a case frees its tensors before the next."""
    shapes = shapes_for(report)
    for make in MAKERS:
        for case in make(shapes):
            if time.monotonic() > deadline:
                report.skip(case.name, "no time was left")
                return
            yield from results_of(report, case)


def results_of(report: Report, case: Case) -> Iterator[Result]:
    """A case's own result, and its rival's."""
    error = case.differ(case.ours(), case.reference())
    seconds = report.seconds(case.ours)
    kind = "copy" if case.moved else "bf16"
    amount = case.moved or case.flops
    of = "copy bandwidth" if case.moved else "bf16 product"
    yield Result(
        case.name,
        case.shape,
        seconds * 1e6,
        "us",
        amount / seconds / report.ceiling(kind) if amount else None,
        of if amount else "",
        case.bar,
        error,
        case.tolerance,
    )
    if case.rival is not None:
        theirs = report.seconds(case.rival)
        yield Result(
            f"{case.name} {case.rival_name}",
            case.shape,
            theirs * 1e6,
            "us",
            theirs / seconds,
            "ours",
            case.rival_bar,
        )


def norm_cases(s: Shapes) -> Iterator[Case]:
    from vila2.kernels.layer_norm import layer_norm_triton
    from vila2.kernels.rms_norm import add_rms_norm_triton
    from vila2.ops.norms import add_rms_norm_reference, layer_norm_reference

    x, residual, weight = s.randn(s.rows, s.hidden), s.randn(s.rows, s.hidden), s.randn(s.hidden)
    expected = add_rms_norm_reference(x, residual, weight, 1e-6)
    # The residual is written: the first call is checked, those that are timed go on with what it left.
    yield Case(
        "rms_norm with residual",
        f"{s.rows} x {s.hidden}",
        lambda: add_rms_norm_triton(x, residual, weight, 1e-6),
        lambda: expected,
        moved=4.0 * x.nbytes,
        bar=0.85,
    )
    x = s.randn(s.images * s.patches, s.width)
    weight, bias = s.randn(s.width), s.randn(s.width)
    yield Case(
        "layer_norm",
        f"{len(x)} x {s.width}",
        lambda: layer_norm_triton(x, weight, bias, 1e-6),
        lambda: layer_norm_reference(x, weight, bias, 1e-6),
        moved=2.0 * x.nbytes,
        bar=0.85,
        rival=lambda: functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-6),
    )


def activation_cases(s: Shapes) -> Iterator[Case]:
    from vila2.kernels.gelu import gelu_triton
    from vila2.kernels.silu_mul import silu_mul_triton
    from vila2.ops.activations import gelu_reference, silu_mul_reference

    gate_up = s.randn(s.rows, 2 * s.inner)
    yield Case(
        "silu_mul",
        f"{s.rows} x {s.inner}",
        lambda: silu_mul_triton(gate_up),
        lambda: silu_mul_reference(gate_up),
        moved=1.5 * gate_up.nbytes,
        bar=0.85,
    )
    x = s.randn(s.images * s.patches, s.tower_inner)
    yield Case(
        "gelu_pytorch_tanh",
        f"{len(x)} x {s.tower_inner}",
        lambda: gelu_triton(x, "gelu_pytorch_tanh"),
        lambda: gelu_reference(x, "gelu_pytorch_tanh"),
        moved=2.0 * x.nbytes,
        bar=0.85,
        rival=lambda: functional.gelu(x, approximate="tanh"),
    )


def image_cases(s: Shapes) -> Iterator[Case]:
    from vila2.kernels.downsample import downsample_norm_triton
    from vila2.kernels.patches import image_patches_triton
    from vila2.ops.downsample import downsample_norm_reference
    from vila2.ops.patches import image_patches_reference

    half = (0.5, 0.5, 0.5)
    images = torch.randint(0, 256, (s.images, s.image, s.image, 3), dtype=torch.uint8, device=s.device)
    yield Case(
        "image patches",
        f"{s.images} x {s.image} px",
        lambda: image_patches_triton(images, 14, half, half, BF16),
        lambda: image_patches_reference(images, 14, half, half, BF16),
        moved=3.0 * images.nbytes,
        bar=0.85,
        tolerance=1e-6,
    )
    side = s.image // 14
    features = s.randn(s.images, side * side, s.width)
    weight, bias = s.randn(4 * s.width), s.randn(4 * s.width)
    yield Case(
        "downsample with norm",
        f"{s.images} x {side}^2 x {s.width}",
        lambda: downsample_norm_triton(features, side, 2, True, weight, bias, 1e-5),
        lambda: downsample_norm_reference(features, 2, True, weight, bias, 1e-5),
        moved=2.0 * features.nbytes,
        bar=0.85,
    )


def quantize_cases(s: Shapes) -> Iterator[Case]:
    from vila2.kernels.quantize import quantize_tokens_triton
    from vila2.ops.token_quant import quantize_tokens_reference

    x = s.randn(s.rows, s.hidden)
    types = [torch.int8]
    if s.device.type != "cuda" or torch.cuda.get_device_capability() >= (8, 9):
        types.append(torch.float8_e4m3fn)
    for dtype in types:
        yield Case(
            f"quantize {str(dtype).removeprefix('torch.')}",
            f"{s.rows} x {s.hidden}",
            lambda dtype=dtype: quantize_tokens_triton(x, dtype),
            lambda dtype=dtype: quantize_tokens_reference(x, dtype),
            moved=1.5 * x.nbytes,
            bar=0.85,
            tolerance=2e-3,  # a scale that rounds the other way moves a value by a step
        )


def _cache(s: Shapes, sequences: int, context: int) -> tuple[Tensor, Tensor, Tensor]:
    blocks = -(-context // 16)
    caches = s.randn(2, sequences * blocks, s.kv_heads, 16, s.dim)
    order = torch.randperm(sequences * blocks, device=s.device, dtype=torch.int32)
    return caches[0], caches[1], order.view(sequences, blocks)


def attention_cases(s: Shapes) -> Iterator[Case]:
    from vila2.kernels.attention_decode import paged_decode_triton
    from vila2.kernels.attention_prefill import paged_prefill_triton
    from vila2.ops.attention import paged_attention_reference

    scale = s.dim**-0.5
    for sequences, context in ((s.sequences, s.context), (8, s.long_context)):
        k_cache, v_cache, tables = _cache(s, sequences, context)
        contexts = torch.full((sequences,), context, dtype=torch.int32, device=s.device)
        starts = torch.arange(sequences + 1, dtype=torch.int32, device=s.device)
        q = s.randn(sequences, s.heads, s.dim)
        given = (q, k_cache, v_cache, tables)
        yield Case(
            "decode attention",
            f"{sequences} x {context}, {s.heads}/{s.kv_heads} heads",
            lambda given=given, contexts=contexts: paged_decode_triton(*given, contexts, scale),
            lambda given=given, starts=starts, contexts=contexts: paged_attention_reference(
                *given, starts, contexts, scale
            ),
            moved=2.0 * sequences * context * s.kv_heads * s.dim * 2,
            bar=0.75,
        )
    yield from _shared_cases(s, scale)
    prompt = 236 if s.rows > 100 else 20
    k_cache, v_cache, tables = _cache(s, s.prompts, prompt)
    contexts = torch.full((s.prompts,), prompt, dtype=torch.int32, device=s.device)
    starts = torch.arange(s.prompts + 1, dtype=torch.int32, device=s.device) * prompt
    q = s.randn(s.prompts * prompt, s.heads, s.dim)
    padded = [
        x.view(s.prompts, prompt, heads, s.dim).transpose(1, 2).contiguous()
        for x, heads in ((q, s.heads), (s.randn(s.prompts * prompt, s.kv_heads, s.dim), s.kv_heads))
    ]
    yield Case(
        "prefill attention",
        f"{s.prompts} x {prompt}, {s.heads}/{s.kv_heads} heads",
        lambda: paged_prefill_triton(q, k_cache, v_cache, tables, starts, contexts, scale),
        lambda: paged_attention_reference(q, k_cache, v_cache, tables, starts, contexts, scale),
        flops=2.0 * s.prompts * prompt * prompt * s.heads * s.dim,
        rival=lambda: functional.scaled_dot_product_attention(
            padded[0], padded[1], padded[1], is_causal=True, enable_gqa=True
        ),
        rival_bar=1.0,
    )


def _shared_cases(s: Shapes, scale: float) -> Iterator[Case]:
    """Three questions about each image: two thirds of the keys are the same for a group of three."""
    from vila2.kernels.attention_decode import paged_decode_triton
    from vila2.ops.attention import paged_attention_reference

    groups, per_group = max(1, s.sequences // 3), 3
    sequences = groups * per_group
    k_cache, v_cache, tables = _cache(s, sequences, s.context)
    shared = s.context * 2 // 3 // 16 * 16
    for member in range(1, per_group):
        tables[member::per_group, : shared // 16] = tables[::per_group, : shared // 16]

    def whole(value: int) -> Tensor:
        return torch.full((sequences,), value, dtype=torch.int32, device=s.device)

    starts = torch.arange(0, sequences + 1, per_group, dtype=torch.int32, device=s.device)
    members = torch.arange(sequences, dtype=torch.int32, device=s.device)
    rows = torch.arange(sequences + 1, dtype=torch.int32, device=s.device)
    q = s.randn(sequences, s.heads, s.dim)
    given, contexts = (q, k_cache, v_cache, tables), whole(s.context)
    prefix = (whole(shared), starts, members)
    keys = groups * (shared + per_group * (s.context - shared))
    yield Case(
        "decode with shared prefixes",
        f"{groups} x 3 x {s.context}, {shared} shared",
        lambda: paged_decode_triton(*given, contexts, scale, prefix),
        lambda: paged_attention_reference(*given, rows, contexts, scale),
        moved=2.0 * keys * s.kv_heads * s.dim * 2,
        rival=lambda: paged_decode_triton(*given, contexts, scale),
        rival_name="unshared",
    )


def tower_cases(s: Shapes) -> Iterator[Case]:
    """Attention inside the vision tower is torch's. Ours would be the decode kernel: a patch is a sequence, and all
    patches of an image share its keys."""
    from vila2.kernels.attention_decode import paged_decode_triton

    images, patches, heads = min(s.images, 16), s.patches, 16 if s.width % 16 == 0 and s.rows > 100 else 2
    dim = s.width // heads
    q, k, v = (s.randn(images, heads, patches, dim) for _ in range(3))
    blocks = -(-patches // 16)
    caches = torch.zeros(2, images, heads, blocks * 16, dim, device=s.device, dtype=BF16)
    caches[0, :, :, :patches], caches[1, :, :, :patches] = k, v
    caches = caches.view(2, images, heads, blocks, 16, dim).transpose(2, 3).flatten(1, 2).contiguous()
    rows = q.transpose(1, 2).reshape(images * patches, heads, dim)

    def numbers(*values: int, times: int = 1) -> Tensor:
        return torch.arange(*values, dtype=torch.int32, device=s.device).repeat_interleave(times, 0)

    tables = numbers(images * blocks).view(images, blocks).repeat_interleave(patches, 0)
    whole = torch.full((images * patches,), patches, dtype=torch.int32, device=s.device)
    shared = (whole, numbers(images + 1) * patches, numbers(images * patches))

    def ours() -> Tensor:
        return paged_decode_triton(rows, *caches, tables, whole, dim**-0.5, shared, spans=1)

    def by_torch() -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(images * patches, -1)

    yield Case(
        "tower attention by torch",
        f"{images} x {patches}, {heads} of {dim}",
        by_torch,
        ours,
        flops=4.0 * images * patches**2 * s.width,
        rival=ours,
        rival_name="by us",
        rival_bar=1.0,
    )


def rope_cases(s: Shapes) -> Iterator[Case]:
    from vila2.kernels.rope_store import rope_store_triton
    from vila2.ops.attention import rope_store_reference
    from vila2.ops.rope import rope_tables

    cos, sin = (table.to(s.device) for table in rope_tables(s.dim, 500000.0, 4096))
    qkv = s.randn(s.rows, (s.heads + 2 * s.kv_heads) * s.dim)
    q, k, v = qkv.unflatten(-1, (-1, s.dim)).split((s.heads, s.kv_heads, s.kv_heads), 1)
    positions = torch.randint(0, 4096, (s.rows,), device=s.device)
    slots = torch.randperm(-(-s.rows // 16) * 16, device=s.device)[: s.rows]
    caches = torch.zeros(4, -(-s.rows // 16), s.kv_heads, 16, s.dim, dtype=BF16, device=s.device)
    yield Case(
        "rope with KV store",
        f"{s.rows} x {s.heads}/{s.kv_heads} x {s.dim}",
        lambda: (rope_store_triton(q, k, v, positions, slots, cos, sin, *caches[:2]), caches[:2]),
        lambda: (rope_store_reference(q, k, v, positions, slots, cos, sin, *caches[2:]), caches[2:]),
        moved=2.0 * qkv.nbytes,
        bar=0.85,
    )


def sampling_cases(s: Shapes) -> Iterator[Case]:
    from vila2.kernels.sample import sample_triton
    from vila2.ops.sampling import sample_reference

    rows = min(64, s.sequences)
    logits = s.randn(rows, s.vocab) * 3
    banned = torch.zeros(0, dtype=torch.int32, device=s.device)
    flags = torch.zeros(rows, dtype=torch.int8, device=s.device)
    draws = torch.rand(rows, device=s.device)
    none = torch.zeros(rows, dtype=torch.int32, device=s.device)
    for name, temperature, top_p in (("greedy", 0.0, 1.0), ("top-p", 0.8, 0.9)):
        given = (
            logits,
            torch.full((rows,), temperature, device=s.device),
            none,
            torch.full((rows,), top_p, device=s.device),
            draws,
            banned,
            flags,
        )
        yield Case(
            f"logits to token, {name}",
            f"{rows} x {s.vocab}",
            lambda given=given: sample_triton(*given),
            lambda given=given: sample_reference(*given),
            moved=float(logits.nbytes) if name == "greedy" else 0.0,
            rival=(lambda: logits.argmax(-1)) if name == "greedy" else (lambda: logits.float().sort(-1)),
            differ=share_unequal,
            tolerance=0.0 if name == "greedy" else 0.05,  # a draw on a boundary may fall to either side
        )


def share_unequal(ours: Tensor, reference: Tensor) -> float:
    """Which share of the tokens differs: of numbers that name things, distances say nothing."""
    return float((ours != reference).float().mean())


def repetition_cases(s: Shapes) -> Iterator[Case]:
    from vila2.kernels.repetition import append_tokens_triton
    from vila2.ops.sampling import append_reference

    rows, periods, written = s.sequences, 64, 96
    tokens = torch.randint(0, 4, (rows,), device=s.device)
    slots = torch.randperm(rows, device=s.device)
    rules = torch.tensor([8, 24, periods], dtype=torch.int32, device=s.device).repeat(rows, 1)
    history = torch.randint(0, 4, (rows, written + 1), dtype=torch.int32, device=s.device)
    runs = torch.zeros(rows, periods, dtype=torch.int32, device=s.device)
    lengths = torch.full((rows,), written, dtype=torch.int32, device=s.device)
    tables = [[part.clone() for part in (history, lengths, runs)] for _ in range(2)]

    def appended(append: Callable[..., Tensor], place: int) -> tuple[Tensor, ...]:
        history, lengths, runs = tables[place]
        lengths.fill_(written)  # there is room for one token more, however often this is timed
        runs.zero_()
        return append(tokens, slots, history, lengths, runs, rules), history, runs

    yield Case(
        "repetition",
        f"{rows} sequences, {periods} periods",
        lambda: appended(append_tokens_triton, 0),
        lambda: appended(append_reference, 1),
        tolerance=0.0,
    )


MAKERS = (
    norm_cases,
    activation_cases,
    image_cases,
    quantize_cases,
    rope_cases,
    attention_cases,
    tower_cases,
    sampling_cases,
    repetition_cases,
)
