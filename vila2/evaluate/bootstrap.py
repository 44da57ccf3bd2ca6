"""Intervals and paired tests over scenes, for figures that are ratios of sums.

Every figure of the evaluation is sum(numerator) / sum(denominator) over scenes: an accuracy, a precision, an F1
(2 hits / (named + present)), a rate. So a resample is a vector of how often each scene was drawn, and a thousand of
them are one matrix product. Questions of one scene are drawn together, because their errors go together.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 2000
_MAX_CELLS = 2**22  # of a block of resamples: 32 MB


def ratios(numerators: Floats, denominators: Floats) -> Floats:
    """Elementwise, NaN where there is nothing to divide by."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(denominators != 0, numerators / denominators, np.nan)


def intervals(
    numerators: Floats,
    denominators: Floats,
    seed: int,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    are_shares: Sequence[bool] | None = None,
) -> Floats:
    """Percentile intervals (metrics, 2) of the ratios of column sums of two arrays (scenes, metrics).

    Deterministic in the seed. NaN for a metric whose denominator is 0 in every resample. Where every scene that has
    something is all wrong (0) or all right (1), resamples cannot differ; the other end of a share (`are_shares`, all
    unless given) is then the exact binomial one that takes a scene for a single trial, the least that can be said.
    """
    samples = [
        ratios(drawn @ numerators, drawn @ denominators) for drawn in _draws(len(numerators), seed, resamples)
    ]
    bounds = _percentiles(samples, level, numerators.shape[1])
    for metric, (low, high) in enumerate(bounds):
        if low == high and low in (0.0, 1.0) and (are_shares is None or are_shares[metric]):
            reach = ((1 - level) / 2) ** (1 / np.count_nonzero(denominators[:, metric]))
            bounds[metric] = (0.0, 1 - reach) if low == 0 else (reach, 1.0)
    return bounds


def paired_intervals(
    a: tuple[Floats, Floats],
    b: tuple[Floats, Floats],
    seed: int,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Floats:
    """Intervals (metrics, 2) of ratio(b) - ratio(a), each resample drawing the same scenes for both.

    `a` and `b` are (numerators, denominators), each (scenes, metrics), rows in the same order of scenes.
    """
    samples = [
        ratios(drawn @ b[0], drawn @ b[1]) - ratios(drawn @ a[0], drawn @ a[1])
        for drawn in _draws(len(a[0]), seed, resamples)
    ]
    return _percentiles(samples, level, a[0].shape[1])


def permutation_p(
    a: tuple[Floats, Floats], b: tuple[Floats, Floats], seed: int, resamples: int = RESAMPLES
) -> Floats:
    """Two-sided p-value (metrics,) of "which model answered a scene makes no difference".

    Swaps the two models' rows scene by scene at random and counts how often the difference is at least as large
    as the one observed, which counts as one of the permutations: the smallest p is 1 / (resamples + 1).
    """
    observed = np.abs(_difference(a[0].sum(0), a[1].sum(0), b[0].sum(0), b[1].sum(0)))
    as_large = np.ones(a[0].shape[1])
    for swapped in _swaps(len(a[0]), seed, resamples):
        moved = [swapped @ (y - x) for x, y in zip(a, b, strict=True)]
        difference = _difference(
            a[0].sum(0) + moved[0], a[1].sum(0) + moved[1], b[0].sum(0) - moved[0], b[1].sum(0) - moved[1]
        )
        as_large += (np.abs(difference) >= observed - 1e-12).sum(0)
    return np.where(np.isnan(observed), np.nan, as_large / (resamples + 1))


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar test: of the questions that only one model got right, how surprising is the split?"""
    n, k = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    # log C(n, i) by cumulated ratios, so that no factorial overflows.
    i = np.arange(k + 1, dtype=np.float64)
    logs = np.concatenate(([0.0], np.cumsum(np.log(n - i[:-1]) - np.log(i[1:]))))
    tail = float(np.exp(logs - n * np.log(2.0)).sum())
    return min(1.0, 2 * tail)


def _difference(
    numerator_a: Floats, denominator_a: Floats, numerator_b: Floats, denominator_b: Floats
) -> Floats:
    return ratios(numerator_b, denominator_b) - ratios(numerator_a, denominator_a)


def _draws(num_scenes: int, seed: int, resamples: int) -> Iterator[Floats]:
    """Blocks (resamples of the block, scenes): how often each scene is drawn."""
    rng = np.random.default_rng(seed)
    shares = np.full(num_scenes, 1 / num_scenes)
    for size in _blocks(num_scenes, resamples):
        yield rng.multinomial(num_scenes, shares, size=size).astype(np.float64)


def _swaps(num_scenes: int, seed: int, resamples: int) -> Iterator[Floats]:
    rng = np.random.default_rng(seed)
    for size in _blocks(num_scenes, resamples):
        yield rng.integers(0, 2, size=(size, num_scenes)).astype(np.float64)


def _blocks(num_scenes: int, resamples: int) -> Iterator[int]:
    block = max(1, _MAX_CELLS // max(num_scenes, 1))
    for start in range(0, resamples, block):
        yield min(block, resamples - start)


def _percentiles(samples: list[Floats], level: float, num_metrics: int) -> Floats:
    values = np.concatenate(samples)
    bounds = np.full((num_metrics, 2), np.nan)
    for metric in range(num_metrics):
        finite = values[np.isfinite(values[:, metric]), metric]
        if len(finite):
            bounds[metric] = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return bounds
