"""What a loop came to: every metric of every model with its interval over scenes and seeds, gains, captions, cost.

A figure is the mean over the seeds. Its interval joins two errors in quadrature: that of the scenes (the mean of the
seeds' own bootstrap intervals; the seeds answered the same scenes, so it does not shrink with their number) and that
of the seeds (Student's t of their mean). With one seed there is only the first.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vila2.augment.carry import EVALUATION
from vila2.augment.encodes import encode_plan
from vila2.augment.ledger import FILE_NAME as LEDGER
from vila2.augment.ledger import read_ledger
from vila2.augment.loop import RECIPE
from vila2.augment.measured import gains, read_measured
from vila2.augment.recipe import LoopRecipe
from vila2.augment.step import read_json
from vila2.config import make_settings
from vila2.errors import OutputError, UsageError
from vila2.evaluate.evaluation import Evaluation

# Student's t at 97.5 % for 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_T_MANY = 2.0
_CHANGES = ("captions", "words", "distinct_2", "unique", "hallucination", "truncated", "repetitive", "errors")


@dataclass(frozen=True, slots=True)
class Figure:
    """A value with its interval (None where it has none), and the value of each seed."""

    value: float
    low: float | None
    high: float | None
    seeds: list[float]


@dataclass(frozen=True, slots=True)
class Against:
    """What one model gained over another, metric by metric; more is better whatever the metric."""

    model: str
    other: str
    gains: dict[str, Figure]


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that a report shows, as JSON values. `metrics`: split -> metric -> model -> Figure."""

    out: str
    seeds: list[int]  # of which anything is measured
    planned: int  # how many seeds the recipe has
    models: list[str]
    best: dict[str, int]  # seed -> its best round
    better: dict[str, str]  # metric -> higher, lower, or nothing
    shares: list[str]  # the metrics that are shares
    metrics: dict[str, dict[str, dict[str, Figure]]]
    against: dict[str, list[Against]]
    captions: dict[str, dict[str, float]]  # model -> what its captions are like, the mean over seeds
    encodes: list[str]  # what an image cost of encodes when the specialists were asked
    cost: dict[str, dict[str, float]]  # kind of step -> seconds, hours, money
    currency: str
    recipe: dict[str, Any]
    ledger: list[dict[str, Any]]

    def say_seeds(self) -> str:
        """`3 seeds`, or how far a run has come: `1 of 3 seeds`."""
        measured = len(self.seeds)
        of = f"{measured} of {self.planned}" if measured < self.planned else f"{measured}"
        return f"{of} seed{'s' if self.planned > 1 else ''}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_results(run: Path) -> Results:
    """The results of a run folder, as far as it has come. OutputError if it is no loop's, UsageError if it holds no
    evaluation yet."""
    recipe = read_json(run / RECIPE)
    if recipe is None:
        raise OutputError(f"{run} holds no {RECIPE}: it is not the folder of a loop")
    ledger = _latest(read_ledger(run / LEDGER), run)
    found = _evaluations(run, ledger)
    if not found:
        raise UsageError(f"{run} holds no evaluation yet: let the loop run further")
    measured = {seed for by_model in found.values() for by_seed in by_model.values() for seed in by_seed}
    every = [e for by_model in found.values() for by_seed in by_model.values() for e in by_seed.values()]
    known = {name: metric for e in every for name, metric in e.metrics.items()}
    best = {
        line["step"].split("/")[0].removeprefix("seed-"): int(line["values"]["best"])
        for line in ledger
        if line["kind"] == "gain"
    }
    models = _ordered({model for by_model in found.values() for model in by_model})
    return Results(
        out=str(run),
        seeds=[seed for seed in recipe["seeds"] if seed in measured],
        planned=len(recipe["seeds"]),
        models=models,
        best=best,
        better={name: metric.better for name, metric in known.items()},
        shares=[name for name, metric in known.items() if metric.is_share],
        metrics={split: _metrics(by_model, models, known) for split, by_model in found.items()},
        against={split: _comparisons(by_model, best) for split, by_model in found.items()},
        captions=_captions(ledger),
        encodes=_encodes(recipe),
        cost=_cost(ledger),
        currency=str(recipe["cost"]["currency"]),
        recipe=recipe,
        ledger=ledger,
    )


def joined(figures: Sequence[tuple[float, float | None, float | None]]) -> Figure:
    """The mean over seeds of (value, low, high), with the interval that the module's docstring tells of."""
    values = [value for value, _, _ in figures]
    mean = statistics.fmean(values)
    halves = [(high - low) / 2 for _, low, high in figures if low is not None and high is not None]
    if len(figures) == 1:
        return Figure(mean, figures[0][1], figures[0][2], values)
    freedom = len(values) - 1
    t = _T[freedom - 1] if freedom <= len(_T) else _T_MANY
    of_seeds = t * statistics.stdev(values) / math.sqrt(len(values))
    half = math.hypot(of_seeds, statistics.fmean(halves) if halves else 0.0)
    return Figure(mean, mean - half, mean + half, values)


def table(results: Results, split: str, metrics: Sequence[str] = ()) -> list[list[str]]:
    """Rows of text: a head, then one row a metric with a column a model."""
    found = results.metrics[split]
    names = [name for name in metrics or found if name in found]
    models = [model for model in results.models if any(model in found[name] for name in names)]
    cells = ([_cell(found[name].get(m), *_shape(name, results)) for m in models] for name in names)
    return [["", *models], *([name, *row] for name, row in zip(names, cells, strict=True))]


def markdown(
    results: Results, split: str, metrics: Sequence[str] = (), main: Sequence[str] = ()
) -> list[str]:
    """Two tables for a README: a row a metric with a column a model (all metrics, or `metrics`), and what each model
    gained on the `main` ones, in bold where its interval leaves 0 out."""
    found = results.metrics[split]
    names = [name for name in metrics or found if name in found]
    models = [model for model in results.models if any(model in found[name] for name in names)]
    values = [
        [
            f"`{name}`",
            *(_cell(found[name].get(model), *_shape(name, results), short=True) for model in models),
        ]
        for name in names
    ]
    return [
        *_lines([["", *models], *values]),
        "",
        *_gained(results, split, [n for n in main or names if n in found]),
    ]


def specialists_markdown(results: Results, split: str, main: Sequence[str]) -> list[str]:
    """A table of what each specialist gained over the model that it is to teach; nothing without specialists."""
    pairs = [pair for pair in results.against.get(split, ()) if pair.model.startswith("specialist-")]
    names = [name for name in main if any(name in pair.gains for pair in pairs)]
    return _gain_table(results, pairs, names) if pairs else []


def _gained(results: Results, split: str, names: Sequence[str]) -> list[str]:
    pairs = [pair for pair in results.against[split] if not pair.model.startswith("specialist-")]
    return _gain_table(results, pairs, names)


def _gain_table(results: Results, pairs: Sequence[Against], names: Sequence[str]) -> list[str]:
    rows = [
        [f"{p.model} over {p.other}", *(_gain_cell(p.gains.get(n), *_shape(n, results)) for n in names)]
        for p in pairs
    ]
    return _lines([["gain of", *(f"`{name}`" for name in names)], *rows])


def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|---" * len(rows[0]) + "|", *body]


def _shape(name: str, results: Results) -> tuple[float, int]:
    return (100.0, 1) if name in results.shares else (1.0, 2)


def _gain_cell(figure: Figure | None, scale: float, digits: int) -> str:
    if figure is None:
        return ""
    sure = figure.low is not None and figure.high is not None and (figure.low > 0 or figure.high < 0)
    text = ("+" if figure.value > 0 else "") + _cell(figure, scale, digits, short=True)
    return f"**{text}**" if sure else text


def _cell(figure: Figure | None, scale: float, digits: int, short: bool = False) -> str:
    """A figure with its interval; `short` writes one that reaches as far to both sides with a plus-minus."""
    if figure is None:
        return ""
    text = f"{figure.value * scale:.{digits}f}"
    if figure.low is None or figure.high is None:
        return text
    below, above = figure.value - figure.low, figure.high - figure.value
    if short and math.isclose(below, above, abs_tol=1e-9):
        return f"{text} ± {above * scale:.{digits}f}"
    return f"{text} ({figure.low * scale:.{digits}f} to {figure.high * scale:.{digits}f})"


def _latest(lines: Iterable[Mapping[str, Any]], run: Path) -> list[dict[str, Any]]:
    """The last line of each step that still lies in the run folder, in order."""
    last = {line["step"]: dict(line) for line in lines}
    return [line for line in last.values() if (run / line["step"]).is_dir()]


def _evaluations(
    run: Path, ledger: Iterable[Mapping[str, Any]]
) -> dict[str, dict[str, dict[int, Evaluation]]]:
    """split (test before dev) -> model -> seed -> what was measured; specialists are measured on dev alone."""
    found: dict[str, dict[str, dict[int, Evaluation]]] = {"test": {}, "dev": {}}
    for line in ledger:
        if line["kind"] != "evaluate":
            continue
        seed, *rest = line["step"].split("/")
        split, model = ("test", rest[1]) if rest[0] == "test" else ("dev", rest[0])
        measured = read_measured(run / line["step"] / EVALUATION)
        found[split].setdefault(model, {})[int(seed.removeprefix("seed-"))] = measured
    return {split: by_model for split, by_model in found.items() if by_model}


def _metrics(
    by_model: Mapping[str, Mapping[int, Evaluation]], models: Sequence[str], known: Mapping[str, Any]
) -> dict[str, dict[str, Figure]]:
    found: dict[str, dict[str, Figure]] = {}
    for name in known:
        for model in models:
            measured = [e.metrics[name] for e in by_model.get(model, {}).values() if name in e.metrics]
            if measured:
                figures = [(metric.value, metric.low, metric.high) for metric in measured]
                found.setdefault(name, {})[model] = joined(figures)
    return found


def _comparisons(by_model: Mapping[str, Mapping[int, Evaluation]], best: Mapping[str, int]) -> list[Against]:
    """Each round against round 0, the best round against the controls, generalists and specialists against it."""
    of_best = {
        seed: e for seed in by_model.get("round-0", {}) if (e := _best(by_model, best, seed)) is not None
    }
    known: dict[str, Mapping[int, Evaluation]] = {**by_model, "best round": of_best}
    rounds = [model for model in by_model if model.startswith("round-") and model != "round-0"]
    pairs = [(model, "round-0") for model in [*_ordered(rounds), "oracle", *_controls(by_model)]]
    pairs += [("best round", control) for control in _controls(by_model)]
    pairs += [
        (model, "best round") for model in _ordered(by_model) if model.startswith(("vila2", "specialist-"))
    ]
    pairs += [("vila2", control) for control in _controls(by_model)]
    found = []
    for model, other in pairs:
        ours, theirs = known.get(model, {}), known.get(other, {})
        seeds = [seed for seed in ours if seed in theirs]
        if seeds:
            found.append(Against(model, other, _gains([(theirs[seed], ours[seed]) for seed in seeds])))
    return found


def _gains(pairs: Sequence[tuple[Evaluation, Evaluation]]) -> dict[str, Figure]:
    by_metric: dict[str, list[tuple[float, float | None, float | None]]] = defaultdict(list)
    for before, after in pairs:
        names = tuple(name for name, e in before.metrics.items() if name in after.metrics and e.better)
        for gain in gains(before, after, names):
            by_metric[gain.metric].append((gain.value, gain.low, gain.high))
    return {name: joined(figures) for name, figures in by_metric.items()}


def _best(
    by_model: Mapping[str, Mapping[int, Evaluation]], best: Mapping[str, int], seed: int
) -> Evaluation | None:
    number = best.get(str(seed))
    return None if number is None else by_model.get(f"round-{number}", {}).get(seed)


def _controls(by_model: Iterable[str]) -> list[str]:
    return sorted(model for model in by_model if model.startswith("control-"))


def _ordered(models: Iterable[str]) -> list[str]:
    """Rounds by number, then controls, the oracle, the generalists, and the specialists."""
    kinds = ("round-", "control-", "oracle", "vila2", "specialist-")

    def place(model: str) -> tuple[int, int, str]:
        kind = next((i for i, start in enumerate(kinds) if model.startswith(start)), len(kinds))
        number = model.removeprefix("round-")
        return kind, int(number) if number.isdigit() else 0, model if model != "vila2" else "~"

    return sorted(models, key=place)


def _captions(ledger: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """model -> figures of what was written with its prompt, by its gate; `original`: the texts of the web."""
    found: dict[str, dict[str, list[float]]] = {}
    for line in ledger:
        _, _, name = line["step"].partition("/")
        model, _, _ = name.rpartition("/")
        if line["kind"] == "gate":
            figures = {key: line["metrics"][key] for key in _CHANGES if key in line["metrics"]}
        elif name == "round-0/captions":
            model, figures = (
                "original",
                {"captions": line["metrics"]["images"], "words": line["metrics"]["words"]},
            )
        else:
            continue
        for key, value in figures.items():
            found.setdefault(model, {}).setdefault(key, []).append(float(value))
    return {
        model: {key: statistics.fmean(values) for key, values in figures.items()}
        for model, figures in found.items()
    }


def _encodes(recipe: dict[str, Any]) -> list[str]:
    try:
        return encode_plan(make_settings(LoopRecipe, recipe))
    except UsageError:
        return []  # the recipe of another version


def _cost(ledger: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    totals: dict[str, dict[str, float]] = {}
    for line in ledger:
        of_kind = totals.setdefault(line["kind"], defaultdict(float))
        for name in ("seconds", "cpu_hours", "gpu_hours", "cost", "images"):
            of_kind[name] += float(line.get(name, 0.0))
        of_kind["steps"] += 1
    return {kind: dict(values) for kind, values in totals.items()}
