"""What of this machine a run uses: threads, and the type that the model computes in."""

import os
from typing import Literal

import torch

from vila2.ops import capabilities


def chosen_precision(precision: str, device: torch.device) -> Literal["float32", "bf16"]:
    """`auto` decided: bf16 where the device multiplies it in hardware."""
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else capabilities().fast_bf16
        return "bf16" if fast else "float32"
    return "bf16" if precision == "bf16" else "float32"


def dtype_of(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def chosen_threads(threads: int | None) -> int:
    """CPU threads of this process: as told, else its share of the cores that it may run on."""
    if threads is not None:
        return threads
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
