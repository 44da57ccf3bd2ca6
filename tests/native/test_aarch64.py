"""The extension compiles for aarch64, where the kernels take their scalar path: where a cross compiler is at hand.

`make test-aarch64` fetches one (zig, which brings Linux's headers too); a GNU one on the path serves as well. What is
compiled here does not run here.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ZIG = ROOT / ".cache" / "aarch64" / "bin" / "python"
# As CMakeLists.txt chooses them: the files of one x86 instruction set each are not for this CPU.
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "csrc").rglob("*.cpp")
    if not path.name.startswith("kernels_") or path.name == "kernels_scalar.cpp"
)


def cross_compiler() -> list[str] | None:
    if ZIG.exists():
        return [str(ZIG), "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu"]
    gnu = shutil.which("aarch64-linux-gnu-g++")
    return [gnu] if gnu else None


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_a_file_compiles_for_aarch64(source, tmp_path):
    compiler = cross_compiler()
    if compiler is None:
        pytest.skip("needs a compiler for aarch64: `make test-aarch64` fetches one")
    pybind11 = pytest.importorskip("pybind11")
    headers = ["csrc", sysconfig.get_path("include"), pybind11.get_include()]
    flags = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-c"]
    done = subprocess.run(
        [*compiler, *flags, *(f"-I{folder}" for folder in headers), source, "-o", tmp_path / "a.o"],
        cwd=ROOT,
        env=os.environ | {"ZIG_GLOBAL_CACHE_DIR": str(ROOT / ".cache" / "aarch64" / "zig")},
        capture_output=True,
        text=True,
        check=False,
    )
    if "pyconfig.h' file not found" in done.stderr:
        pytest.skip(f"the Python headers of {sys.prefix} are for this machine alone")
    assert done.returncode == 0, done.stderr[-3000:]


def test_no_file_is_left_out():
    """Without an instruction set's file there is the scalar one, and all that stands around it."""
    assert "csrc/cpu/kernels_scalar.cpp" in SOURCES
    assert "csrc/cpu/dispatch.cpp" in SOURCES
    assert "csrc/bindings.cpp" in SOURCES
    assert not any("avx" in source for source in SOURCES)
