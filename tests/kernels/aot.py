"""Ahead-of-time compilation without a GPU: what a launch would run there, as a cubin, with its registers and spills.

Inside `compiling_for(capability)` a call of a kernel's public wrapper compiles instead of launching, specialised on
its arguments exactly as on a GPU (tensors may lie on the meta device). Triton's own cache keeps the cubins.
"""

import csv
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

if TYPE_CHECKING:
    from tests.kernels.aot_cases import Case

CAPABILITIES = (80, 89, 90, 100)
REGISTERS = (
    Path(__file__).parent / "registers.csv"
)  # capability, case, kernel and its registers, as `record` found them
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Built:
    """A kernel for one capability: registers a thread, bytes of stack (spills) a thread, bytes of shared memory."""

    name: str
    capability: int
    registers: int
    stack: int
    shared: int
    cubin_bytes: int


class _NoDevice:
    """What Triton asks of a driver before it compiles; there is nothing to launch on."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # one cache of kernels a capability

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(capability: int) -> Iterator[list[Built]]:
    """Launches compile for `sm_<capability>`; the list fills with what they built."""
    built: list[Built] = []
    run = JITFunction.run

    @functools.wraps(run)
    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        built.append(_measure(kernel, capability))
        return kernel

    before = driver._active
    driver.set_active(_NoDevice(capability))
    try:
        with patch.object(JITFunction, "run", compile_only):
            yield built
    finally:
        driver._active = before


def _measure(kernel: Any, capability: int) -> Built:
    cubin = kernel.asm["cubin"]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = _USAGE.search(listing)
    assert found is not None, listing
    registers, stack, _, local = (int(number) for number in found.groups())
    return Built(
        kernel.metadata.name, capability, registers, stack + local, kernel.metadata.shared, len(cubin)
    )


def build(capability: int) -> Iterator[tuple["Case", Built]]:
    """Every kernel of the cases in `aot_cases` and `aot_low_bits`.

    Of 8.9 (Ada) only what it has beyond 8.0 is compiled, FP8, and attention, which has the fewest registers to spare.
    """
    from tests.kernels.aot_cases import ATTENTION_CASES, CASES
    from tests.kernels.aot_low_bits import FP8_CASES, LOW_BIT_CASES

    for case in (*ATTENTION_CASES, *FP8_CASES) if capability == 89 else (*CASES, *LOW_BIT_CASES):
        if not case.least_capability <= capability <= case.most_capability:
            continue
        with compiling_for(capability) as built:
            case.call()
        for kernel in built:
            yield case, kernel


def record(capability: int) -> None:
    """Write how many registers a thread of each kernel takes today: what the test holds it to."""
    most: dict[tuple[int, str, str], int] = {}
    for case, kernel in build(capability):
        key = capability, case.name, kernel.name
        most[key] = max(most.get(key, 0), kernel.registers)
    rows = [(*key, count) for key, count in most.items()]
    for other in CAPABILITIES:
        if other != capability:
            rows += [(other, *key, count) for key, count in recorded(other).items()]
    with REGISTERS.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(sorted(rows))


def recorded(capability: int) -> dict[tuple[str, str], int]:
    """Registers by case and kernel."""
    if not REGISTERS.exists():
        return {}
    with REGISTERS.open(newline="") as file:
        return {
            (case, name): int(count) for at, case, name, count in csv.reader(file) if int(at) == capability
        }


def main() -> None:
    """`python -m tests.kernels.aot 90`: a line of JSON for each kernel; `record 90` writes its part of `REGISTERS`."""
    import json
    import sys
    from dataclasses import asdict

    if sys.argv[1] == "record":
        record(int(sys.argv[2]))
        return
    for case, kernel in build(int(sys.argv[1])):
        row = {"case": case.name, "max_stack": case.max_stack, **asdict(kernel)}
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
