"""The Triton RMS norm against its reference: on a GPU if there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.triton

ROOT = Path(__file__).parents[2]
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
RUNS = INTERPRETS or torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETS else "cuda"
on_device = pytest.mark.skipif(not RUNS, reason="run by test_in_the_interpreter, in a process of its own")


@pytest.mark.skipif(RUNS, reason="the tests below run here")
def test_in_the_interpreter():
    """Triton reads TRITON_INTERPRET when a kernel is defined, so the others run in a process that starts with it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 576), (2, 5, 100), (2, 4096)], ids=str)
def test_equals_its_reference(shape, dtype):
    from vila2.kernels.rms_norm import add_rms_norm_triton, rms_norm_triton
    from vila2.ops.norms import add_rms_norm_reference, rms_norm_reference

    torch.manual_seed(0)
    x, residual, weight = (torch.randn(s).to(DEVICE, dtype) for s in (shape, shape, shape[-1:]))
    # A GPU rounds to the nearest bfloat16, the interpreter cuts off.
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2 if INTERPRETS else 1e-2
    expected, total = add_rms_norm_reference(x, residual, weight, 1e-5)
    torch.testing.assert_close(
        rms_norm_triton(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6), rtol=tolerance, atol=tolerance
    )
    consumed = residual.clone()
    normed, summed = add_rms_norm_triton(x, consumed, weight, 1e-5)
    torch.testing.assert_close(normed, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(summed, total, rtol=tolerance, atol=tolerance)
    assert summed is consumed


@on_device
def test_input_that_is_not_contiguous():
    from vila2.kernels.rms_norm import rms_norm_triton
    from vila2.ops.norms import rms_norm_reference

    x = torch.randn(64, 6, device=DEVICE).t()
    weight = torch.randn(128, device=DEVICE)[::2]
    torch.testing.assert_close(rms_norm_triton(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))


@on_device
def test_wrong_shapes_are_refused():
    from vila2.kernels.rms_norm import add_rms_norm_triton, rms_norm_triton

    x = torch.zeros(2, 8, device=DEVICE)
    with pytest.raises(ValueError, match="weight"):
        rms_norm_triton(x, x[0, :7], 1e-6)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm_triton(x, x[:1], x[0], 1e-6)


@pytest.mark.gpu
def test_ops_reach_the_kernel_on_cuda():
    from vila2.ops.norms import rms_norm, rms_norm_reference

    x, weight = torch.randn(4, 576, device="cuda"), torch.randn(576, device="cuda")
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
