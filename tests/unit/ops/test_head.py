"""Scores of a head in bytes: the best are those of unrounded rows, whichever way they are found."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vila2.ops import head as head_module
from vila2.ops.head import MOST_TOP, NUM_REFINED, head_scores, head_top, refined, refined_reference
from vila2.ops.linear import Linear
from vila2.ops.quant import best_turn, pack_bytes, quantize_weight, turn_rows
from vila2.ops.top import linear_top, top_reference

NONE = torch.empty(0, dtype=torch.int64)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head(weight: torch.Tensor, *, narrow: bool = True, bias: bool = False, turn: int = 1) -> Linear:
    columns, depth = weight.shape
    linear = Linear(depth, columns, bias=False)
    packed = quantize_weight(turn_rows(weight, turn) / turn, narrow=narrow)
    linear.set_packed(pack_bytes(packed, random(columns, seed=5) if bias else None, turn=turn))
    return linear


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(1, 400), st.integers(1, 300), st.booleans(), st.booleans())
def test_some_refined_columns_are_those_of_the_reference(rows, columns, depth, narrow, bias):
    linear = head(random(columns, depth), narrow=narrow, bias=bias, turn=best_turn(depth))
    x = random(rows, depth, seed=1)
    wanted = torch.randint(0, columns, (rows, 5), generator=torch.Generator().manual_seed(depth))
    expected = refined_reference(x, linear.packed).gather(1, wanted)
    assert torch.equal(refined(x, linear.packed, wanted), expected)
    for row in range(0, rows, 7):  # the same alone
        assert torch.equal(refined(x[row : row + 1], linear.packed, wanted[row : row + 1])[0], expected[row])


def test_refined_scores_are_those_of_the_weights_that_were_packed():
    linear = head(random(300, 96))
    x = random(50, 96, seed=1)
    exact = x.double() @ linear.packed.unpacked().dequantized().double().T
    error = (refined_reference(x, linear.packed) - exact).abs().max()
    assert error < 3e-6 * exact.abs().max()
    assert (linear(x) - exact).abs().max() > 1000 * error


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(1, 500),
    st.integers(1, 100),
    st.integers(1, MOST_TOP),
    st.integers(0, 12),
    st.booleans(),
)
def test_the_best_are_those_of_all_scores(rows, columns, depth, count, num_banned, narrow):
    """12 banned columns and MOST_TOP wanted ones are more than the kernel keeps."""
    linear = head(random(columns, depth), narrow=narrow, bias=depth % 2 == 0)
    x = random(rows, depth, seed=columns)
    is_banned = (torch.arange(rows) % 3 > 0).to(torch.uint8)
    count = min(count, columns)
    scores = head_scores(x, linear)
    # Among them the best ones, which are often refined.
    banned = torch.cat((scores[:1].flatten().sort(descending=True).indices, torch.arange(columns)))
    banned = torch.unique(banned[:num_banned] if rows else banned[:0])
    values, places = head_top(x, linear, count, banned, is_banned)
    expected, expected_places = top_reference(scores, count, banned, is_banned)
    assert torch.equal(values, expected)
    assert torch.equal(places, expected_places)


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_of_equal_scores_the_lowest_columns_are_refined(rows):
    """Whole numbers from -1 to 1: hundreds of equal scores on both sides of the last that is refined."""
    rng = torch.Generator().manual_seed(rows)
    linear = head(torch.randint(-1, 2, (3001, 4), generator=rng).float())
    x = torch.randint(0, 2, (rows, 4), generator=rng).float()
    none = torch.zeros(rows, dtype=torch.uint8)
    scores = head_scores(x, linear)
    for count in (1, 2, 50):
        values, columns = head_top(x, linear, count, NONE, none)
        expected, places = top_reference(scores, count, NONE, none)
        assert torch.equal(values, expected)
        assert torch.equal(columns, places)


def test_scores_beyond_the_best_are_the_products():
    linear, x = head(random(200, 64)), random(9, 64, seed=1)
    product, scores = linear(x), head_scores(x, linear)
    changed = (product != scores).sum(-1)
    assert changed.min() > 0
    assert changed.max() <= NUM_REFINED
    best = product.topk(NUM_REFINED).indices
    assert torch.equal(scores.gather(1, best), refined_reference(x, linear.packed).gather(1, best))


def test_refinement_decides_near_ties_as_float32_does():
    """Two columns that differ by less than a row's rounding: bytes guess, refined scores know."""
    weight = random(64, 128)
    weight[33] = weight[7]
    linear = head(weight)
    x = random(400, 128, seed=1)
    # Nothing but the last bits of a row tells the two apart.
    values = linear.packed.panels.clone()
    values[33 // 16, 0, 33 % 16, 0] += 1
    linear.packed.panels.copy_(values)
    linear.packed.sums[33] += 1
    exact = x.double() @ linear.packed.unpacked().dequantized().double().T
    pair = exact[:, [7, 33]].argmax(-1)
    both = head_scores(x, linear)[:, [7, 33]]
    is_best = (head_scores(x, linear).topk(NUM_REFINED - 2).indices == 7).any(-1)
    assert is_best.sum() > 20
    assert torch.equal(both.argmax(-1)[is_best], pair[is_best])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_have_no_best_score(bad):
    linear, x = head(random(200, 64)), random(3, 64, seed=1)
    x[1, 5] = bad
    values, columns = head_top(x, linear, 4, NONE, torch.zeros(3, dtype=torch.uint8))
    assert (values[1] == -torch.inf).all()
    assert columns[1].tolist() == [0, 1, 2, 3]
    assert values[0].isfinite().all()
    assert head_scores(x, linear)[1].isnan().all()


def test_rows_of_zeros_and_heads_smaller_than_what_is_refined():
    linear = head(random(3, 8), bias=True)
    x = torch.zeros(2, 8)
    assert torch.equal(head_scores(x, linear), linear.packed.bias[:3].expand(2, 3))
    values, _ = head_top(x, linear, 3, torch.tensor([0, 1, 2]), torch.tensor([1, 0], dtype=torch.uint8))
    assert (values[0] == -torch.inf).all()


def test_a_head_without_kernels_takes_the_reference(monkeypatch):
    linear, x = head(random(100, 32)), random(6, 32, seed=1)
    none = torch.zeros(6, dtype=torch.uint8)
    expected = head_top(x, linear, 3, NONE, none)
    monkeypatch.setattr(head_module, "finds_top", lambda _: False)
    values, columns = head_top(x, linear, 3, NONE, none)
    assert torch.equal(values, expected[0])
    assert torch.equal(columns, expected[1])


def test_a_head_that_is_not_in_bytes_is_left_alone():
    linear = Linear(16, 40, bias=False)
    x, none = random(3, 16), torch.zeros(3, dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(head_scores(x, linear), linear(x))
        assert torch.equal(head_top(x, linear, 2, NONE, none)[0], linear_top(x, linear, 2, NONE, none)[0])


@pytest.mark.parametrize("count", [0, MOST_TOP + 1, 31])
def test_a_wrong_count_is_refused(count):
    linear = head(random(30 if count == 31 else 300, 8))
    with pytest.raises(ValueError, match="columns"):
        head_top(random(2, 8), linear, count, NONE, torch.zeros(2, dtype=torch.uint8))
