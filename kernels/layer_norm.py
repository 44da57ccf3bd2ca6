"""Layer norm over the last axis: one program a row, the row in registers, one pass over memory.

    y = (x - mean(x)) * rsqrt(var(x) + eps) * weight + bias        (biased variance)

The variance is taken of the centred values, not as E[x^2] - mean^2: SigLIP has rows whose mean dwarfs their spread.
Reference: vila2/ops/norms.py. Tests: tests/kernels/test_norms.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila2.kernels.device import rows_of, warps_for

MAX_HIDDEN = 65536


@triton.jit
def _layer_norm_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, hidden, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    x = tl.load(x_ptr + row * hidden + column, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    centred = tl.where(inside, wide - tl.sum(wide, axis=0) / hidden, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / hidden + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y = centred * scale * weight + bias
    tl.store(y_ptr + row * hidden + column, y.to(x.dtype), mask=inside)


def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm of the last axis of `x` (..., hidden); `weight` and `bias` are (hidden,)."""
    rows, hidden = rows_of(x, MAX_HIDDEN, "x"), x.shape[-1]
    for name, part in (("weight", weight), ("bias", bias)):
        if part.shape != (hidden,):
            raise ValueError(f"{name} must have shape ({hidden},), got {tuple(part.shape)}")
    x = x.contiguous()
    y = torch.empty_like(x)
    if rows:
        block = triton.next_power_of_2(hidden)
        _layer_norm_kernel[(rows,)](
            x,
            weight.contiguous(),
            bias.contiguous(),
            y,
            hidden,
            eps,
            BLOCK=block,
            num_warps=warps_for(block),
        )
    return y
