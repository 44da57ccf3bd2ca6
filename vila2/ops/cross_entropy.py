"""Cross entropy of a linear head without its logits: for a vocabulary of 50,000 they are most of a step's memory."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from vila2.ops.native import is_native_training, native
from vila2.ops.triton import is_triton

IGNORED = -100  # the label of a row that is not in the loss

_CHUNK_ELEMENTS = 8 << 20  # logits of one chunk: 32 MiB as float32
_CHUNK_ELEMENTS_CUDA = 128 << 20  # a thousand rows of a vocabulary of 128,000: fewer would leave a GPU idle


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over rows of `-log softmax(hidden @ weight.T)[label]`, rows labelled -100 left out; at least float32.

    hidden (n, h), weight (vocab, h), labels (n,) int64.
    """
    logits = functional.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """`linear_cross_entropy_reference` by chunks of rows: the gradients are made beside the loss, in one pass.

    `chunk`: rows at a time, by default as many as make 32 MiB of logits (on CUDA 256). Differentiable once. ValueError
    for a label that is neither a row of `weight` nor -100.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden (n, h) and weight (vocab, h), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"{len(hidden)} rows need as many labels, got {tuple(labels.shape)}")
    if bool(((labels >= len(weight)) | ((labels < 0) & (labels != IGNORED))).any()):
        raise ValueError(f"labels must be below {len(weight)}, or {IGNORED} for none")
    if chunk is None:
        elements = _CHUNK_ELEMENTS_CUDA if hidden.is_cuda else _CHUNK_ELEMENTS
        chunk = max(16, elements // max(1, len(weight)))
    if chunk < 1:
        raise ValueError(f"chunk must be positive, got {chunk}")
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, chunk)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        hidden_grad = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight, dtype=exact) if ctx.needs_input_grad[1] else None
        for first in range(0, len(hidden), chunk):
            rows = slice(first, first + chunk)
            logits = functional.linear(hidden[rows], weight)
            loss, error = _softmax_error(logits, labels[rows])
            total += loss
            error = error.to(hidden.dtype)
            if hidden_grad is not None:
                torch.mm(error, weight, out=hidden_grad[rows])
            if weight_grad is not None and weight_grad.dtype == error.dtype:
                weight_grad.addmm_(error.t(), hidden[rows])
            elif weight_grad is not None:
                weight_grad += error.t() @ hidden[rows]
        ctx.grads = (hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # A second backward through a retained graph finds the gradients as they were.
        hidden_grad, weight_grad = (None if g is None else g * grad.to(g.dtype) for g in ctx.grads)
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
