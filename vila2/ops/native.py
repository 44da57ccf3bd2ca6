"""Whether an operation may run in `vila2._C`, and what this machine's CPU offers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vila2 import _C as native
else:
    try:
        from vila2 import _C as native
    except ImportError:  # a checkout that was never built: the references do all
        native = None

__all__ = ["Capabilities", "capabilities", "is_native", "is_native_training", "native"]

_KERNEL_TYPES = (torch.float32, torch.bfloat16)

# A `_C` that was built before the training kernels came lacks them.
_HAS_TRAINING = hasattr(native, "segment_attention_grad")

if native is not None:
    native.set_num_threads(torch.get_num_threads())


def is_native(first: Tensor, *others: Tensor) -> bool:
    """True if `_C` can take these tensors: on the CPU, all float32 or all bfloat16, and no gradient is wanted.

    Called for every operation of every layer: reads as little as it can. `_C` itself refuses a mix of devices.
    """
    if native is None or not first.is_cpu:
        return False
    dtype = first.dtype
    if dtype not in _KERNEL_TYPES:
        return False
    for other in others:
        if other.dtype != dtype:
            return False
    if not torch.is_grad_enabled():
        return True
    return not (first.requires_grad or any(other.requires_grad for other in others))


def is_native_training(first: Tensor, *others: Tensor) -> bool:
    """True if `_C` can take these tensors and give their gradients: as `is_native`, gradients wanted or not."""
    if not _HAS_TRAINING or not first.is_cpu or first.dtype not in _KERNEL_TYPES:
        return False
    return all(other.dtype == first.dtype and other.is_cpu for other in others)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the CPU offers. `isa` is the instruction set that `_C` uses, None if `_C` is not built."""

    isa: str | None
    avx2: bool = False
    avx2_vnni: bool = False
    avx512: bool = False
    avx512_vnni: bool = False
    avx512_bf16: bool = False
    amx_bf16: bool = False

    @property
    def fast_bf16(self) -> bool:
        """True if torch multiplies bfloat16 matrices in hardware, so that products in float32 would lose."""
        return self.avx512_bf16 or self.amx_bf16


def capabilities() -> Capabilities:
    """Asks `_C`. Raises RuntimeError if VILA2_CPU_ISA names an instruction set that is unknown or not there."""
    if native is None:
        return Capabilities(isa=None)
    return Capabilities(isa=native.isa(), **native.cpu_features())
