"""The whole op suite on the instruction sets that few machines have, emulated with AVX2: `make test-isas`.

What runs is this project's code for AVX-512, VNNI and BF16, compiled against `immintrin.h` beside this file. No
emulation can show how fast it is, nor that a CPU's instructions do what Intel's guide says.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vila2.ops import capabilities

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


# Sets differ by VNNI in products of bytes alone, which these two files test.
BYTES = ("tests/unit/ops/test_quant.py", "tests/unit/ops/test_resize.py")
# That with BF16 differs from that with VNNI in products of bfloat16.
PRODUCTS = ("tests/unit/ops/test_linear.py", "tests/unit/ops/test_top.py", "tests/unit/ops/test_head.py")


@pytest.mark.parametrize(
    ("isa", "suite"),
    [
        ("avx512_vnni", ("tests/unit/ops",)),
        ("avx512_bf16", PRODUCTS),
        ("avx512", BYTES),
        ("avx2_vnni", BYTES),
    ],
)
def test_ops_on_an_emulated_instruction_set(isa, suite):
    if not capabilities().avx2:
        pytest.skip("the emulation needs AVX2")
    plugin = {"PYTHONPATH": str(HERE), "VILA2_EMULATED": str(ROOT / "build" / "emulated")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "emulated_native", *suite],
        env=os.environ | plugin | {"VILA2_CPU_ISA": isa},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
