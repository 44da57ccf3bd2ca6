"""Every kernel compiled ahead of time for each kind of GPU, without one: cubins, and what they use of registers.

A kernel that spills is a bug here: its figures on a GPU would be those of local memory. One that takes more registers
than it was recorded with (`python -m tests.kernels.aot record 90`) may lose half of its programs on a multiprocessor.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = pytest.mark.triton

ROOT = Path(__file__).parents[2]
MAX_SHARED = {
    80: 163 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}  # bytes that one program may have
SLACK = 8  # registers: a card gives them out by so many a thread


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_compiles_without_spills(capability):
    from tests.kernels.aot import recorded

    # Triton reads TRITON_INTERPRET when a kernel is defined: a process of its own compiles. Cubins are kept in .cache.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(ROOT / ".cache" / "triton")}
    command = [sys.executable, "-m", "tests.kernels.aot", str(capability)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) >= (10 if capability == 89 else 35)
    spilling = [k for k in kernels if k["stack"] > k["max_stack"]]
    assert not spilling, spilling
    assert all(k["cubin_bytes"] > 1000 for k in kernels)
    if not version("triton").startswith("3.6."):
        return  # another compiler gives out other registers
    most = recorded(capability)
    assert {(k["case"], k["name"]) for k in kernels} == set(most)
    grown = [k for k in kernels if k["registers"] > most[k["case"], k["name"]] + SLACK]
    assert not grown, grown
    too_much = [k for k in kernels if k["shared"] > MAX_SHARED[capability]]
    assert not too_much, too_much
