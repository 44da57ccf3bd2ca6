"""What a training run does with its process."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from vila2.train.machine import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def fill():
    np.empty(8 << 20).fill(1)

fill()
before = faults()
for _ in range(8):
    fill()
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_freed_memory_is_used_again() -> None:
    """Eight arrays of 64 MiB one after the other: new pages each time, or the same ones."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))
    }
    taken = {}
    for how in ("plain", "keep"):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, how], env=environment, capture_output=True, text=True, check=True
        )
        taken[how] = int(done.stdout)
    if taken["plain"] < 100:
        pytest.skip("this C library keeps memory by itself")
    assert taken["keep"] < taken["plain"] / 10
