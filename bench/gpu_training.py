"""Training on a GPU: kernels with a backward pass, linear + cross-entropy against eager torch, in memory and time, and
a whole step of a decoder.

"Eager" is the same maths by the references: every op with its Triton path switched off.
"""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from gpu_kernels import Case, Shapes, results_of, shapes_for
from gpu_report import Report, Result, relative_error
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Sizes:
    """Of the head and of the decoder that steps."""

    rows: int = 8192
    hidden: int = 4096
    vocab: int = 128256
    layers: int = 8
    inner: int = 8192
    width: int = 2048
    heads: int = 16
    sequences: int = 16
    length: int = 512


def measure(report: Report, *, dry: bool, deadline: float) -> Iterator[Result]:
    """Results of the kernels, of the head, then of the step."""
    sizes = Sizes(12, 16, 50, 2, 32, 32, 2, 2, 6) if dry else Sizes()
    for case in kernel_cases(shapes_for(report)):
        if time.monotonic() > deadline:
            report.skip(case.name, "no time was left")
            return
        yield from results_of(report, case)
    yield from _head(report, sizes)
    if time.monotonic() > deadline:
        report.skip("training step", "no time was left")
        return
    yield from _step(report, sizes)


def kernel_cases(s: Shapes) -> Iterator[Case]:
    """What only training runs: each kernel's backward pass, and the error between the head's two products."""
    from vila2.kernels.rms_norm import add_rms_norm_autograd
    from vila2.kernels.rope import apply_rope_triton
    from vila2.kernels.silu_mul import silu_mul_autograd
    from vila2.kernels.softmax_error import softmax_error_triton
    from vila2.ops.activations import silu_mul_reference
    from vila2.ops.norms import add_rms_norm_reference
    from vila2.ops.rope import apply_rope_reference, rope_tables

    def backward(op: Callable[..., Any], given: tuple[Tensor, ...], *more: Any) -> Callable[[], Any]:
        """The gradients by `given`; the forward pass is done once, here."""
        leaves = [part.detach().requires_grad_() for part in given]
        # Some ops write into what they are given: never into a leaf.
        out = op(*(part.clone() for part in leaves), *more)
        outs = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(0)
        grads = [torch.randn_like(part) for part in outs]
        return lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True)

    norm = s.randn(s.rows, s.hidden), s.randn(s.rows, s.hidden), s.randn(s.hidden)
    yield Case(
        "rms_norm backward",
        f"{s.rows} x {s.hidden}",
        backward(add_rms_norm_autograd, norm, 1e-6),
        backward(add_rms_norm_reference, norm, 1e-6),
        moved=4.0 * norm[0].nbytes,
        bar=0.85,
        tolerance=2e-2,
    )
    gate_up = s.randn(s.rows, 2 * s.inner)
    yield Case(
        "silu_mul backward",
        f"{s.rows} x {s.inner}",
        backward(silu_mul_autograd, (gate_up,)),
        backward(silu_mul_reference, (gate_up,)),
        moved=2.5 * gate_up.nbytes,
        bar=0.85,
        tolerance=2e-2,
    )
    cos, sin = (table.to(s.device) for table in rope_tables(s.dim, 500000.0, 4096))
    positions = torch.randint(0, 4096, (s.rows,), device=s.device)
    heads = s.randn(s.rows, s.heads, s.dim)
    for name, ours, reference in (
        (
            "rope",
            lambda: apply_rope_triton(heads, positions, cos, sin),
            lambda: apply_rope_reference(heads, positions, cos, sin),
        ),
        (
            "rope backward",
            backward(apply_rope_triton, (heads,), positions, cos, sin),
            backward(apply_rope_reference, (heads,), positions, cos, sin),
        ),
    ):
        yield Case(
            name, f"{s.rows} x {s.heads} x {s.dim}", ours, reference, moved=2.0 * heads.nbytes, bar=0.85
        )
    logits, labels = s.randn(s.head_rows, s.vocab), torch.randint(0, s.vocab, (s.head_rows,), device=s.device)
    wide = logits.float()
    expected = (
        functional.cross_entropy(wide, labels, reduction="none"),
        wide.softmax(-1) - functional.one_hot(labels, s.vocab),
    )
    # The logits are written: the first call is checked, those that are timed go on with what it left.
    yield Case(
        "softmax_error",
        f"{s.head_rows} x {s.vocab}",
        lambda: (softmax_error_triton(logits, labels), logits),
        lambda: expected,
        moved=3.0 * logits.nbytes,
        bar=0.85,
    )


def _head(report: Report, sizes: Sizes) -> Iterator[Result]:
    from vila2.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

    hidden = torch.randn(sizes.rows, sizes.hidden, device=report.device, dtype=torch.bfloat16)
    weight = (
        torch.randn(sizes.vocab, sizes.hidden, device=report.device, dtype=torch.bfloat16) / sizes.hidden**0.5
    )
    labels = torch.randint(0, sizes.vocab, (sizes.rows,), device=report.device)

    def gradients(loss_of: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        given = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = loss_of(*given, labels)
        loss.backward()
        return loss.detach(), *(part.grad for part in given)  # type: ignore[misc]

    error = relative_error(gradients(linear_cross_entropy), gradients(linear_cross_entropy_reference))
    memory = [
        _peak_bytes(report, lambda f=f: gradients(f))
        for f in (linear_cross_entropy, linear_cross_entropy_reference)
    ]
    seconds = [
        report.seconds(lambda f=f: gradients(f), 2.0)
        for f in (linear_cross_entropy, linear_cross_entropy_reference)
    ]
    shape = f"{sizes.rows} x {sizes.hidden} x {sizes.vocab}"
    yield Result(
        "linear + cross-entropy",
        shape,
        seconds[0] * 1e3,
        "ms",
        seconds[1] / seconds[0],
        "eager's speed",
        1.0,
        error,
        2e-2,
    )
    yield Result(
        "its memory", shape, memory[0] / 2**20, "MiB", memory[1] / max(memory[0], 1), "times less", 4.0
    )


def _peak_bytes(report: Report, call: Callable[[], Any]) -> int:
    """Bytes that the call takes at its peak beyond what was there; 0 without a GPU."""
    if report.device.type != "cuda":
        call()
        return 0
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _step(report: Report, sizes: Sizes) -> Iterator[Result]:
    from vila2.model.decoder import Decoder, DecoderConfig, DenseAttend
    from vila2.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

    config = DecoderConfig(
        sizes.vocab, sizes.width, sizes.inner, sizes.layers, sizes.heads, sizes.heads // 2, sizes.width // sizes.heads,
        max(64, sizes.length),
    )  # fmt: skip
    torch.manual_seed(0)
    decoder = Decoder(config).to(report.device, torch.bfloat16)
    tokens = torch.randint(0, sizes.vocab, (sizes.sequences * sizes.length,), device=report.device)
    positions = torch.arange(sizes.length, device=report.device).repeat(sizes.sequences)
    labels = tokens.roll(-1)

    def step(loss_of: Callable[..., Tensor]) -> Tensor:
        decoder.zero_grad(set_to_none=True)
        attend = DenseAttend(positions, [sizes.length] * sizes.sequences, decoder.cos, decoder.sin)
        hidden = decoder(decoder.embed(tokens), attend)
        loss = loss_of(hidden, decoder.lm_head.weight, labels) / len(labels)
        loss.backward()
        return torch.cat([part.grad.flatten().float() for part in decoder.layers[0].parameters()])

    def eager() -> Tensor:
        with patch("vila2.ops.triton.has_triton", lambda: False):
            return step(linear_cross_entropy_reference)

    def fast() -> Tensor:
        return step(linear_cross_entropy)

    error = relative_error(fast(), eager())
    ours, theirs = report.seconds(fast, 3.0), report.seconds(eager, 3.0)
    yield Result(
        "training step", f"{sizes.layers} layers of {sizes.width}, {len(tokens)} tokens", ours * 1e3, "ms",
        theirs / ours, "eager's speed", 1.2, error, 5e-2,
    )  # fmt: skip
