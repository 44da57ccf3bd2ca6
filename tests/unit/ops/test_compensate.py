"""Compensated rounding: nearer to what real inputs give than the nearest steps are, and within the same bounds."""

import pytest
import torch
from torch import Tensor

from vila2.ops.compensate import compensated_weight
from vila2.ops.quant import MOST, is_narrow, quantize_weight


def inputs_of(rows: int, depth: int, seed: int = 0) -> Tensor:
    """Rows that vary much in a few directions, as a model's do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(depth, depth, generator=generator) * torch.logspace(0, -2, depth)[:, None]
    return torch.randn(rows, depth, generator=generator) @ mixing


def error(weight: Tensor, rounded: Tensor, x: Tensor) -> float:
    return float((x @ (weight - rounded).T).square().mean())


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize(("columns", "depth"), [(40, 96), (7, 65), (2100, 64), (1, 1), (3, 2)])
def test_outputs_are_nearer_than_by_nearest_steps(columns, depth, narrow):
    weight = torch.randn(columns, depth, generator=torch.Generator().manual_seed(1))
    x, fresh = inputs_of(500, depth), inputs_of(500, depth, seed=0)[::2]
    nearest = quantize_weight(weight, narrow=narrow)
    mended = compensated_weight(weight, x.T @ x, narrow=narrow)
    assert torch.equal(mended.scales, nearest.scales)
    assert mended.values.dtype == torch.int8
    assert mended.values.abs().max() <= MOST
    assert not narrow or is_narrow(mended.values)
    share = 0.5 if depth > 60 else 1.0
    assert error(weight, mended.dequantized(), fresh) <= share * error(weight, nearest.dequantized(), fresh)


@pytest.mark.parametrize("narrow", [True, False])
def test_inputs_that_are_all_alike_want_the_nearest_steps(narrow):
    weight = torch.randn(20, 33)
    mended = compensated_weight(weight, 7 * torch.eye(33), narrow=narrow)
    assert torch.equal(mended.values, quantize_weight(weight, narrow=narrow).values)


def test_the_unit_of_the_moments_does_not_matter():
    weight, x = torch.randn(20, 48), inputs_of(200, 48)
    expected = compensated_weight(weight, x.T @ x, narrow=True).values
    assert torch.equal(compensated_weight(weight, 64 * (x.T @ x), narrow=True).values, expected)


def test_columns_of_zeros_and_inputs_that_never_come():
    weight = torch.randn(5, 40)
    weight[2] = 0
    mended = compensated_weight(weight, torch.zeros(40, 40), narrow=True)
    assert torch.equal(mended.values, quantize_weight(weight, narrow=True).values)
    assert not mended.values[2].any()
    one = torch.zeros(40, 40)
    one[3, 3] = 1e20
    assert compensated_weight(weight, one, narrow=True).dequantized().isfinite().all()


def test_moments_that_are_not_finite_are_refused():
    moments = torch.eye(8)
    moments[1, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        compensated_weight(torch.randn(4, 8), moments, narrow=False)
