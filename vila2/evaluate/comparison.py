"""Two results side by side: differences on the same questions, with intervals and tests that use the pairing."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vila2.errors import UsageError
from vila2.evaluate.bootstrap import mcnemar_p, paired_intervals, permutation_p, ratios
from vila2.evaluate.evaluation import Evaluation, Metric, Record, finite, scenes_of, sums, with_something
from vila2.evaluate.given import REFERENCE_METRICS
from vila2.evaluate.tasks import METRICS


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric in two evaluations. `p` is the paired permutation test's; `mcnemar` (of questions that one model alone
    got right) is there for metrics that are a share of right answers."""

    a: float
    b: float
    low: float | None  # of b - a
    high: float | None
    p: float
    better: str
    is_share: bool = True
    mcnemar: float | None = None

    @property
    def value(self) -> float:
        return self.b - self.a


@dataclass(frozen=True, slots=True)
class Comparison:
    """`answers` were paired; `unpaired` stand in one of the two results only, and do not count."""

    a: str
    b: str
    scenes: int
    answers: int
    unpaired: int
    metrics: dict[str, Difference]

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        for name, difference in self.metrics.items():
            values["metrics"][name]["difference"] = difference.value
        return values


def compare(a: Evaluation, b: Evaluation, seed: int = 0) -> Comparison:
    """The differences b - a, paired over what both were asked of the same scenes. UsageError if they do not pair.

    Every metric has a p-value of its own: of twenty metrics that do not differ, one is below 0.05 by chance.
    """
    first, second = _paired(a, b)
    used = with_something(first, (*METRICS, *REFERENCE_METRICS))
    used = [metric for metric in used if metric in with_something(second, used)]
    if not used:
        raise UsageError("the two results have no task in common")
    scenes = scenes_of(first)
    sums_a, sums_b = sums(first, used, scenes), sums(second, used, scenes)
    bounds = paired_intervals(sums_a, sums_b, seed)
    p = permutation_p(sums_a, sums_b, seed)
    value_a, value_b = (ratios(s[0].sum(0), s[1].sum(0)) for s in (sums_a, sums_b))
    differences = {
        metric.name: Difference(
            float(value_a[i]),
            float(value_b[i]),
            finite(bounds[i, 0]),
            finite(bounds[i, 1]),
            float(p[i]),
            metric.better,
            metric.is_share,
            _mcnemar(first, second, metric),
        )
        for i, metric in enumerate(used)
    }
    unpaired = len(a.records) + len(b.records) - len(first) - len(second)
    return Comparison(a.checkpoint, b.checkpoint, len(scenes), len(first), unpaired, differences)


def _paired(a: Evaluation, b: Evaluation) -> tuple[list[Record], list[Record]]:
    """The records of both for what both were asked, in the same order."""
    other = [
        name for name in ("split", "style", "objects", "seed") if a.settings.get(name) != b.settings.get(name)
    ]
    if other:
        name = other[0]
        raise UsageError(
            f"the two results are of different scenes ({name} is {a.settings.get(name)!r} and {b.settings.get(name)!r})"
        )
    by_question = {_question(record): record for record in b.records}
    pairs = [
        (record, by_question[_question(record)]) for record in a.records if _question(record) in by_question
    ]
    if not pairs:
        raise UsageError("the two results have no question in common: were they made by the same version?")
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _question(record: Record) -> tuple[int, str, str, str]:
    return record.scene, record.task, record.question, record.expected


def _mcnemar(a: Sequence[Record], b: Sequence[Record], metric: Metric) -> float | None:
    if metric.numerator != ("correct",) or metric.denominator != ("asked",):
        return None
    pairs = [
        (x.scores["correct"], y.scores["correct"])
        for x, y in zip(a, b, strict=True)
        if x.task in metric.tasks
    ]
    return mcnemar_p(sum(x > y for x, y in pairs), sum(y > x for x, y in pairs))
