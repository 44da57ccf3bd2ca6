"""GELU of three kinds, element by element, in float32 and rounded once.

    gelu               x / 2 * (1 + erf(x / sqrt(2)))
    gelu_pytorch_tanh  x / 2 * (1 + tanh(u)) = x * sigmoid(2 u),  u = sqrt(2 / pi) * (x + 0.044715 x^3)
    quick_gelu         x * sigmoid(1.702 x)

Reference: vila2/ops/activations.py. Tests: tests/kernels/test_activations.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = ("gelu", "gelu_pytorch_tanh", "quick_gelu")
_BLOCK = 2048


@triton.jit
def gelu_of(wide, KIND: tl.constexpr):
    """GELU of float32 values."""
    if KIND == "gelu":
        y = 0.5 * wide * (1 + tl.erf(wide * 0.7071067811865476))
    elif KIND == "gelu_pytorch_tanh":
        y = wide * tl.sigmoid(1.5957691216057308 * (wide + 0.044715 * wide * wide * wide))
    else:
        y = wide * tl.sigmoid(1.702 * wide)
    return y


@triton.jit
def _gelu_kernel(x_ptr, y_ptr, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    y = gelu_of(x.to(tl.float32), KIND)
    tl.store(y_ptr + at, y.to(x.dtype), mask=inside)


def gelu_triton(x: Tensor, kind: str) -> Tensor:
    """GELU of `kind`, one of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"unknown gelu {kind!r}: expected one of {', '.join(KINDS)}")
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        _gelu_kernel[(triton.cdiv(x.numel(), _BLOCK),)](x, y, x.numel(), KIND=kind, BLOCK=_BLOCK, num_warps=8)
    return y
