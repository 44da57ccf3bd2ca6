"""What an evaluation found: figures with their intervals, and every answer, so that two can be compared in pairs."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vila2.data.files import atomic_write
from vila2.errors import OutputError, UsageError
from vila2.evaluate.bootstrap import Floats, intervals, ratios

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure: the sum of `numerator` over that of `denominator`, over the records of `tasks`.

    Both name scores of a record; a name that stands twice counts twice.
    """

    name: str
    tasks: tuple[str, ...]
    numerator: tuple[str, ...]
    denominator: tuple[str, ...]
    better: str = "higher"  # higher, lower, or "" where neither is better
    is_share: bool = True  # between 0 and 1: shown in per cent


@dataclass(frozen=True, slots=True)
class Record:
    """One answer: what was asked of which scene, what came, and what it scores."""

    scene: int
    task: str
    question: str
    expected: str
    reply: str
    scores: dict[str, float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure, its 95 % interval over scenes (None where it has none), and how many things it is a share of."""

    value: float
    low: float | None
    high: float | None
    count: float
    better: str = "higher"
    is_share: bool = True


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures and answers of one checkpoint. `settings` says what was asked: two that agree there can be compared."""

    checkpoint: str
    model_digest: str
    compute: str
    settings: dict[str, Any]
    metrics: dict[str, Estimate]
    records: tuple[Record, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {"format": FORMAT, **asdict(self)}

    def summary(self) -> dict[str, Any]:
        """Everything but the single answers."""
        values = self.to_json()
        values["records"] = len(self.records)
        return values

    def save(self, path: str | Path) -> None:
        """Write the JSON, a record a line, whole or not at all. OutputError if it cannot be written."""
        values = self.to_json()
        records = ",\n".join(json.dumps(record, ensure_ascii=False) for record in values.pop("records"))
        head = json.dumps(values, ensure_ascii=False, indent=1).rstrip("}").rstrip()
        path = make_room(path)
        try:
            atomic_write(path, f'{head},\n "records": [\n{records}\n]}}\n'.encode())
        except OSError as error:
            raise OutputError(f"{path}: cannot write the result: {error.strerror}") from None


def make_room(path: str | Path) -> Path:
    """Make the folder of a result: called before the work, so that no work is lost. OutputError if it cannot be."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot write the result: {error.strerror}") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        why = "it is a folder" if path.is_dir() else f"no permission in {path.parent}"
        raise OutputError(f"{path}: cannot write the result: {why}")
    return path


def load_evaluation(path: str | Path) -> Evaluation:
    """What `Evaluation.save` wrote; UsageError if the file is something else."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError
        values["metrics"] = {name: Estimate(**value) for name, value in values["metrics"].items()}
        values["records"] = tuple(Record(**value) for value in values["records"])
        return Evaluation(**values)
    except OSError as error:
        raise UsageError(f"{path}: cannot read the file: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UsageError(f"{path}: not a result that `vila2-fast evaluate --out` wrote") from None


def estimate(records: Sequence[Record], metrics: Iterable[Metric], seed: int) -> dict[str, Estimate]:
    """Every metric that the records have something for, with its bootstrap interval over scenes."""
    used = with_something(records, metrics)
    if not used:
        return {}
    numerators, denominators = sums(records, used, scenes_of(records))
    values = ratios(numerators.sum(0), denominators.sum(0))
    bounds = intervals(numerators, denominators, seed, are_shares=[metric.is_share for metric in used])
    return {
        metric.name: Estimate(
            float(values[i]),
            finite(bounds[i, 0]),
            finite(bounds[i, 1]),
            float(denominators[:, i].sum()),
            metric.better,
            metric.is_share,
        )
        for i, metric in enumerate(used)
    }


def scenes_of(records: Iterable[Record]) -> list[int]:
    return sorted({record.scene for record in records})


def with_something(records: Iterable[Record], metrics: Iterable[Metric]) -> list[Metric]:
    """The metrics whose denominator is not 0."""
    totals: dict[tuple[str, str], float] = {}
    for record in records:
        for name, score in record.scores.items():
            totals[record.task, name] = totals.get((record.task, name), 0.0) + score
    return [m for m in metrics if any(totals.get((task, name)) for task in m.tasks for name in m.denominator)]


def sums(
    records: Iterable[Record], metrics: Sequence[Metric], scenes: Sequence[int]
) -> tuple[Floats, Floats]:
    """Numerators and denominators (scenes, metrics): the scores of a scene's records, added up."""
    row = {scene: i for i, scene in enumerate(scenes)}
    by_task: dict[str, list[tuple[int, Metric]]] = {}
    for i, metric in enumerate(metrics):
        for task in metric.tasks:
            by_task.setdefault(task, []).append((i, metric))
    numerators, denominators = np.zeros((2, len(scenes), len(metrics)))
    for record in records:
        for i, metric in by_task.get(record.task, ()):
            numerators[row[record.scene], i] += _total(record.scores, metric.numerator)
            denominators[row[record.scene], i] += _total(record.scores, metric.denominator)
    return numerators, denominators


def _total(scores: Mapping[str, float], names: Iterable[str]) -> float:
    return sum(scores.get(name, 0.0) for name in names)


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
