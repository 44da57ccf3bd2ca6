"""FP8 and 4-bit weights by their definitions: how far rounding goes, what is packed where, what is refused."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vila2.ops import fp8
from vila2.ops.fp8 import FP8, Fp8Weight, fp8_lack, fp8_linear, fp8_linear_reference, quantize_fp8_weight
from vila2.ops.int4 import GROUP, int4_linear, int4_linear_reference, quantize_int4_weight
from vila2.ops.linear import Linear

SHAPES = [(1, 1), (5, 127), (16, 128), (7, 129), (3, 1000)]  # columns, depth


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_rounds_to_the_nearest(shape):
    weight = torch.randn(shape)
    weight[0] = 0
    rounded = quantize_fp8_weight(weight)
    assert rounded.values.dtype == FP8
    assert (rounded.columns, rounded.depth) == shape
    # Three bits of mantissa: a relative step of 1/8, and below 2^-6 of the scale an absolute one of 2^-9.
    room = weight.abs() / 16 + rounded.scales[:, None] * 2**-10 + 1e-9
    assert bool(((rounded.dequantized() - weight).abs() <= room).all())
    assert torch.equal(rounded.dequantized()[0], torch.zeros(shape[1]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int4_rounds_within_half_a_step_of_its_group(shape):
    weight = torch.randn(shape) + 0.3
    weight[0] = 0
    rounded = quantize_int4_weight(weight)
    groups = -(-shape[1] // GROUP)
    assert rounded.values.shape == (groups, shape[0], GROUP // 2)
    assert (rounded.columns, rounded.depth) == shape
    steps = rounded.scales.float().T.repeat_interleave(GROUP, 1)[:, : shape[1]]
    # The zero is rounded too, and the scale to bfloat16: an end of the range may lie a step out.
    error = (rounded.dequantized() - weight).abs()
    assert bool((error <= 1.1 * steps).all())
    assert float((error / steps.clamp_min(1e-9)).mean()) < 0.35
    assert torch.equal(rounded.dequantized()[0], torch.zeros(shape[1]))


def test_int4_packs_a_group_in_two_halves():
    weight = torch.arange(GROUP, dtype=torch.float32)[None] % 16
    rounded = quantize_int4_weight(weight)
    assert torch.equal(rounded.dequantized(), weight)  # 0..15 needs no rounding
    first, last = rounded.values[0, 0, 1], rounded.values[0, 0, 63]
    assert (int(first) & 15, int(first) >> 4) == (1, 65 % 16)
    assert (int(last) & 15, int(last) >> 4) == (63 % 16, 127 % 16)


def test_a_narrowed_range_clips_and_steps_finer():
    weight = torch.randn(4, 128)
    weight[:, 3] = 20.0
    plain = quantize_int4_weight(weight).dequantized()
    shrunk = quantize_int4_weight(weight, shrink=torch.full((4, 1), 0.5)).dequantized()
    assert bool((shrunk[:, 3] < 11).all())
    others = torch.arange(128) != 3
    assert (shrunk - weight)[:, others].abs().mean() < 0.7 * (plain - weight)[:, others].abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(), (0,), (1,), (2, 3), (300,)], ids=str)
def test_products_are_those_of_the_rounded_weight(rows, dtype):
    x, bias = torch.randn(*rows, 130).to(dtype), torch.randn(9)
    for quantize, product, tolerance in (
        (quantize_fp8_weight, fp8_linear, 0.06),
        (quantize_int4_weight, int4_linear, 0.01),
    ):
        weight = quantize(torch.randn(9, 130), bias)
        y = product(x, weight)
        assert y.shape == (*rows, 9)
        assert y.dtype == dtype
        expected = x.float() @ weight.dequantized().T + bias
        if y.numel():
            assert (y.float() - expected).norm() <= tolerance * expected.norm()


def test_rows_that_are_not_numbers_stay_alone():
    x = torch.randn(3, 128)
    x[1, 5] = torch.nan
    y = fp8_linear_reference(x, quantize_fp8_weight(torch.randn(4, 128)))
    assert bool(y[1].isnan().all())
    assert bool(y[[0, 2]].isfinite().all())


def test_gradients_are_refused():
    x = torch.randn(2, 128, requires_grad=True)
    for weight, product in (
        (quantize_fp8_weight(torch.randn(4, 128)), fp8_linear),
        (quantize_int4_weight(torch.randn(4, 128)), int4_linear),
    ):
        with pytest.raises(ValueError, match="no gradient"):
            product(x, weight)


def test_a_linear_multiplies_with_what_it_was_given():
    layer, x = Linear(128, 6), torch.randn(3, 128)
    for quantize, reference in (
        (quantize_fp8_weight, fp8_linear_reference),
        (quantize_int4_weight, int4_linear_reference),
    ):
        weight = quantize(torch.randn(6, 128), torch.randn(6))
        layer.set_packed(weight.to("cpu"))
        assert torch.equal(layer(x), reference(x, weight))
        assert layer.weight is None


@pytest.mark.parametrize(("capability", "lacks"), [((8, 0), True), ((8, 9), False), ((9, 0), False)])
def test_cards_without_fp8_are_named(capability, lacks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    lack = fp8_lack()
    assert lack == (
        "NVIDIA A100 has capability 8.0, FP8 products begin with 8.9 (Ada, Hopper)" if lacks else None
    )


@pytest.mark.parametrize("rows", [(1,), (7,), (2, 300)], ids=str)
def test_torch_takes_our_fp8_products(rows, monkeypatch):
    """What `_scaled_mm` asks of shapes, strides and scales on CUDA, by torch's own rules, without a GPU."""
    monkeypatch.setattr(fp8, "_capability", lambda device: (9, 0))
    with FakeTensorMode():

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        values, scales = empty(*rows, 1152, dtype=FP8), empty(*rows)
        for bias in (None, empty(4304, dtype=torch.bfloat16)):
            weight = Fp8Weight(empty(4304, 1152, dtype=FP8), empty(4304), bias)
            y = fp8.fp8_product(values, scales, weight, torch.bfloat16)
            assert (tuple(y.shape), y.dtype, y.device.type) == ((*rows, 4304), torch.bfloat16, "cuda")
        with pytest.raises(RuntimeError, match="scal"):  # the rules are there
            fp8.fp8_product(values, scales, replace(weight, scales=empty(4303)), torch.bfloat16)
        odd = Fp8Weight(empty(4304, 1150, dtype=FP8), empty(4304), None)
        assert not fp8._is_rowwise(empty(*rows, 1150, dtype=FP8), odd, torch.bfloat16)
        assert not fp8._is_rowwise(values, weight, torch.float32)
