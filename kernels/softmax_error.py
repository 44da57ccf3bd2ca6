"""The middle of linear + cross-entropy: logits of a chunk of rows become, in place, the gradient of the loss by them.

    loss[r] = log sum_j exp(x[r, j]) - x[r, label],     x[r, j] <- softmax(x[r])_j - [j == label]

Rows labelled -100 give loss 0 and gradient 0. The products on both sides are cuBLAS's: nothing of ours beats them, and
with rows in chunks the logits of the whole batch never exist. One pass for the sums, one for the gradient, 6 bytes a
bfloat16 logit. Reference: vila2/ops/cross_entropy.py. Tests: tests/kernels/test_cross_entropy.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

IGNORED = -100
_BLOCK = 4096


@triton.jit
def _softmax_error_kernel(
    logits_ptr, labels_ptr, loss_ptr, stride, vocab, IGNORED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    start = logits_ptr + row * stride
    if label == IGNORED:
        for first in range(0, vocab, BLOCK):
            at = first + tl.arange(0, BLOCK)
            tl.store(start + at, tl.zeros((BLOCK,), logits_ptr.dtype.element_ty), mask=at < vocab)
        tl.store(loss_ptr + row, 0.0)
    else:
        peak = tl.full((), float("-inf"), tl.float32)
        total = tl.zeros((), tl.float32)
        # Read before the sums, whose reductions are barriers: after them, a warp that is ahead may have overwritten it.
        chosen = tl.load(start + label).to(tl.float32)
        for first in range(0, vocab, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(start + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(peak, tl.max(x, axis=0))
            total = total * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher), axis=0)
            peak = higher
        log_sum = peak + tl.log(total)
        tl.store(loss_ptr + row, log_sum - chosen)
        for first in range(0, vocab, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(start + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
            error = tl.exp(x - log_sum) - tl.where(at == label, 1.0, 0.0)
            tl.store(start + at, error.to(logits_ptr.dtype.element_ty), mask=at < vocab)


def softmax_error_triton(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss (n,) float32 of `logits` (n, vocab) and `labels` (n,) int64; logits become their gradient.

    ValueError unless the logits' rows are contiguous. Labels are not checked: they are on the device.
    """
    if logits.stride(-1) != 1:
        raise ValueError(f"the rows of logits must be contiguous, got strides {logits.stride()}")
    rows, vocab = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        block = min(_BLOCK, triton.next_power_of_2(vocab))
        _softmax_error_kernel[(rows,)](
            logits,
            labels.contiguous(),
            loss,
            logits.stride(0),
            vocab,
            IGNORED=IGNORED,
            BLOCK=block,
            num_warps=8,
        )
    return loss
