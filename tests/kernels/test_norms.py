"""RMS norm and layer norm in Triton against their references, forward and backward."""

import pytest
import torch

pytestmark = pytest.mark.triton

SHAPES = [(0, 8), (1, 1), (3, 576), (2, 5, 100), (2, 4096)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(shape, dtype, device, near):
    from vila2.kernels.rms_norm import add_rms_norm_triton, rms_norm_triton
    from vila2.ops.norms import add_rms_norm_reference, rms_norm_reference

    x, residual, weight = (torch.randn(s).to(device, dtype) for s in (shape, shape, shape[-1:]))
    expected, total = add_rms_norm_reference(x, residual, weight, 1e-5)
    torch.testing.assert_close(
        rms_norm_triton(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6), **near(dtype)
    )
    consumed = residual.clone()
    normed, summed = add_rms_norm_triton(x, consumed, weight, 1e-5)
    torch.testing.assert_close(normed, expected, **near(dtype))
    torch.testing.assert_close(summed, total, **near(dtype))
    assert summed is consumed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm(shape, dtype, device, near):
    from vila2.kernels.layer_norm import layer_norm_triton
    from vila2.ops.norms import layer_norm_reference

    x = (torch.randn(shape) * 0.5 + 20).to(device, dtype)  # the mean dwarfs the spread
    weight, bias = (torch.randn(shape[-1]).to(device, dtype) for _ in range(2))
    expected = layer_norm_reference(x, weight, bias, 1e-6)
    torch.testing.assert_close(layer_norm_triton(x, weight, bias, 1e-6), expected, **near(dtype, 5))


def test_input_that_is_not_contiguous(device, near):
    from vila2.kernels.layer_norm import layer_norm_triton
    from vila2.kernels.rms_norm import rms_norm_triton
    from vila2.ops.norms import layer_norm_reference, rms_norm_reference

    x = torch.randn(64, 6, device=device).t()
    weight = torch.randn(128, device=device)[::2]
    near = near(torch.float32)
    torch.testing.assert_close(rms_norm_triton(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6), **near)
    torch.testing.assert_close(
        layer_norm_triton(x, weight, weight, 1e-6), layer_norm_reference(x, weight, weight, 1e-6), **near
    )


def test_wrong_shapes_are_refused(device):
    from vila2.kernels.layer_norm import layer_norm_triton
    from vila2.kernels.rms_norm import add_rms_norm_triton, rms_norm_triton

    x = torch.zeros(2, 8, device=device)
    with pytest.raises(ValueError, match="weight"):
        rms_norm_triton(x, x[0, :7], 1e-6)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm_triton(x, x[:1], x[0], 1e-6)
    with pytest.raises(ValueError, match="bias"):
        layer_norm_triton(x, x[0], x[0, :7], 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (11, 24), (2, 3, 576)], ids=str)
def test_gradients_of_rms_norm(shape, dtype, device, near, monkeypatch):
    from vila2.kernels.rms_norm import add_rms_norm_autograd, rms_norm_autograd
    from vila2.ops.norms import add_rms_norm_reference, rms_norm_reference

    monkeypatch.setattr("vila2.kernels.rms_norm.num_processors", lambda device: 2)  # several rows a program
    given = [torch.randn(s).to(device, dtype) for s in (shape, shape, shape[-1:])]
    dy, dsum = torch.randn(shape).to(device, dtype), torch.randn(shape).to(device, dtype)

    def gradients(add, plain):
        x, residual, weight = (part.clone().requires_grad_() for part in given)
        y, total = add(x, residual, weight, 1e-5)
        torch.autograd.backward([y, total], [dy, dsum])
        alone, scale = given[0].clone().requires_grad_(), given[2].clone().requires_grad_()
        plain(alone, scale, 1e-6).backward(dy)
        return [y, total, x.grad, residual.grad, weight.grad, alone.grad, scale.grad]

    ours = gradients(add_rms_norm_autograd, rms_norm_autograd)
    theirs = gradients(add_rms_norm_reference, rms_norm_reference)
    rows = max(1, given[0].numel() // shape[-1])
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        times = rows**0.5 * 2 if index in (4, 6) else 3  # a weight's gradient sums over rows
        torch.testing.assert_close(one, other, **near(dtype, times))


def test_a_branch_without_gradient(device):
    from vila2.kernels.rms_norm import add_rms_norm_autograd

    x, residual, weight = (
        torch.randn(s, device=device, requires_grad=True) for s in ((4, 16), (4, 16), (16,))
    )
    _, total = add_rms_norm_autograd(x, residual, weight, 1e-6)
    total.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(residual.grad, torch.ones_like(x))
    assert weight.grad is None


@pytest.mark.gpu
def test_ops_reach_the_kernels_on_cuda():
    from vila2.ops.norms import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference

    x, weight = torch.randn(4, 576, device="cuda"), torch.randn(576, device="cuda")
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
    torch.testing.assert_close(
        layer_norm(x, weight, weight, 1e-6), layer_norm_reference(x, weight, weight, 1e-6)
    )
