"""What of this machine a run uses: threads, and the type that the model computes in."""

import ctypes
import os
import sys
from typing import Literal

import torch

from vila2.ops import capabilities

# Of mallopt, in malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones, instead of giving it back to the kernel.

    A step's tensors are as large as those of the step before; the kernel would hand their pages out again one fault
    and one clearing at a time. Does nothing where the C library is another.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 2**30)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)


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
