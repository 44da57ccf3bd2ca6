"""Intervals and tests over scenes: against closed forms, exhaustive permutations and scipy's known values."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vila2.evaluate.bootstrap import intervals, mcnemar_p, paired_intervals, permutation_p, ratios


def column(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float64)[:, None]


def test_ratios_have_no_value_over_nothing() -> None:
    assert np.isnan(ratios(np.array([1.0]), np.array([0.0])))[0]
    assert ratios(np.array([1.0]), np.array([4.0]))[0] == 0.25


def test_interval_of_a_share_is_the_binomial_one() -> None:
    rng = np.random.default_rng(1)
    right = (rng.random(400) < 0.7).astype(float)
    low, high = intervals(right[:, None], np.ones((400, 1)), seed=0)[0]
    half = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 400)
    assert low == pytest.approx(right.mean() - half, abs=0.01)
    assert high == pytest.approx(right.mean() + half, abs=0.01)


def test_questions_of_a_scene_go_together() -> None:
    # 50 scenes of 20 questions, all right or all wrong: the interval is that of 50, not of 1000.
    right = np.repeat([1.0, 0.0], 25)[:, None] * 20
    low, high = intervals(right, np.full((50, 1), 20.0), seed=0)[0]
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 50), abs=0.05)


def test_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        right = (rng.random(100) < 0.6).astype(float)[:, None]
        low, high = intervals(right, np.ones((100, 1)), seed=trial, resamples=300)[0]
        covered += low <= 0.6 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_same_seed_same_interval_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    values, ones = np.random.default_rng(0).random((30, 2)), np.ones((30, 2))
    whole = intervals(values, ones, seed=3)
    assert (whole == intervals(values, ones, seed=3)).all()
    assert (whole != intervals(values, ones, seed=4)).any()
    monkeypatch.setattr("vila2.evaluate.bootstrap._MAX_CELLS", 30 * 7)
    assert np.allclose(whole, intervals(values, ones, seed=3))


def test_all_right_is_no_certainty() -> None:
    # Clopper-Pearson for 10 of 10: (0.025)^(1/10) = 0.6915.
    ones = np.ones((10, 1))
    assert intervals(ones, ones, seed=0)[0] == pytest.approx([0.6915, 1.0], abs=1e-4)
    assert intervals(ones * 0, ones, seed=0)[0] == pytest.approx([0.0, 0.3085], abs=1e-4)
    half_empty = column([1.0] * 5 + [0.0] * 5)  # five scenes have nothing to get right
    assert intervals(half_empty, half_empty, seed=0)[0] == pytest.approx([0.025**0.2, 1.0])
    assert (intervals(ones, ones, seed=0, are_shares=[False])[0] == [1.0, 1.0]).all()


def test_nothing_to_divide_by_has_no_interval() -> None:
    assert np.isnan(intervals(np.zeros((5, 1)), np.zeros((5, 1)), seed=0)).all()


def test_pairing_removes_what_scenes_have_in_common() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(200)  # each scene has its own difficulty, far larger than the difference
    a, b, ones = hard[:, None], hard[:, None] + 0.01, np.ones((200, 1))
    low, high = paired_intervals((a, ones), (b, ones), seed=0)[0]
    assert 0.0099 < low <= high < 0.0101
    assert permutation_p((a, ones), (b, ones), seed=0)[0] == pytest.approx(1 / 2001)
    assert permutation_p((a, ones), (a, ones), seed=0)[0] == 1.0


def test_permutation_p_is_that_of_all_swaps() -> None:
    a, b = [1, 0, 0, 1, 0, 0, 1, 0], [1, 1, 1, 1, 0, 1, 1, 0]
    observed = abs(sum(b) - sum(a))
    swaps = [
        abs(sum(y - x if keep else x - y for x, y, keep in zip(a, b, kept, strict=True)))
        for kept in itertools.product((True, False), repeat=len(a))
    ]
    exact = np.mean([swap >= observed for swap in swaps])
    ones = np.ones((8, 1))
    p = permutation_p((column(a), ones), (column(b), ones), seed=0, resamples=20000)[0]
    assert p == pytest.approx(exact, abs=0.01)
    assert p == pytest.approx(mcnemar_p(0, 3), abs=0.01)


def test_permutation_p_is_uniform_when_there_is_no_difference() -> None:
    rng = np.random.default_rng(5)
    ones = np.ones((40, 1))
    values = [
        permutation_p((rng.random((40, 1)), ones), (rng.random((40, 1)), ones), seed=i, resamples=200)[0]
        for i in range(200)
    ]
    assert 0.01 <= np.mean(np.array(values) <= 0.05) <= 0.10


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (1, 9, 0.021484375), (9, 1, 0.021484375)],
)
def test_mcnemar_by_hand(only_a: int, only_b: int, p: float) -> None:
    assert mcnemar_p(only_a, only_b) == pytest.approx(p)


def test_mcnemar_of_large_counts_is_finite() -> None:
    assert mcnemar_p(5000, 5000) == pytest.approx(1.0)
    assert 0 <= mcnemar_p(100, 100_000) < 1e-300 or mcnemar_p(100, 100_000) == 0.0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=2, max_size=12))
def test_interval_holds_the_figure_within_the_scenes_own(scenes: list[tuple[int, int]]) -> None:
    numerators, denominators = (column([scene[i] for scene in scenes]) for i in (0, 1))
    low, high = intervals(numerators, denominators, seed=0, resamples=200, are_shares=[False])[0]
    each = (numerators / denominators)[:, 0]
    assert min(each) - 1e-9 <= low <= high <= max(each) + 1e-9
