"""The whole op suite on each instruction set this CPU has, the choice among them, and what their files export."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vila2.ops import capabilities
from vila2.ops.native import native

pytestmark = pytest.mark.skipif(native is None, reason="vila2._C is not built")

ROOT = Path(__file__).parents[2]
AVX2 = ("-mavx2", "-mfma")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", *AVX2)
TABLES = {  # and the flags that each is built with
    "scalar": ("kScalar", ()),
    "avx2": ("kAvx2", AVX2),
    "avx2_vnni": ("kAvx2Vnni", ("-mavxvnni", *AVX2)),
    "avx512": ("kAvx512", AVX512),
    "avx512_vnni": ("kAvx512Vnni", ("-mavx512vnni", *AVX512)),
    "avx512_bf16": ("kAvx512Bf16", ("-mavx512bf16", "-mavx512vnni", *AVX512)),
}
ISAS = tuple(TABLES)


def has(isa: str) -> bool:
    return isa == "scalar" or bool(getattr(capabilities(), isa))


def run_python(*arguments: str, isa: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"VILA2_CPU_ISA": isa},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("isa", ISAS)
def test_every_op_on_each_instruction_set(isa):
    if not has(isa):
        pytest.skip(f"this CPU has no {isa}")
    if capabilities().isa == isa:
        pytest.skip(f"{isa} is what tests/unit/ops runs on here")
    done = run_python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/unit/ops", isa=isa)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_forces_an_instruction_set(isa):
    done = run_python("-c", "from vila2.ops import capabilities; print(capabilities().isa)", isa=isa)
    if has(isa):
        assert done.stdout.strip() == isa
    else:
        assert f"VILA2_CPU_ISA={isa}: this CPU cannot run it" in done.stderr


def test_an_unknown_instruction_set_is_refused():
    done = run_python("-c", "from vila2.ops import capabilities; capabilities()", isa="sse9")
    assert "VILA2_CPU_ISA=sse9: expected scalar, avx2" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_kernel_files_export_only_their_table(isa, tmp_path):
    """A shared inline function of an AVX-512 file could be linked into everybody's path and crash an older CPU."""
    compiler, nm = shutil.which("c++"), shutil.which("nm")
    if not compiler or not nm or (isa != "scalar" and os.uname().machine != "x86_64"):
        pytest.skip("needs a C++ compiler and nm, for this instruction set")
    table, flags = TABLES[isa]
    source = ROOT / "csrc" / "cpu" / f"kernels_{isa}.cpp"
    # -O0 inlines nothing: whatever has external linkage must show.
    command = [
        compiler,
        "-std=c++17",
        "-O0",
        "-fPIC",
        "-I",
        ROOT / "csrc",
        *flags,
        "-c",
        source,
        "-o",
        tmp_path / "k.o",
    ]
    subprocess.run(command, check=True)
    symbols = subprocess.run([nm, "-C", tmp_path / "k.o"], capture_output=True, text=True, check=True).stdout
    exported = [
        line.split(maxsplit=2)[2]
        for line in symbols.splitlines()
        if len(line.split()) > 2 and line.split()[1].isupper()
    ]
    assert exported == [f"vila2::cpu::{table}"]
