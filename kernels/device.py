"""What a launch needs to know of the device, and the checks that several kernels share."""

from functools import cache

import torch
from torch import Tensor

# An H100 has 132 multiprocessors. Where nothing is asked (the interpreter, compiling ahead) its count stands.
_PROCESSORS = 132


@cache
def _cuda_processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def num_processors(device: torch.device) -> int:
    """Multiprocessors of `device`, or an H100's where it is not CUDA."""
    if device.type != "cuda":
        return _PROCESSORS
    return _cuda_processors(torch.cuda.current_device() if device.index is None else device.index)


def rows_of(x: Tensor, most: int, name: str) -> int:
    """Rows of the last axis of `x`. ValueError unless it is 1 to `most` wide."""
    if not 1 <= x.shape[-1] <= most:
        raise ValueError(f"the last axis of {name} must be 1 to {most} wide, got {x.shape[-1]}")
    return x.numel() // x.shape[-1]


def warps_for(block: int, per_warp: int = 512, most: int = 16) -> int:
    """Warps of a program that holds `block` values in registers, `per_warp` of them a warp."""
    return min(most, max(1, block // per_warp))
