"""Activations in 8 bits, by Triton and by the reference: equal to the last bit."""

import pytest
import torch

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_quantized_tokens(given, dtype, device):
    from vila2.kernels.quantize import quantize_tokens_triton
    from vila2.ops.token_quant import quantize_tokens_reference

    for shape in ((0, 8), (1, 1), (5, 300), (2, 3, 1024)):
        x = torch.randn(shape).to(device, given)
        if len(x) > 1:
            x[0] = 0  # a row of zeros has scale 0
        values, scales = quantize_tokens_triton(x, dtype)
        expected, expected_scales = quantize_tokens_reference(x, dtype)
        torch.testing.assert_close(scales, expected_scales, rtol=1e-7, atol=0)
        torch.testing.assert_close(values.float(), expected.float(), rtol=0, atol=0)


def _quantize_after(dtype):
    """Each op that ends in 8 bits: (name, kernel call, reference call) on rows of the given values."""
    from vila2.kernels import quantize_after as kernels
    from vila2.ops import token_quant as ops

    def rms(x, weight, bias):
        residual = x.flip(0).contiguous()
        expected = ops.add_rms_norm_quantize_reference(x, residual.clone(), weight, 1e-6, dtype)
        values, scales = kernels.add_rms_norm_quantize_triton(x, residual, weight, 1e-6, dtype)
        return (values, scales, residual), expected

    def layer(x, weight, bias):
        given = (x, weight, bias, 1e-6, dtype)
        return kernels.layer_norm_quantize_triton(*given), ops.layer_norm_quantize_reference(*given)

    def silu(x, weight, bias):
        both = torch.cat((x, x.flip(0) * weight), -1)
        return kernels.silu_mul_quantize_triton(both, dtype), ops.silu_mul_quantize_reference(both, dtype)

    def gelu(x, weight, bias):
        given = (x, "gelu_pytorch_tanh", dtype)
        return kernels.gelu_quantize_triton(*given), ops.gelu_quantize_reference(*given)

    return {"rms": rms, "layer": layer, "silu": silu, "gelu": gelu}


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["rms", "layer", "silu", "gelu"])
def test_what_comes_before_a_product_ends_in_8_bits(op, given, dtype, device):
    """A value may fall to the other side of a step where the two round differently before it: rarely, and by one."""
    for shape in ((0, 8), (1, 1), (5, 300), (2, 3, 1024)):
        x = (3 * torch.randn(shape)).to(device, given)
        weight, bias = torch.rand(shape[-1]).to(device, given) + 0.5, torch.randn(shape[-1]).to(device, given)
        if x.numel() > 1:
            x[0] = 0
        ours, expected = _quantize_after(dtype)[op](x, weight, bias)
        assert ours[0].shape == shape
        assert ours[0].dtype == dtype
        for scale, wanted in zip(ours[1:], expected[1:], strict=True):  # the scales, and the sum beside them
            torch.testing.assert_close(scale, wanted, rtol=8e-3, atol=1e-6)
        wide, wanted = (pair[0].float() * pair[1][..., None] for pair in (ours, expected))
        step = expected[1][..., None] * (1.0 if dtype == torch.int8 else 32.0)
        assert bool(((wide - wanted).abs() <= 1.05 * step + 1e-6).all())
        if x.numel():
            assert float((wide - wanted).norm()) <= 4e-3 * float(wanted.norm()) + 1e-6


def test_another_type_is_refused(device):
    from vila2.kernels.quantize import quantize_tokens_triton

    with pytest.raises(ValueError, match="int8 or float8"):
        quantize_tokens_triton(torch.zeros(2, 8, device=device), torch.int16)
