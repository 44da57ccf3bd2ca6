"""The best columns of a product without the product: the product's own, of every kind of weights, ties included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vila2.ops.linear import Linear, pack
from vila2.ops.native import native
from vila2.ops.quant import pack_bytes, quantize_weight
from vila2.ops.threads import set_threads
from vila2.ops.top import KERNEL_TOP, finds_top, linear_top, top_reference

pytestmark = pytest.mark.skipif(native is None, reason="vila2._C is not built")

KINDS = ["float32", "bfloat16", "int8", "int8 wide"]
NONE = torch.empty(0, dtype=torch.int64)


def head(columns: int, depth: int, kind: str, seed: int = 0, bias: bool = False) -> Linear:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(columns, depth, generator=rng)
    linear = Linear(depth, columns, bias=bias)
    shift = torch.randn(columns, generator=rng) if bias else None
    if kind.startswith("int8"):
        linear.set_packed(pack_bytes(quantize_weight(weight, narrow=kind == "int8"), shift))
    else:
        linear.set_packed(pack(weight, shift, getattr(torch, kind)))
    return linear


def check(linear: Linear, x: torch.Tensor, count: int, banned: torch.Tensor, is_banned: torch.Tensor) -> None:
    values, columns = linear_top(x, linear, count, banned, is_banned)
    expected, places = top_reference(linear(x), count, banned, is_banned)
    assert torch.equal(values, expected)
    assert torch.equal(columns, places)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 15, 16, 33, 1000, 5003])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 16, 64, 65, 130])
def test_the_products_best(rows, columns, kind):
    linear = head(columns, 48, kind, seed=rows)
    x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(columns))
    is_banned = (torch.arange(rows) % 2).to(torch.uint8)
    banned = torch.arange(0, columns, 3)[:40]
    for count in {1, min(5, columns), min(KERNEL_TOP, columns)}:
        check(linear, x, count, banned, is_banned)
        check(linear, x, count, NONE, is_banned)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 600), st.integers(1, 300), st.integers(1, 128), st.sampled_from(KINDS)
)
def test_any_shape_and_any_number_of_threads(rows, columns, depth, count, kind):
    linear = head(columns, depth, kind, seed=columns, bias=depth % 2 == 0)
    x = torch.randn(rows, depth, generator=torch.Generator().manual_seed(rows))
    is_banned = torch.randint(0, 2, (rows,), generator=torch.Generator().manual_seed(depth)).to(torch.uint8)
    try:
        set_threads(1 + rows % 3)
        check(linear, x, min(count, columns), torch.arange(columns // 2, columns // 2 + 3), is_banned)
    finally:
        set_threads(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_of_equal_columns_the_lowest_comes_first(rows, kind):
    """Whole numbers from -2 to 2: hundreds of equal scores, in every tile and on both sides of its borders."""
    weight = torch.randint(-1, 2, (3001, 4), generator=torch.Generator().manual_seed(0)).float()
    linear = Linear(4, 3001, bias=False)
    if kind.startswith("int8"):
        linear.set_packed(pack_bytes(quantize_weight(weight, narrow=kind == "int8")))
    else:
        linear.set_packed(pack(weight, None, getattr(torch, kind)))
    x = torch.randint(0, 2, (rows, 4), generator=torch.Generator().manual_seed(rows)).float()
    none = torch.zeros(rows, dtype=torch.uint8)
    for threads in (1, 2):
        try:
            set_threads(threads)
            for count in (1, 2, 50, 128):
                check(linear, x, count, NONE, none)
        finally:
            set_threads(1)


def test_what_is_not_a_number_is_never_among_the_best_unless_nothing_else_is_left():
    weight = torch.eye(40)
    linear = Linear(40, 40, bias=False)
    linear.set_packed(pack(weight, None, torch.float32))
    x = torch.arange(40.0)[None].repeat(3, 1)
    x[1] = torch.nan
    x[2, :39] = -torch.inf
    banned = torch.tensor([39])
    for count in (1, 4, 40):
        check(linear, x, count, banned, torch.tensor([1, 0, 1], dtype=torch.uint8))


def test_weights_that_are_not_packed_take_the_reference():
    linear = Linear(8, 30, bias=False)
    assert not finds_top(linear)
    x = torch.randn(3, 8)
    with torch.no_grad():
        values, columns = linear_top(x, linear, 2, NONE, torch.zeros(3, dtype=torch.uint8))
        assert torch.equal(values, linear(x).topk(2).values)
        assert torch.equal(columns, linear(x).topk(2).indices)


@pytest.mark.parametrize("count", [0, 31, KERNEL_TOP + 1])
def test_a_wrong_count_is_refused(count):
    none = torch.zeros(2, dtype=torch.uint8)
    for kind, columns in (("float32", 30), ("int8", 30), ("bfloat16", 300)):
        if count == 31 and columns == 300:
            continue
        with pytest.raises(ValueError, match="values"):
            linear_top(torch.zeros(2, 8), head(columns, 8, kind), count, NONE, none)


def test_wrong_types_are_refused():
    linear, x, none = head(30, 8, "float32"), torch.zeros(2, 8), torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="banned"):
        linear_top(x, linear, 1, torch.zeros(1), none)
    with pytest.raises(ValueError, match="is_banned"):
        linear_top(x, linear, 1, NONE, none[:1])
    with pytest.raises(ValueError, match="x"):
        linear_top(x[:, :7], linear, 1, NONE, none)
