"""Training on a GPU: kernels with a backward pass, linear + cross-entropy against eager torch, in memory and time, and
a whole step of the trainer.

"Eager" is the same maths by the references: every op with its Triton path switched off.
"""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from gpu_captions import Size, build
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
    """A step as `vila2-fast train` makes it: images, packed conversations, loss, gradients, clip and AdamW."""
    from vila2.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
    from vila2.train.loss import batch_loss
    from vila2.train.optim import ParamGroup, build_optimizer

    size = Size(
        "step", sizes.width, sizes.inner, sizes.layers, sizes.heads, sizes.heads // 2, sizes.vocab, 0, 0
    )
    torch.manual_seed(0)
    model = build(size, report.device, dry=report.is_dry).train()
    model.vision.requires_grad_(False)
    trained = [(name, part) for name, part in model.named_parameters() if part.requires_grad]
    optimizer = build_optimizer([ParamGroup("all", trained, lr=1e-5)], "bf16")
    batch = _conversations(model, sizes)

    def gradients(loss_of: Callable[..., Tensor]) -> Tensor:
        optimizer.zero_grad()
        with patch("vila2.train.loss.linear_cross_entropy", loss_of):
            loss, labels = batch_loss(model, batch, report.device)
        (loss / labels).backward()
        return torch.cat([part.grad.flatten().float() for part in model.decoder.layers[0].parameters()])

    def step(loss_of: Callable[..., Tensor]) -> None:
        gradients(loss_of)
        optimizer.clip_grad_norm(1.0)
        optimizer.step(1.0)

    def eagerly(call: Callable[[Callable[..., Tensor]], Any]) -> Any:
        with patch("vila2.ops.triton.has_triton", lambda: False):
            return call(linear_cross_entropy_reference)

    error = relative_error(gradients(linear_cross_entropy), eagerly(gradients))
    ours = report.seconds(lambda: step(linear_cross_entropy), 3.0)
    theirs = report.seconds(lambda: eagerly(step), 3.0)
    shape = f"{sizes.layers} layers of {sizes.width}, {batch.num_rows} rows"
    yield Result(
        "training step", shape, ours * 1e3, "ms", theirs / ours, "eager's speed", 1.2, error, 5e-2,
    )  # fmt: skip


def _conversations(model: Any, sizes: Sizes) -> Any:
    """A packed batch of conversations about an image each, at most `sizes.length` rows long; half is answers."""
    from vila2.train.examples import VISUAL_TOKEN, EncodedExample, Row
    from vila2.train.packing import pack

    rng = np.random.default_rng(0)
    processor, visual = model.config.image_processor(), model.config.tokens_per_tile
    side = model.config.image_size
    longest = max(4, sizes.length - visual)
    examples = []
    for index in range(sizes.sequences):
        text = rng.integers(0, sizes.vocab, int(rng.integers(longest // 2, longest + 1)))
        tokens = np.concatenate((np.full(visual, VISUAL_TOKEN), text))
        row = Row(tokens, np.arange(len(tokens)) >= visual + len(text) // 2)
        image = processor.prepare(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        nothing = Row(tokens[:0], row.in_loss[:0])
        examples.append(EncodedExample(str(index), (image,), nothing, (row,)))
    return pack(examples)
