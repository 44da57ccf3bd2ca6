"""Cross entropy of a linear head without its logits: for a vocabulary of 50,000 they are most of a step's memory.

What a head of 4096 x 128256 in bfloat16 takes on CUDA at its peak, for 8192 rows:

    the weight's gradient, summed in float32      4 * 4096 * 128256             2.10 GB
    a chunk's logits, then their gradient         2 * 2093 * 128256             0.54 GB
    the gradient by hidden states                 2 * 8192 * 4096               0.07 GB
    a part of a chunk's product, before its sum   2 * 16384 * 4096              0.13 GB
                                                                                2.84 GB

Eager torch has the logits in float32 with two gradients of theirs beside them, 3 * 4 * 8192 * 128256 = 12.6 GB: 4.4
times as much. The parts of the vocabulary keep what a product leaves small, and let the float32 sums go one by one as
they are rounded: a second whole matrix beside them would be 1.05 GB. Each chunk reads and writes the float32 sums once,
12 bytes a weight with its product (2.2 ms of an H100), so chunks are as large as memory lets them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from vila2.ops.native import is_native_training, native
from vila2.ops.triton import is_triton

IGNORED = -100  # the label of a row that is not in the loss

_CHUNK_ELEMENTS = 8 << 20  # logits of one chunk: 32 MiB as float32
_CHUNK_ELEMENTS_CUDA = 256 << 20  # two thousand rows of a vocabulary of 128,000
_PART_ELEMENTS_CUDA = 64 << 20  # of the weight, whose gradient is summed and rounded part by part


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over rows of `-log softmax(hidden @ weight.T)[label]`, rows labelled -100 left out; at least float32.

    hidden (n, h), weight (vocab, h), labels (n,) int64.
    """
    logits = functional.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """`linear_cross_entropy_reference` by chunks of rows: the gradients are made beside the loss, in one pass.

    `chunk`: rows at a time, by default as many as make 32 MiB of logits (on CUDA 512). Differentiable once. ValueError
    for a label that is neither a row of `weight` nor -100 (on the CPU: on CUDA the host would have to wait to know; see
    `check_labels`).
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden (n, h) and weight (vocab, h), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"{len(hidden)} rows need as many labels, got {tuple(labels.shape)}")
    if labels.is_cpu:
        check_labels(labels, len(weight))
    if chunk is None:
        elements = _CHUNK_ELEMENTS_CUDA if hidden.is_cuda else _CHUNK_ELEMENTS
        chunk = max(16, elements // max(1, len(weight)))
    if chunk < 1:
        raise ValueError(f"chunk must be positive, got {chunk}")
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, chunk)  # type: ignore[no-untyped-call]
    return loss


def check_labels(labels: Tensor, vocab: int) -> None:
    """ValueError for a label that is neither below `vocab` nor -100."""
    if bool(((labels >= vocab) | ((labels < 0) & (labels != IGNORED))).any()):
        raise ValueError(f"labels must be below {vocab}, or {IGNORED} for none")


def _part_rows(weight: Tensor) -> int:
    """Rows of the weight whose gradient is summed in one matrix: all of them on a CPU."""
    return max(1, _PART_ELEMENTS_CUDA // max(1, weight.shape[1]) if weight.is_cuda else len(weight))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        hidden_grad = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        parts = list(torch.split(weight, _part_rows(weight))) if ctx.needs_input_grad[1] else []
        sums = [torch.zeros_like(part, dtype=exact) for part in parts]
        for first in range(0, len(hidden), chunk):
            rows = slice(first, first + chunk)
            logits = functional.linear(hidden[rows], weight)
            loss, error = _softmax_error(logits, labels[rows])
            total += loss
            error = error.to(hidden.dtype)
            if hidden_grad is not None:
                torch.mm(error, weight, out=hidden_grad[rows])
            for total_grad, columns in zip(sums, torch.split(error, _part_rows(weight), dim=1), strict=False):
                if total_grad.dtype == error.dtype:
                    total_grad.addmm_(columns.t(), hidden[rows])
                else:
                    total_grad.add_(columns.t() @ hidden[rows])
            # Before the next chunk's logits are made, and before the sums are rounded.
            del logits, error
        for index, part in enumerate(sums):
            sums[index] = part.to(weight.dtype)
        ctx.hidden_grad, ctx.weight_grads = hidden_grad, sums
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # A second backward through a retained graph finds the gradients as they were.
        hidden_grad = None if ctx.hidden_grad is None else ctx.hidden_grad * grad.to(ctx.hidden_grad.dtype)
        parts = ctx.weight_grads
        if len(parts) < 2:
            return hidden_grad, parts[0] * grad.to(parts[0].dtype) if parts else None, None, None
        weight_grad = parts[0].new_empty(sum(map(len, parts)), parts[0].shape[1])
        for part, scaled in zip(parts, torch.split(weight_grad, [len(part) for part in parts]), strict=True):
            torch.mul(part, grad.to(part.dtype), out=scaled)
        return hidden_grad, weight_grad, None, None


def _softmax_error(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss, at least float32, and the loss's gradient by the logits: softmax minus one at the label.

    May be made in the memory of the logits.
    """
    if is_triton(logits) and logits.dtype != torch.float64:
        from vila2.kernels.softmax_error import softmax_error_triton

        return softmax_error_triton(logits, labels).sum(), logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if is_native_training(logits) and logits.dtype == torch.float32:
        losses = logits.new_empty(len(logits))
        native.softmax_error(logits, labels.contiguous(), losses)
        return losses.sum(), logits
    counted = labels != IGNORED
    at = labels.clamp(min=0)[:, None]
    chosen = logits.gather(1, at).squeeze(1)
    log_sums = torch.logsumexp(logits, dim=1)
    loss = ((log_sums - chosen) * counted).sum()
    error = logits.sub_(log_sums[:, None]).exp_()
    error.scatter_add_(1, at, error.new_full((), -1).expand_as(at))
    error *= counted[:, None]
    return loss, error
