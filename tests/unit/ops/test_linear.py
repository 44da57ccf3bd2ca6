"""Packed linears against torch, and their rows against themselves in any company."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vila2.ops.linear import Linear, linear, linear_reference, pack, pack_linears, packed_parts, rounds_rows
from vila2.ops.native import native
from vila2.ops.threads import set_threads

pytestmark = pytest.mark.skipif(native is None, reason="vila2._C is not built")

STORAGE = [torch.float32, torch.bfloat16]


def weights(columns: int, depth: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(columns, depth, generator=rng) / depth**0.5, torch.randn(columns, generator=rng)


def reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, storage: torch.dtype
) -> torch.Tensor:
    """In float64, of what the product takes: weights as stored, rows rounded where weights of bfloat16 want that."""
    if storage == torch.bfloat16 and rounds_rows():
        x = x.bfloat16()
    wide = linear_reference(x.double(), weight.to(storage).double(), None if bias is None else bias.double())
    return wide.float()


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("columns", "depth"), [(1, 1), (15, 3), (16, 256), (33, 257), (128, 576), (200, 1000)]
)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 25, 193, 400])
def test_linear_equals_its_reference(rows, columns, depth, with_bias, storage):
    weight, bias = weights(columns, depth)
    x = torch.randn(rows, depth, generator=torch.Generator().manual_seed(rows))
    expected = reference(x, weight, bias if with_bias else None, storage)
    y = linear(x, pack(weight, bias if with_bias else None, storage))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("columns", [7, 16, 100, 130, 256])
def test_a_row_depends_only_on_itself(columns, storage):
    """Bit for bit, for every number of rows up to several tiles, at any place, with one thread and with two."""
    packed = pack(*weights(columns, 600), storage)
    x = torch.randn(420, 600, generator=torch.Generator().manual_seed(1))
    try:
        for threads in (1, 2):
            set_threads(threads)
            alone = torch.cat([linear(row, packed) for row in x[:40].split(1)])
            for count in [*range(2, 40), 192, 193, 420]:
                y = linear(x[:count], packed)
                assert torch.equal(y[:40], alone[:count]), (threads, count)
            assert torch.equal(linear(x[11:30], packed), alone[11:30])
    finally:
        set_threads(1)


@pytest.mark.parametrize("depth", [5000, 50001])
@pytest.mark.parametrize("rows", [1, 2, 3, 12, 13, 200])
def test_depths_of_many_blocks(rows, depth):
    """What a kernel holds of a row at once ends here and there; the number of rows must not decide what comes out."""
    packed = pack(*weights(70, depth), torch.bfloat16)
    x = torch.randn(rows, depth, generator=torch.Generator().manual_seed(rows))
    y = linear(x, packed)
    torch.testing.assert_close(y, reference(x, *weights(70, depth), torch.bfloat16), rtol=1e-3, atol=1e-4)
    assert torch.equal(linear(x[-1:], packed), y[-1:])


@pytest.mark.skipif(not rounds_rows(), reason="bfloat16 lies in pairs on AVX512-BF16 alone")
def test_pairs_of_bfloat16_lie_side_by_side():
    weight = torch.arange(33 * 3).view(33, 3).float()
    panels, _ = packed_parts(pack(weight, None, torch.bfloat16))
    pairs = panels.view(torch.bfloat16).view(2, 2, 32, 2).float()  # (panel, depth / 2, column, pair)
    whole = pairs.permute(0, 2, 1, 3).reshape(64, 4)
    assert torch.equal(whole[:33, :3], weight)
    assert not whole[33:].any()
    assert not whole[:, 3].any()


@pytest.mark.skipif(not rounds_rows(), reason="bfloat16 counts denormals as zero on AVX512-BF16 alone")
def test_what_is_no_normal_number_counts_as_zero():
    packed = pack(torch.full((5, 2), 1e-39), None, torch.bfloat16)
    assert not linear(torch.full((3, 2), 1e30), packed).any()
    packed = pack(torch.full((5, 2), 1e-20), torch.full((5,), 1e-40), torch.bfloat16)
    assert not linear(torch.full((3, 2), 1e-20), packed).any()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 700), st.sampled_from(STORAGE))
def test_any_shape(rows, columns, depth, storage):
    weight, bias = weights(columns, depth, seed=rows)
    x = torch.randn(rows, depth, generator=torch.Generator().manual_seed(depth))
    y = linear(x, pack(weight, bias, storage))
    expected = reference(x, weight, bias, storage)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=2e-5)


def test_leading_axes_layout_and_type_of_the_input():
    weight, bias = weights(24, 32)
    packed = pack(weight, bias, torch.float32)
    x = torch.randn(32, 3, 5).permute(1, 2, 0)
    torch.testing.assert_close(linear(x, packed), linear_reference(x, weight, bias), rtol=1e-4, atol=1e-5)
    narrow = linear(x.bfloat16(), packed)
    assert narrow.dtype == torch.bfloat16
    expected = linear_reference(x.bfloat16().float(), weight, bias).bfloat16()
    torch.testing.assert_close(narrow, expected, rtol=1e-2, atol=1e-2)


def test_non_finite_inputs_stay_in_their_rows():
    packed = pack(*weights(40, 64), torch.bfloat16)
    x = torch.randn(9, 64)
    clean = linear(x, packed)
    x[4, 7] = torch.nan
    y = linear(x, packed)
    assert y[4].isnan().all()
    assert torch.equal(y[[0, 1, 2, 3, 5, 6, 7, 8]], clean[[0, 1, 2, 3, 5, 6, 7, 8]])


def test_pack_linears_frees_weights_and_keeps_tied_ones():
    torch.manual_seed(0)
    embedding = nn.Embedding(50, 16)
    head = Linear(16, 50, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(Linear(16, 16), nn.Linear(16, 16), head)
    x = torch.randn(3, 16)
    expected = model(x)
    assert pack_linears(model, torch.float32) is model
    assert pack_linears(model, torch.float32) is model  # what is packed stays so
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == ["1.weight", "1.bias"]
    assert embedding.weight.shape == (50, 16)


def test_unpacked_linear_is_torchs():
    layer = Linear(8, 4)
    x = torch.randn(2, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None


def test_wrong_calls_are_refused():
    weight, bias = weights(8, 4)
    packed = pack(weight, bias, torch.float32)
    with pytest.raises(ValueError, match="depth of the weights"):
        linear(torch.zeros(2, 5), packed)
    with pytest.raises(ValueError, match="gradient"):
        linear(torch.zeros(2, 4, requires_grad=True), packed)
    with pytest.raises(ValueError, match="float16"):
        pack(weight, bias, torch.float16)
    with pytest.raises(ValueError, match="float16"):
        pack_linears(Linear(4, 8), torch.float16)
    with pytest.raises(ValueError, match="bias"):
        pack(weight, bias[:7], torch.float32)
    with pytest.raises(ValueError, match="dimensions"):
        pack(weight[0], bias, torch.float32)
    assert native is not None
    with pytest.raises(ValueError, match="y: expected a contiguous tensor"):
        packed.multiply(torch.zeros(2, 4), torch.zeros(8, 2).t())
    with pytest.raises(ValueError, match="x: expected a torch tensor"):
        packed.multiply([1.0], torch.zeros(8, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x: expected a tensor on the CPU"):
        packed.multiply(torch.zeros(2, 4, device="meta"), torch.zeros(2, 8))
