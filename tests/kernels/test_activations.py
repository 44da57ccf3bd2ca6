"""SwiGLU (forward and backward) and GELU in Triton against their references."""

import pytest
import torch

pytestmark = pytest.mark.triton

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (3, 200), (2, 3, 2500)], ids=str)
def test_silu_mul(shape, dtype, device, near):
    from vila2.kernels.silu_mul import silu_mul_autograd, silu_mul_triton
    from vila2.ops.activations import silu_mul_reference

    given = (torch.randn(shape) * 3).to(device, dtype)
    torch.testing.assert_close(silu_mul_triton(given), silu_mul_reference(given), **near(dtype, 2))
    dy = torch.randn(*shape[:-1], shape[-1] // 2).to(device, dtype)
    ours, theirs = given.clone().requires_grad_(), given.clone().requires_grad_()
    silu_mul_autograd(ours).backward(dy)
    silu_mul_reference(theirs).backward(dy)
    torch.testing.assert_close(ours.grad, theirs.grad, **near(dtype, 3))


def test_an_odd_gate_is_refused(device):
    from vila2.kernels.silu_mul import silu_mul_triton

    with pytest.raises(ValueError, match="gate and up"):
        silu_mul_triton(torch.zeros(2, 7, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["gelu", "gelu_pytorch_tanh", "quick_gelu"])
def test_gelu(kind, dtype, device, near):
    from vila2.kernels.gelu import gelu_triton
    from vila2.ops.activations import gelu_reference

    for given in (torch.randn(3, 1001) * 4, torch.empty(0, 5), torch.tensor([-1e30, -30.0, 0.0, 30.0, 1e30])):
        x = given.to(device, dtype)
        torch.testing.assert_close(gelu_triton(x, kind), gelu_reference(x, kind), **near(dtype, 2))


def test_an_unknown_gelu_is_refused(device):
    from vila2.kernels.gelu import gelu_triton

    with pytest.raises(ValueError, match="unknown gelu"):
        gelu_triton(torch.zeros(2, device=device), "relu")
