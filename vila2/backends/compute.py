"""Which arithmetic a precision means on this machine, and what the machine has."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vila2.errors import UsageError
from vila2.model.quantize import quantize_model
from vila2.model.sample import Sample
from vila2.model.vlm import VisionLanguageModel
from vila2.ops.linear import pack_linears
from vila2.ops.native import capabilities


@dataclass(frozen=True, slots=True)
class ComputePlan:
    """How a precision is carried out on a device: the model's type, the packed weights' (if any), the cache's."""

    model_dtype: torch.dtype
    packed_dtype: torch.dtype | None
    kv_dtype: torch.dtype
    summary: str


def plan_compute(device: str, precision: str, deterministic: bool, has_bf16_products: bool) -> ComputePlan:
    """Choose the arithmetic for `precision` (float32, bf16 or int8) on `device` (cpu or cuda).

    Packed products keep sums and activations in float32 and do not depend on the batch, so they serve every
    CPU without bf16 instructions, and `deterministic` runs on those that have them.
    """
    if precision not in ("float32", "bf16", "int8"):
        raise UsageError(f"precision {precision!r} is not one of: float32, bf16, int8")
    if precision == "int8":
        if device != "cpu":
            raise UsageError("--precision int8 runs on the CPU only so far: add --device cpu")
        summary = "int8 weights and activations, int32 sums"
        return ComputePlan(torch.float32, torch.int8, torch.bfloat16, summary)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if device == "cuda":
        if deterministic:
            raise UsageError("--deterministic runs on the CPU only so far: add --device cpu")
        return ComputePlan(dtype, None, dtype, f"{precision} through torch on the GPU")
    if precision == "bf16" and has_bf16_products and not deterministic:
        return ComputePlan(dtype, None, dtype, "bf16 products of this CPU")
    return ComputePlan(
        torch.float32, dtype, dtype, f"{precision} weights, float32 sums, vila2's own products"
    )


def resolve_device(device: str) -> str:
    """`auto` becomes cuda where there is a GPU; UsageError if cuda is asked for and there is none."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: torch sees no GPU here; use --device cpu, or see `vila2-fast doctor`"
        )
    return device


def wants_narrow() -> bool:
    """Whether int8 products are fast here with narrow weights alone: CPUs without VNNI (see vila2.ops.quant).

    Their rounding error is about 1.4 times that of wide ones.
    """
    return capabilities().isa in ("avx2", "avx512")


def pack_model(model: VisionLanguageModel, plan: ComputePlan, samples: Sequence[Sample] = ()) -> None:
    """Turn a loaded model (float32, or already in the plan's type) into what the plan runs, in place.

    `samples` are what int8 weights are rounded for (see vila2.backends.samples).
    """
    if plan.packed_dtype is torch.int8:
        quantize_model(model, narrow=wants_narrow(), samples=samples)
    elif plan.packed_dtype is not None:
        pack_linears(model, plan.packed_dtype)
    else:
        model.to(plan.model_dtype)


def available_cores() -> int:
    """The cores that this process may use (its affinity mask, as containers and Slurm set it)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes of memory that can be had without swapping, the container's limit included where it shows."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            free = min(free, int(limit) - used)
    except (OSError, ValueError):
        pass  # not Linux, or no cgroup: the plain figure stands
    return free
