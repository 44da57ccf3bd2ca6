"""Norms, activations and patches: each fast path against its reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vila2.ops import capabilities
from vila2.ops.activations import GELU_KINDS, gelu, gelu_reference, silu_mul, silu_mul_reference
from vila2.ops.native import native
from vila2.ops.norms import (
    add_layer_norm,
    add_layer_norm_reference,
    add_rms_norm,
    add_rms_norm_reference,
    layer_norm,
    layer_norm_reference,
    rms_norm,
    rms_norm_reference,
)
from vila2.ops.patches import image_patches, image_patches_reference
from vila2.ops.threads import set_threads

FLOAT_TYPES = [torch.float32, torch.bfloat16]
ROWS = [(0, 8), (1, 1), (1, 576), (3, 17), (2, 5, 64), (130, 1000)]


def close(actual, expected):
    """Within float32 rounding; for bfloat16, within the last place."""
    assert actual.dtype == expected.dtype
    tolerance = 2e-5 if actual.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_norms_equal_their_references(shape, dtype):
    torch.manual_seed(0)
    x, residual = (torch.randn(shape) * 3 + 1).to(dtype), torch.randn(shape).to(dtype)
    weight, bias = torch.randn(shape[-1]).to(dtype), torch.randn(shape[-1]).to(dtype)
    close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
    close(layer_norm(x, weight, bias, 1e-6), layer_norm_reference(x, weight, bias, 1e-6))
    expected = add_rms_norm_reference(x, residual, weight, 1e-5)
    normed, summed = add_rms_norm(x, residual.clone(), weight, 1e-5)
    close(normed, expected[0])
    assert torch.equal(summed, expected[1])
    expected = add_layer_norm_reference(x, residual, weight, bias, 1e-5)
    normed, summed = add_layer_norm(x, residual.clone(), weight, bias, 1e-5)
    close(normed, expected[0])
    assert torch.equal(summed, expected[1])
    assert torch.equal(normed, layer_norm(expected[1], weight, bias, 1e-5))  # the fusion changes no bit


def test_a_strided_sum_is_normed_too():
    x, residual = torch.randn(6, 40), torch.randn(40, 6).t()
    weight, bias = torch.randn(40), torch.randn(40)
    kept = residual.clone()
    normed, summed = add_layer_norm(x, residual, weight, bias, 1e-6)
    assert torch.equal(summed, x + kept)
    close(normed, layer_norm_reference(x + kept, weight, bias, 1e-6))


def test_layer_norm_far_from_zero():
    x = torch.randn(4, 100) + 1000
    weight, bias = torch.ones(100), torch.zeros(100)
    expected = layer_norm_reference(x.double(), weight.double(), bias.double(), 1e-6).float()
    torch.testing.assert_close(layer_norm(x, weight, bias, 1e-6), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (3, 34), (2, 5, 64), (200, 3072)], ids=str)
def test_activations_equal_their_references(shape, dtype):
    torch.manual_seed(0)
    x = (torch.randn(shape) * 5).to(dtype)
    close(silu_mul(x), silu_mul_reference(x))
    for kind in GELU_KINDS:
        close(gelu(x, kind), gelu_reference(x, kind))


@pytest.mark.parametrize("kind", GELU_KINDS)
def test_activations_at_the_ends_of_the_range(kind):
    x = torch.tensor([-3e38, -1e5, -90.0, -0.0, 0.0, 90.0, 1e5, 3e38])
    # Far below zero 0 and -0 are both right.
    torch.testing.assert_close(gelu(x, kind), gelu_reference(x, kind), rtol=1e-5, atol=1e-6)
    ones = torch.ones_like(x)
    expected = silu_mul_reference(torch.cat((x, ones)))
    torch.testing.assert_close(silu_mul(torch.cat((x, ones))), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_nan_is_passed_on(dtype):
    x = torch.full((2, 36), torch.nan, dtype=dtype)
    weight = torch.ones(36, dtype=dtype)
    for y in (
        rms_norm(x, weight, 1e-6),
        layer_norm(x, weight, weight, 1e-6),
        silu_mul(x),
        gelu(x, "quick_gelu"),
    ):
        assert y.isnan().all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300))
def test_rows_are_independent(rows, width):
    """A row alone and among others: the same bits, with more threads too."""
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 2 * width), torch.randn(2 * width)
    try:
        set_threads(2)
        normed, gated = rms_norm(x, weight, 1e-6), silu_mul(x)
    finally:
        set_threads(1)
    for i in range(rows):
        assert torch.equal(rms_norm(x[i], weight, 1e-6), normed[i])
        assert torch.equal(silu_mul(x[i]), gated[i])


def test_gradients_flow_through_the_references():
    x = torch.randn(2, 8, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    normed, summed = add_rms_norm(rms_norm(x, weight, 1e-6), x, weight, 1e-6)
    normed = add_layer_norm(normed, x, weight, weight, 1e-6)[0]
    total = (
        silu_mul(normed).sum() + gelu(summed, "quick_gelu").sum() + layer_norm(x, weight, weight, 1e-6).sum()
    )
    total.backward()
    assert x.grad is not None
    assert weight.grad is not None


def test_unknown_gelu_is_refused():
    with pytest.raises(ValueError, match="swish"):
        gelu(torch.zeros(2), "swish")


@pytest.mark.skipif(native is None, reason="vila2._C is not built")
def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"weight: expected shape \(8\)"):
        rms_norm(torch.zeros(2, 8), torch.zeros(7), 1e-6)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(torch.zeros(2, 8), torch.zeros(1, 8), torch.zeros(8), 1e-6)
    with pytest.raises(ValueError, match="bias"):
        layer_norm(torch.zeros(2, 8), torch.zeros(8), torch.zeros(9), 1e-6)
    with pytest.raises(ValueError, match="twice the width"):
        native.silu_mul(torch.zeros(2, 8), torch.zeros(2, 8))
    with pytest.raises(ValueError, match="last axis"):
        native.silu_mul(torch.zeros(2, 0), torch.zeros(2, 0))


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(
    ("shape", "patch"),
    [
        ((1, 14, 14, 3), 14),
        ((2, 33, 45, 3), 14),
        ((3, 64, 32, 3), 16),
        ((0, 28, 28, 3), 14),
        ((1, 5, 5, 3), 7),
        ((1, 6, 4, 3), 1),
    ],
    ids=str,
)
def test_patches_equal_their_reference_bit_for_bit(shape, patch, dtype):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    actual = image_patches(images, patch, mean, std, dtype)
    assert torch.equal(actual, image_patches_reference(images, patch, mean, std, dtype))
    assert actual.dtype == dtype


def test_patches_are_what_a_convolution_multiplies():
    images = torch.randint(0, 256, (2, 30, 45, 3), dtype=torch.uint8)
    weight = torch.randn(8, 3, 14, 14)
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)
    pixels = ((images / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.conv2d(pixels, weight, stride=14).flatten(2).transpose(1, 2)
    actual = image_patches(images, 14, mean, std, torch.float32) @ weight.flatten(1).T
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_patches_of_anything_else_are_refused():
    mean = (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="uint8"):
        image_patches(torch.zeros(1, 4, 4, 3), 2, mean, mean, torch.float32)
    with pytest.raises(ValueError, match="uint8"):
        image_patches(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 2, mean, mean, torch.float32)
    with pytest.raises(ValueError, match="patch"):
        image_patches(torch.zeros(1, 4, 4, 3, dtype=torch.uint8), 0, mean, mean, torch.float32)


@pytest.mark.skipif(native is None, reason="vila2._C is not built")
def test_capabilities_and_threads():
    found = capabilities()
    assert found.isa in ("scalar", "avx2", "avx2_vnni", "avx512", "avx512_vnni")
    assert found.fast_bf16 == (found.avx512_bf16 or found.amx_bf16)
    try:
        set_threads(3)
        assert (torch.get_num_threads(), native.num_threads()) == (3, 3)
    finally:
        set_threads(1)
    with pytest.raises(ValueError, match="thread"):
        set_threads(0)
