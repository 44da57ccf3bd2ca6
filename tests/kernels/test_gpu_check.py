"""The suite for a GPU runs without one: the same code on tiny shapes, every result right, no row written."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.triton

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "bench" / "results" / "gpu.csv"


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "gpu_check.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_dry_run_is_right_everywhere():
    before = ROWS.read_bytes() if ROWS.exists() else None
    done = check("--dry")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    assert last.endswith("results, 0 wrong, 0 broken, 0 of 0 bars met")
    for name in (
        "prefill attention",
        "captions tiny",
        "transformers tiny",
        "fp8 product",
        "captions tiny int4",
        "training step",
    ):
        assert name in done.stdout
    assert (ROWS.read_bytes() if ROWS.exists() else None) == before


@pytest.mark.gpu
def test_an_unknown_section_is_refused():
    done = check("--only", "colours")
    assert done.returncode == 2
    assert "known are kernels" in done.stderr
