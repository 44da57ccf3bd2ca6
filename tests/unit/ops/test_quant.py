"""Products of bytes: exact sums, rows that depend on nothing else, and weights that no instruction saturates."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vila2.ops.native import native
from vila2.ops.quant import (
    FINISHES,
    HAS_KERNELS,
    NARROW_PAIR,
    PANEL,
    TURN_STRIDE,
    PackedBytes,
    QuantizedWeight,
    best_turn,
    byte_linear,
    byte_linear_reference,
    gated_order,
    is_narrow,
    load_packed_bytes,
    pack_bytes,
    quantize_rows_reference,
    quantize_weight,
    turn_rows,
)
from vila2.ops.threads import set_threads

needs_native = pytest.mark.skipif(not HAS_KERNELS, reason="vila2._C is not built, or without these kernels")

SHAPES = [(1, 1), (15, 3), (16, 256), (33, 257), (128, 576), (200, 1001)]  # columns, depth


def packed(
    columns: int, depth: int, *, narrow: bool, is_gated: bool = False, with_bias: bool = True, seed: int = 0
) -> PackedBytes:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(columns, depth, generator=rng) / depth**0.5
    bias = torch.randn(columns, generator=rng) if with_bias else None
    return pack_bytes(quantize_weight(weight, narrow=narrow), bias, is_gated=is_gated)


def rows_of(rows: int, depth: int, seed: int = 1) -> Tensor:
    """Rows of very different sizes, one of them zero, one without negative numbers."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, depth, generator=rng) * torch.logspace(-6, 6, max(rows, 1))[:rows, None]
    x[rows // 2 : rows // 2 + 1] = 0
    x[rows // 3 : rows // 3 + 1].abs_()
    return x


@needs_native
@pytest.mark.parametrize("depth", [1, 2, 7, 8, 100, 577])
@pytest.mark.parametrize("rows", [0, 1, 5, 64])
def test_rows_are_quantized_as_the_reference_says(rows, depth):
    x = rows_of(rows, depth)
    stride = -(-depth // 4) * 4
    found = (
        torch.empty(rows, stride, dtype=torch.uint8),
        torch.empty(rows),
        torch.empty(rows, dtype=torch.int32),
    )
    native.quantize(x, *found)
    expected = quantize_rows_reference(x)
    assert torch.equal(found[0][:, :depth], expected[0])
    assert not found[0][:, depth:].any()
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])


@needs_native
@pytest.mark.parametrize("turn", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("blocks", [1, 3])
def test_rows_are_turned_as_the_reference_says(blocks, turn):
    depth = blocks * turn * TURN_STRIDE
    x = rows_of(9, depth)
    turned = turn_rows(x, turn)
    assert ((turn_rows(turned, turn) / turn - x).abs() <= 1e-5 * x.abs().amax(-1, keepdim=True)).all()
    found = (torch.empty(9, depth, dtype=torch.uint8), torch.empty(9), torch.empty(9, dtype=torch.int32))
    native.quantize(x, *found, turn)
    for got, expected in zip(found, quantize_rows_reference(turned), strict=True):
        assert torch.equal(got, expected)


@needs_native
@pytest.mark.parametrize("rows", [1, 5, 30])
def test_a_turned_product_is_that_of_the_rows_as_they_were(rows):
    depth = 96 * TURN_STRIDE
    weight = torch.randn(40, depth, generator=torch.Generator().manual_seed(0)) / depth**0.5
    x = torch.randn(rows, depth, generator=torch.Generator().manual_seed(1))
    x[:, 100] *= 200
    turn = best_turn(depth)
    assert turn == 32
    weights = pack_bytes(quantize_weight(turn_rows(weight, turn) / turn, narrow=True), turn=turn)
    y = byte_linear(x, weights)
    assert torch.equal(y, byte_linear_reference(x, weights))
    plain = byte_linear(x, pack_bytes(quantize_weight(weight, narrow=True)))
    exact = x @ weight.T
    assert (y - exact).square().mean() < 0.3 * (plain - exact).square().mean()
    with pytest.raises(ValueError, match="turn: expected a power of two"):
        pack_bytes(quantize_weight(weight[:, :80], narrow=True), turn=2)
    assert [best_turn(depth) for depth in (1, 15, 16, 48, 64, 8960, 1 << 20)] == [1, 1, 1, 1, 4, 16, 64]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 300), st.floats(-30, 30), st.integers(0, 99))
def test_quantized_rows_are_within_half_a_step(rows, depth, exponent, seed):
    x = rows_of(rows, depth, seed) * 2.0**exponent
    bytes_, scales, zeros = quantize_rows_reference(x)
    back = (bytes_.double() - zeros[:, None].double()) * scales[:, None].double()
    # Half a step for the number, half for the zero point, and where the two conspire at the upper end.
    assert ((back - x.double()).abs() <= 1.001 * scales[:, None].double() + 1e-37).all()
    assert torch.equal((bytes_.int() == zeros[:, None]) | (x != 0), torch.ones_like(x, dtype=torch.bool))


@needs_native
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("columns", "depth"), SHAPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 6, 7, 11, 13, 25, 193, 400])
def test_a_product_equals_its_reference_bit_for_bit(rows, columns, depth, with_bias, narrow):
    weights = packed(columns, depth, narrow=narrow, with_bias=with_bias)
    x = rows_of(rows, depth)
    assert torch.equal(byte_linear(x, weights), byte_linear_reference(x, weights))


@needs_native
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("depth", [2, 64, 1536])
def test_the_largest_numbers_are_summed_exactly(depth, sign):
    """Every pair at its limit, every byte at 255 or 0: what 16 bits would lose shows here."""
    for weight, narrow in ((64, True), (127, False)):
        values = torch.full((PANEL, depth), sign * weight, dtype=torch.int8)
        values[3, ::2] *= -1
        values[5] = torch.randint(-127, 128, (depth,), dtype=torch.int8)
        if narrow:
            values[5] = 0
            values[6, ::2], values[6, 1::2] = 127 * sign, sign
        assert is_narrow(values) == narrow
        weights = pack_bytes(QuantizedWeight(values, torch.ones(PANEL)))
        for row in (torch.ones(depth), -torch.ones(depth), torch.arange(depth).float() % 2):
            x = row.repeat(7, 1)
            bytes_, scales, zeros = quantize_rows_reference(x)
            exact = (bytes_.long() - zeros.long()[:, None]) @ values.long().T
            y = byte_linear(x, weights)
            assert torch.equal(y, exact.float() * scales[:, None]), (weight, row[:4])


def load_as_narrow(weights: PackedBytes) -> PackedBytes:
    parts = weights.panels, weights.scales, weights.sums, weights.bias, weights.columns, weights.depth
    return load_packed_bytes(*parts, is_narrow=True, is_gated=False, turn=1)


@needs_native
@pytest.mark.parametrize(
    ("pair", "past"),
    [((127, 1), (127, 2)), ((64, 64), (65, 64)), ((-127, -1), (-2, -127)), ((-128, 127), (-128, -1))],
)
@pytest.mark.parametrize("place", [0, 1, -1])
@pytest.mark.parametrize("threads", [1, 3])
def test_weights_that_are_called_narrow_are_looked_at(pair, past, place, threads):
    """One pair at its limit, one past it, anywhere in more weights than a thread looks at in one go."""
    values = torch.randint(-64, 65, (160, 4096), dtype=torch.int8)
    values.view(160, -1, 2)[place, place] = torch.tensor(pair)
    try:
        set_threads(threads)
        assert load_as_narrow(pack_bytes(QuantizedWeight(values, torch.ones(160)))).is_narrow
        values.view(160, -1, 2)[place, place] = torch.tensor(past)
        assert not is_narrow(values)
        with pytest.raises(ValueError, match="is_narrow: expected weights whose pairs keep 128"):
            load_as_narrow(pack_bytes(QuantizedWeight(values, torch.ones(160))))
    finally:
        set_threads(1)


@needs_native
@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (5, 48), (64, 96), (200, 160), (9, 1600)])
def test_finishes(rows, columns, finish):
    weights = packed(columns, 200, narrow=True, is_gated=finish == "silu_mul")
    rng = torch.Generator().manual_seed(rows)
    x = 3 * torch.randn(rows, 200, generator=rng)
    residual = torch.randn(rows, columns, generator=rng) if finish == "add" else None
    y = byte_linear(x, weights, finish, residual)
    torch.testing.assert_close(y, byte_linear_reference(x, weights, finish, residual), rtol=1e-5, atol=2e-6)


@needs_native
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("finish", ["none", "silu_mul"])
def test_a_row_depends_only_on_itself(finish, narrow):
    weights = packed(208, 600, narrow=narrow, is_gated=finish == "silu_mul")
    x = torch.randn(420, 600, generator=torch.Generator().manual_seed(1))
    try:
        for threads in (1, 2):
            set_threads(threads)
            alone = torch.cat([byte_linear(row, weights, finish) for row in x[:40].split(1)])
            for count in [*range(2, 40), 192, 193, 420]:
                y = byte_linear(x[:count], weights, finish)
                assert torch.equal(y[:40], alone[:count]), (threads, count)
            assert torch.equal(byte_linear(x[11:30], weights, finish), alone[11:30])
    finally:
        set_threads(1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 200), st.integers(0, 99), st.floats(0.5, 4))
def test_narrow_weights_are_narrow(columns, depth, seed, tail):
    weight = torch.randn(columns, depth, generator=torch.Generator().manual_seed(seed))
    weight = weight.sign() * weight.abs() ** tail
    narrow, wide = quantize_weight(weight, narrow=True), quantize_weight(weight, narrow=False)
    assert is_narrow(narrow.values)
    for quantized in (narrow, wide):
        error = (quantized.dequantized() - weight).abs()
        assert (error <= 0.5001 * quantized.scales[:, None]).all()
    assert (narrow.scales >= wide.scales).all()
    assert (narrow.scales <= 2.001 * wide.scales * 127 / (NARROW_PAIR - 1)).all()


def test_a_column_of_zeros_and_a_row_of_zeros():
    weight = torch.randn(5, 12)
    weight[2] = 0
    weights = pack_bytes(quantize_weight(weight, narrow=True), torch.arange(5.0))
    y = byte_linear(torch.randn(3, 12), weights)
    assert torch.equal(y[:, 2], torch.full((3,), 2.0))
    assert torch.equal(byte_linear(torch.zeros(2, 12), weights), torch.arange(5.0).repeat(2, 1))


@needs_native
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3.2e38])
@pytest.mark.parametrize("at", [0, 7, 63])
def test_non_finite_rows_become_nan_and_stay_alone(bad, at):
    weights = packed(40, 64, narrow=True)
    x = torch.randn(9, 64)
    clean = byte_linear(x, weights)
    x[4, at] = bad
    y = byte_linear(x, weights)
    assert y[4].isnan().all()
    assert byte_linear_reference(x, weights)[4].isnan().all()
    rest = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(y[rest], clean[rest])


def test_packing_can_be_undone():
    for columns, depth, is_gated in ((33, 17, False), (48, 20, True)):
        weight = quantize_weight(torch.randn(columns, depth), narrow=False)
        back = pack_bytes(weight, is_gated=is_gated).unpacked()
        order = gated_order(columns) if is_gated else torch.arange(columns)
        assert torch.equal(back.values, weight.values[order])
        assert torch.equal(back.scales, weight.scales[order])


@needs_native
def test_norms_before_the_product():
    from vila2.ops.norms import add_rms_norm, layer_norm

    weights = packed(48, 100, narrow=True)
    assert weights.native is not None
    x, residual, scale, shift = torch.randn(37, 100), torch.randn(37, 100), torch.rand(100), torch.randn(100)
    normed, summed = add_rms_norm(x, residual.clone(), scale, 1e-5)
    y = torch.empty(37, 48)
    weights.native.multiply_rms_norm(x, residual, scale, 1e-5, y, "none")
    assert torch.equal(residual, summed)
    assert torch.equal(y, byte_linear(normed, weights))
    weights.native.multiply_layer_norm(x, scale, shift, 1e-5, y, "quick_gelu")
    assert torch.equal(y, byte_linear(layer_norm(x, scale, shift, 1e-5), weights, "quick_gelu"))


@needs_native
def test_wrong_calls_are_refused():
    weights = packed(24, 8, narrow=True)
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="depth of the weights"):
        byte_linear(torch.zeros(2, 9), weights)
    with pytest.raises(ValueError, match="gradient"):
        byte_linear(torch.zeros(2, 8, requires_grad=True), weights)
    with pytest.raises(ValueError, match="finish: expected none, add"):
        byte_linear(x, weights, "relu")
    with pytest.raises(ValueError, match="packed gated"):
        byte_linear(x, weights, "silu_mul")
    with pytest.raises(ValueError, match="residual"):
        byte_linear(x, weights, "add", torch.zeros(2, 23))
    with pytest.raises(ValueError, match="residual"):
        byte_linear(x, weights, "none", torch.zeros(2, 24))
    with pytest.raises(ValueError, match="panels of 16"):
        packed(24, 8, narrow=True, is_gated=True)
    assert native is not None
    parts = weights.panels, weights.scales, weights.sums, None, 24, 8, True
    with pytest.raises(ValueError, match=r"panels: expected shape \(3, 2, 16, 4\)"):
        native.ByteWeights(*parts[:4], 40, 8, True)
    with pytest.raises(ValueError, match="sums: expected int32"):
        native.ByteWeights(parts[0], parts[1], parts[1], *parts[3:])
    with pytest.raises(ValueError, match="at most 65536"):
        native.ByteWeights(*parts[:5], 65537, True)
