"""Norms and activations with gradients: `_C` against the references, and the references against finite differences."""

import pytest
import torch

from vila2.ops import norms
from vila2.ops.activations import GELU_KINDS, gelu, gelu_reference, silu_mul, silu_mul_reference
from vila2.ops.norms import add_rms_norm, add_rms_norm_reference, layer_norm, rms_norm, rms_norm_reference
from vila2.ops.threads import set_threads

torch.set_num_threads(1)

SHAPES = [(0, 8), (1, 2), (3, 34), (2, 5, 64), (517, 192)]
FLOAT_TYPES = [torch.float32, torch.bfloat16]


def made(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype).requires_grad_()


def with_gradients(function, *inputs):
    """All outputs, then all gradients of a sum that weighs every element of every output differently."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum(
        (out.float() * torch.linspace(-1, 2, max(1, out.numel()))[: out.numel()].view(out.shape)).sum()
        * (i + 1)
        for i, out in enumerate(outputs)
    )
    return [*outputs, *torch.autograd.grad(total, inputs)]


def agree(ours, theirs, dtype):
    tolerance = {torch.float32: 3e-5, torch.bfloat16: 4e-2}[dtype]
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        # Sums over many rows grow: relative to the largest.
        scale = max(1.0, float(b.detach().float().abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norms(shape, dtype):
    x, residual = made(*shape, dtype=dtype, scale=3), made(*shape, dtype=dtype, seed=1)
    weight = made(shape[-1], dtype=dtype, seed=2)
    agree(
        with_gradients(lambda *a: rms_norm(*a, 1e-6), x, weight),
        with_gradients(lambda *a: rms_norm_reference(*a, 1e-6), x, weight),
        dtype,
    )
    agree(
        with_gradients(lambda *a: add_rms_norm(*a, 1e-5), x, residual, weight),
        with_gradients(lambda *a: add_rms_norm_reference(*a, 1e-5), x, residual, weight),
        dtype,
    )


def test_the_residual_is_left_alone_where_a_gradient_is_wanted():
    x, residual, weight = made(5, 8).detach(), made(5, 8, seed=1).detach(), made(8)
    before = residual.clone()
    normed, summed = add_rms_norm(x, residual, weight, 1e-6)
    assert normed.requires_grad
    assert torch.equal(residual, before)
    assert torch.equal(summed, x + residual)


def test_a_norm_of_which_only_the_sum_is_used():
    x, residual, weight = made(4, 8), made(4, 8, seed=1), made(8, seed=2)
    summed = add_rms_norm(x, residual, weight, 1e-6)[1]
    gradients = torch.autograd.grad((summed * 3).sum(), (x, residual, weight), allow_unused=True)
    assert torch.equal(gradients[0], torch.full((4, 8), 3.0))
    assert torch.equal(gradients[1], gradients[0])
    assert gradients[2] is None or not gradients[2].any()


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activations(shape, dtype):
    x = made(*shape, dtype=dtype, scale=4)
    agree(with_gradients(silu_mul, x), with_gradients(silu_mul_reference, x), dtype)
    for kind in GELU_KINDS:
        agree(
            with_gradients(lambda v, k=kind: gelu(v, k), x),
            with_gradients(lambda v, k=kind: gelu_reference(v, k), x),
            dtype,
        )


@pytest.mark.parametrize("kind", GELU_KINDS)
def test_gelu_at_the_ends_of_the_range(kind):
    x = torch.tensor([-3e38, -1e5, -90.0, -21.0, -6.0, -1e-30, 0.0, 1e-30, 6.0, 21.0, 90.0, 1e5, 3e38])
    value = gelu(x.requires_grad_(), kind)
    value.sum().backward()
    assert value.isfinite().all()
    assert x.grad.isfinite().all()
    exact = x.detach().double().clamp(-1e6, 1e6).requires_grad_()
    gelu_reference(exact, kind).sum().backward()
    torch.testing.assert_close(x.grad, exact.grad.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value[3:-3], gelu_reference(exact, kind)[3:-3].float(), rtol=1e-5, atol=1e-5)


def test_nan_is_passed_on():
    x = torch.full((2, 36), torch.nan, requires_grad=True)
    weight = torch.ones(36, requires_grad=True)
    for out in (rms_norm(x, weight, 1e-6), silu_mul(x), *(gelu(x, kind) for kind in GELU_KINDS)):
        assert out.isnan().all()
        assert torch.autograd.grad(out.sum(), x)[0].isnan().all()


@pytest.mark.parametrize(
    "function",
    [
        lambda x, r, w: rms_norm_reference(x, w, 1e-6),
        lambda x, r, w: add_rms_norm_reference(x, r, w, 1e-6),
        lambda x, r, w: layer_norm(x, w, w, 1e-6),
        lambda x, r, w: silu_mul_reference(x),
        lambda x, r, w: tuple(gelu_reference(x, kind) for kind in GELU_KINDS),
    ],
)
def test_references_have_true_gradients(function, monkeypatch):
    # The references round to float32 inside, whatever they are given: lift that for finite differences.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    inputs = [made(3, 6, seed=i).detach().double().requires_grad_() for i in range(2)]
    weight = made(6, seed=2).detach().double().requires_grad_()
    assert torch.autograd.gradcheck(function, (*inputs, weight))


def test_a_frozen_weight_costs_no_gradient():
    x, weight = made(4, 8), made(8, seed=1).detach()
    rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_the_same_bits_on_any_number_of_threads():
    x, residual, weight = made(2000, 48), made(2000, 48, seed=1), made(48, seed=2)
    results = []
    try:
        for threads in (1, 3):
            set_threads(threads)
            results.append(
                with_gradients(lambda *a: add_rms_norm(*a, 1e-6), x, residual, weight)
                + with_gradients(silu_mul, x)
                + with_gradients(lambda v: gelu(v, "gelu"), x)
            )
    finally:
        set_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_the_compiled_kernels_the_references_serve(monkeypatch):
    monkeypatch.setattr(norms, "is_native_training", lambda *tensors: False)
    x, weight = made(4, 8), made(8, seed=1)
    agree(
        with_gradients(lambda *a: rms_norm(*a, 1e-6), x, weight),
        with_gradients(lambda *a: rms_norm_reference(*a, 1e-6), x, weight),
        torch.float32,
    )
