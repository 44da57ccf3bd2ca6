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


def test_another_type_is_refused(device):
    from vila2.kernels.quantize import quantize_tokens_triton

    with pytest.raises(ValueError, match="int8 or float8"):
        quantize_tokens_triton(torch.zeros(2, 8, device=device), torch.int16)
