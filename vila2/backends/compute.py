"""Which arithmetic a precision means on this machine, and what the machine has."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vila2.errors import UsageError
from vila2.model.quantize import quantize_model
from vila2.model.quantize_cuda import quantize_fp8, quantize_int4
from vila2.model.sample import Sample
from vila2.model.vlm import VisionLanguageModel
from vila2.ops.fp8 import fp8_lack
from vila2.ops.linear import pack_linears, rounds_rows
from vila2.ops.native import capabilities, native

# Precisions whose products are a GPU's, and what they mean.
ON_CUDA = {
    "fp8": "FP8 weights and activations (e4m3, a scale a column and a token)",
    "int4": "4-bit weights in groups of 128, bf16 activations",
}


# What steps and caches of the two short runs of a quality check take on a card beside the weights.
_BUILD_BYTES = 6 << 30


@dataclass(frozen=True, slots=True)
class ComputePlan:
    """How a precision is carried out on a device: the model's type, the packed weights' (if any), the cache's.

    `low_bits` is a precision of `ON_CUDA`, whose packed weights have parts of several types.
    """

    model_dtype: torch.dtype
    packed_dtype: torch.dtype | None
    kv_dtype: torch.dtype
    summary: str
    low_bits: str | None = None

    @property
    def is_batch_invariant(self) -> bool:
        """Whether a row of a product has the same bits in any batch: what drafts need to change no caption."""
        return self.packed_dtype is not None and native is not None


BF16_PRODUCTS = "VILA2_BF16_PRODUCTS"  # whose bf16 products a CPU with bf16 instructions takes: own or torch


def takes_torch_bf16() -> bool:
    """Whether bf16 on this CPU means torch's products. They depend on the batch, ours do not.

    Ours are taken wherever AVX512-BF16 is the best there is, as both then use one instruction. torch's are taken where
    there are AMX tiles, which ours have not. Neither speed has been measured, so BF16_PRODUCTS chooses otherwise.
    """
    choice = os.environ.get(BF16_PRODUCTS, "")
    if choice not in ("", "own", "torch"):
        raise UsageError(f"{BF16_PRODUCTS}={choice}: expected own or torch")
    if choice:
        return choice == "torch"
    found = capabilities()
    return found.amx_bf16 or (found.avx512_bf16 and not rounds_rows())


def plan_compute(device: str, precision: str, deterministic: bool, takes_torch: bool) -> ComputePlan:
    """Choose the arithmetic for `precision` (float32, bf16, int8, fp8 or int4) on `device` (cpu or cuda).

    Packed products keep sums in float32 and do not depend on the batch. They serve every CPU but those whose bf16
    is torch's (`takes_torch`, see `takes_torch_bf16`), and `deterministic` runs on these too.
    """
    if precision in ON_CUDA:
        return _plan_on_cuda(device, precision, deterministic)
    if precision not in ("float32", "bf16", "int8"):
        raise UsageError(f"precision {precision!r} is not one of: float32, bf16, int8, fp8, int4")
    if precision == "int8":
        if device != "cpu":
            raise UsageError(
                "--precision int8 is for CPUs: add --device cpu, or take --precision fp8 or int4 on the GPU"
            )
        summary = "int8 weights and activations, int32 sums"
        return ComputePlan(torch.float32, torch.int8, torch.bfloat16, summary)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if device == "cuda":
        if deterministic:
            raise UsageError("--deterministic runs on the CPU only so far: add --device cpu")
        return ComputePlan(dtype, None, dtype, f"{precision} through torch on the GPU")
    if precision == "bf16" and takes_torch and not deterministic:
        return ComputePlan(dtype, None, dtype, "bf16 products of this CPU through torch, without drafts")
    rounded = "weights and rows" if precision == "bf16" and rounds_rows() else "weights"
    return ComputePlan(
        torch.float32, dtype, dtype, f"{precision} {rounded}, float32 sums, vila2's own products"
    )


def _plan_on_cuda(device: str, precision: str, deterministic: bool) -> ComputePlan:
    if deterministic:
        raise UsageError(
            f"--deterministic does not go with --precision {precision}: take float32, bf16 or int8 on the CPU"
        )
    summary = ON_CUDA[precision]
    if device == "cpu":
        summary += ", emulated in plain torch on this CPU"
    elif precision == "fp8" and (lack := fp8_lack()) is not None:
        raise UsageError(f"--precision fp8: {lack}; take --precision int4 or bf16 on this GPU")
    return ComputePlan(torch.bfloat16, None, torch.bfloat16, summary, low_bits=precision)


def resolve_device_for(device: str, precision: str) -> str:
    """`resolve_device` for a precision: those of GPUs are emulated on a CPU only where the CPU is asked for."""
    resolved = resolve_device(device)
    if precision in ON_CUDA and device == "auto" and resolved == "cpu":
        raise UsageError(
            f"--precision {precision} is for CUDA GPUs, and torch sees none here: take --precision int8, or "
            "--device cpu to emulate it (slowly)"
        )
    return resolved


def builds_on(precision: str, num_parameters: int) -> str:
    """The device on which an engine of this precision is made and measured: cuda where it can run there and the card
    has room for the model in float32, which it is compared with; else cpu.
    """
    if precision not in ON_CUDA or not torch.cuda.is_available():
        return "cpu"
    if precision == "fp8" and fp8_lack() is not None:
        return "cpu"
    # A quarter more for the rows that products meet, and for what a search of scales holds.
    return "cuda" if torch.cuda.mem_get_info()[0] >= 5 * num_parameters + _BUILD_BYTES else "cpu"


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


def pack_model(
    model: VisionLanguageModel,
    plan: ComputePlan,
    inputs: Mapping[str, Tensor] | None = None,
    samples: Sequence[Sample] = (),
) -> None:
    """Turn a loaded model (float32, or already in the plan's type) into what the plan runs, in place.

    `inputs` are rows that the decoder's products met, for int4 (see `quantize_int4`); `samples` are what int8 weights
    are rounded for (see vila2.backends.samples).
    """
    if plan.packed_dtype is torch.int8:
        quantize_model(model, narrow=wants_narrow(), samples=samples)
    elif plan.low_bits == "fp8":
        quantize_fp8(model)
    elif plan.low_bits == "int4":
        quantize_int4(model, inputs)
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
