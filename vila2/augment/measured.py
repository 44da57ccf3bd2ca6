"""Two measured models side by side: by their answers where both have them, else by their intervals."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vila2.errors import UsageError
from vila2.evaluate.comparison import compare
from vila2.evaluate.evaluation import Estimate, Evaluation, load_evaluation

_Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True, slots=True)
class Gain:
    """What a metric gained, counted so that more is better, with its 95 % interval (None where it has none)."""

    metric: str
    before: float
    after: float
    value: float
    low: float | None
    high: float | None

    @property
    def is_gain(self) -> bool:
        """Beyond its interval; a figure without one counts as it stands."""
        return self.value > 0 if self.low is None else self.low > 0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "is_gain": self.is_gain}


def read_measured(path: Path) -> Evaluation:
    """An evaluation: what `vila2-fast evaluate --out` wrote, or the results of lmms-eval. UsageError if neither."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: the evaluation left no result there: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"{path}: not JSON") from None
    if isinstance(values, dict) and isinstance(values.get("results"), dict):
        return _from_lmms(values["results"], path)
    return load_evaluation(path)


def gains(before: Evaluation, after: Evaluation, metrics: tuple[str, ...]) -> list[Gain]:
    """The gain of each metric. UsageError names one that was not measured."""
    known = [name for name in before.metrics if name in after.metrics]
    for name in metrics:
        if name not in known:
            raise UsageError(f"no metric {name!r} was measured; there are {', '.join(known)}")
    paired = compare(before, after).metrics if before.records and after.records else {}
    found = []
    for name in metrics:
        a, b = before.metrics[name], after.metrics[name]
        sign = -1.0 if a.better == "lower" else 1.0
        low, high = _independent(a, b)
        if name in paired:
            low, high = paired[name].low, paired[name].high
        if low is not None and high is not None and sign < 0:
            low, high = -high, -low
        found.append(Gain(name, a.value, b.value, sign * (b.value - a.value), low, high))
    return found


def _independent(a: Estimate, b: Estimate) -> tuple[float | None, float | None]:
    """The interval of b - a by the widths of both, as if their errors had nothing in common."""
    if None in (a.low, a.high, b.low, b.high):
        return None, None
    half = math.hypot((a.high or 0) - (a.low or 0), (b.high or 0) - (b.low or 0)) / 2
    return b.value - a.value - half, b.value - a.value + half


def _from_lmms(results: dict[str, Any], path: Path) -> Evaluation:
    """`{"results": {task: {"metric,filter": value, "metric_stderr,filter": error}}}`, as lmms-eval writes it."""
    metrics: dict[str, Estimate] = {}
    for task, figures in results.items():
        if not isinstance(figures, dict):
            continue
        for name, value in figures.items():
            metric, _, kind = str(name).partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            reach = _Z * error if isinstance(error, int | float) else None
            metrics[f"{task}.{metric}"] = Estimate(
                float(value),
                None if reach is None else value - reach,
                None if reach is None else value + reach,
                0.0,
                is_share=0 <= value <= 1,
            )
    if not metrics:
        raise UsageError(f"{path}: these results hold no figures")
    return Evaluation(str(path), "", "", {"tasks": sorted(results)}, metrics, (), 0.0)
