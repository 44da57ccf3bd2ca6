"""Whether an operation may run in Triton: on CUDA, with triton installed."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


@cache
def has_triton() -> bool:
    """Whether triton is installed; it is not imported for that."""
    return find_spec("triton") is not None


def is_triton(*tensors: Tensor) -> bool:
    """True if a Triton kernel can take these tensors: on CUDA, floating ones in a type that kernels read."""
    return all(tensor.is_cuda for tensor in tensors) and has_triton()


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether a backward pass will need this operation."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
