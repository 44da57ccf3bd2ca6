"""The steps that decide whether to go on: gates on captions, gains of rounds, and models against each other."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vila2.augment.carry import EVALUATION
from vila2.augment.context import Context, GateFailed, Outcome
from vila2.augment.measured import gains, read_measured
from vila2.augment.step import Step, digest_of, write_json
from vila2.data.verify import iter_rows
from vila2.evaluate import metrics, parse
from vila2.types import Status

GATE = "gate.json"
_GRAM = 4
_SHOWN = 200  # characters of an example
_FUNCTION_WORDS = frozenset(
    parse.words(
        "a an and are as at be but by for from has have in into is it its of on or that the their there this to was "
        "were which while with"
    )
)


@dataclass(frozen=True, slots=True)
class Check:
    """One figure against its limit. `examples`: captions that show it."""

    name: str
    value: float
    limit: float
    is_least: bool  # the limit is a least, not a most
    examples: list[dict[str, str]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.is_least else self.value <= self.limit

    def describe(self) -> str:
        word = "at least" if self.is_least else "at most"
        return f"{self.name} is {self.value:.3g}, the gate wants {word} {self.limit:.3g}"


@dataclass(frozen=True, slots=True)
class _Written:
    """One caption as its row has it."""

    key: str
    prompt: str
    original: str
    text: str
    status: str

    def example(self, why: str) -> dict[str, str]:
        return {
            "key": self.key,
            "prompt": self.prompt,
            "why": why,
            "caption": self.text,
            "original": self.original,
        }


def run_gate(step: Step, context: Context) -> Outcome:
    """Hold captions against the recipe's limits; `gate.json` has every figure. GateFailed says which one, with a
    caption that shows it."""
    settings = context.settings(step)
    limits = settings["limits"]
    measured = Measured(Path(settings["captions"]), limits["probe"], limits["examples"])
    figures = measured.figures()
    checks = list(_rates(measured, limits))
    if settings["before"] is not None:
        before = Measured(Path(settings["before"]), limits["probe"], limits["examples"])
        checks += _drift(measured, before, limits)
        figures |= {f"before.{name}": value for name, value in before.figures().items()}
    made_up = _made_up(measured, settings)
    if made_up is not None:
        figures["hallucination"] = made_up.value
        checks += _hallucination(made_up, settings, limits, context, step)
    failed = [check for check in checks if not check.passed]
    values = {"figures": figures, "checks": [{**asdict(check), "passed": check.passed} for check in checks]}
    file = step.folder(context.run) / GATE
    write_json(file, values)
    if failed:
        shown = next((check.examples[0] for check in failed if check.examples), None)
        example = f' (for example {shown["key"]}: "{_short(shown["caption"])}")' if shown else ""
        raise GateFailed(
            f"{step.name}: {'; '.join(check.describe() for check in failed)}{example}; all figures and more examples: "
            f"{file}. Nothing was trained on these captions. Change the model or the recipe's [gates], then run again"
        )
    return Outcome(digest_of(values), values={"hallucination": figures.get("hallucination")}, metrics=figures)


class Measured:
    """The captions of an output: counts over all of them, words of the first `probe`."""

    def __init__(self, out: Path, probe: int, examples: int) -> None:
        self.num_examples = examples
        self.status: Counter[str] = Counter()
        self.words = 0
        self.probe: dict[tuple[str, str], _Written] = {}
        self.bad: dict[str, list[dict[str, str]]] = {}
        for written in _captions(out):
            self.status[written.status] += 1
            if written.status != Status.OK.value:
                shown = self.bad.setdefault(written.status, [])
                if len(shown) < examples:
                    shown.append(written.example(written.status))
            if written.status != Status.ERROR.value:
                self.words += len(written.text.split())
                if len(self.probe) < probe:
                    self.probe[written.key, written.prompt] = written

    @property
    def num_captions(self) -> int:
        return sum(self.status.values()) - self.status[Status.ERROR.value]

    @property
    def mean_words(self) -> float:
        return self.words / max(1, self.num_captions)

    def rate(self, status: Status) -> float:
        rows = sum(self.status.values())
        return self.status[status.value] / max(1, rows if status is Status.ERROR else self.num_captions)

    def figures(self) -> dict[str, float]:
        tokens = [parse.words(written.text) for written in self.probe.values()]
        return {
            "captions": self.num_captions,
            "words": self.mean_words,
            "errors": self.rate(Status.ERROR),
            "truncated": self.rate(Status.TRUNCATED),
            "repetitive": self.repetitive()[0],
            "distinct_2": metrics.distinct_n(tokens, 2),
            "unique": len({tuple(text) for text in tokens}) / max(1, len(tokens)),
        }

    def repetitive(self) -> tuple[float, list[dict[str, str]]]:
        """The share of captions that loop: marked so when they were written, or, of the probe, saying four words in
        a row three times."""
        marked = self.rate(Status.REPETITIVE)
        found = [w for w in self.probe.values() if w.status == Status.OK.value and _repeats(w.text)]
        share = marked + (1 - marked) * len(found) / max(1, len(self.probe))
        examples = self.bad.get(Status.REPETITIVE.value, []) + [w.example("repeats itself") for w in found]
        return share, examples[: self.num_examples]


def _captions(out: Path) -> Iterator[_Written]:
    for row in iter_rows(out):
        yield _Written(row["key"], row["prompt"], row["original"], row["caption"], row["status"])


def _repeats(text: str) -> bool:
    grams = Counter(metrics.ngrams(parse.words(text), _GRAM))
    return any(count >= 3 for count in grams.values())


def _rates(measured: Measured, limits: Mapping[str, Any]) -> Iterator[Check]:
    if limits["repetitive"] is not None:
        share, examples = measured.repetitive()
        yield Check("the share of repetitive captions", share, limits["repetitive"], False, examples)
    for name, status in (("truncated", Status.TRUNCATED), ("errors", Status.ERROR)):
        if limits[name] is not None:
            what = "truncated captions" if name == "truncated" else "images without a caption"
            examples = measured.bad.get(status.value, [])
            yield Check(f"the share of {what}", measured.rate(status), limits[name], False, examples)


def _drift(now: Measured, before: Measured, limits: Mapping[str, Any]) -> Iterator[Check]:
    """How the captions have moved since the round before."""
    ratio = now.mean_words / max(before.mean_words, 1e-9)
    if limits["longer"] is not None:
        longest = sorted(now.probe.values(), key=lambda w: -len(w.text))[: now.num_examples]
        shown = [written.example("long") for written in longest]
        yield Check("the length against the round before", ratio, limits["longer"], False, shown)
    if limits["shorter"] is not None:
        shortest = sorted(now.probe.values(), key=lambda w: len(w.text))[: now.num_examples]
        shown = [written.example("short") for written in shortest]
        yield Check("the length against the round before", ratio, limits["shorter"], True, shown)
    if limits["diversity_drop"] is not None:
        old = before.figures()["distinct_2"]
        drop = 1 - now.figures()["distinct_2"] / old if old else 0.0
        often = Counter(written.text for written in now.probe.values())
        top = [text for text, _ in often.most_common(now.num_examples)]
        shown = [w.example("common") for text in top for w in now.probe.values() if w.text == text][
            : len(top)
        ]
        yield Check("the loss of distinct word pairs", drop, limits["diversity_drop"], False, shown)
    if limits["agreement"] is not None:
        scored = [
            (_overlap(written.text, before.probe[place].text), written)
            for place, written in now.probe.items()
            if place in before.probe
        ]
        if scored:
            mean = sum(score for score, _ in scored) / len(scored)
            worst = sorted(scored, key=lambda pair: pair[0])[: now.num_examples]
            shown = [w.example(f"agrees {score:.2f} with the round before") for score, w in worst]
            yield Check("the agreement with the round before", mean, limits["agreement"], True, shown)


def _made_up(measured: Measured, settings: Mapping[str, Any]) -> Check | None:
    """How much of what captions mention is not there: by the truth (CHAIR_i), or by what a second, sampled caption of
    the same image does not say. None where neither is known."""
    if settings["truth"] is not None:
        return _by_truth(measured, Path(settings["truth"]))
    if settings["again"] is None:
        return None
    again = {(w.key, w.prompt): w for w in _captions(Path(settings["again"]))}
    total = missing = 0
    shares: list[tuple[float, _Written, set[str]]] = []
    for place, written in measured.probe.items():
        other = again.get(place)
        words = content_words(written.text)
        if other is None or not words:
            continue
        alone = words - content_words(other.text)
        total, missing = total + len(words), missing + len(alone)
        shares.append((len(alone) / len(words), written, alone))
    return _worst(measured, "made-up words", missing, total, shares)


def _by_truth(measured: Measured, truth: Path) -> Check | None:
    from vila2.evaluate.statements import mentions
    from vila2.evaluate.truths import read_truths
    from vila2.world import read_lexicon

    truths, find = read_truths(truth), read_lexicon().find
    total = missing = 0
    shares: list[tuple[float, _Written, set[str]]] = []
    for written in measured.probe.values():
        scene = truths.get(written.key)
        if scene is None:
            continue
        there, said = scene.counts(), mentions(written.text, find)
        wrong = [name for name in said if name not in there]
        total, missing = total + len(said), missing + len(wrong)
        shares.append((len(wrong) / max(1, len(said)), written, set(wrong)))
    return _worst(measured, "mentions of what is not there", missing, total, shares)


def _worst(
    measured: Measured, what: str, missing: int, total: int, shares: list[tuple[float, _Written, set[str]]]
) -> Check | None:
    if not shares:
        return None
    worst = sorted((s for s in shares if s[2]), key=lambda s: -s[0])[: measured.num_examples]
    shown = [written.example(", ".join(sorted(words))) for _, written, words in worst]
    return Check(f"the share of {what}", missing / max(1, total), 1.0, False, shown)


def _hallucination(
    found: Check, settings: Mapping[str, Any], limits: Mapping[str, Any], context: Context, step: Step
) -> Iterator[Check]:
    if limits["hallucination"] is not None:
        yield Check(found.name, found.value, limits["hallucination"], False, found.examples)
    rise = limits["hallucination_rise"]
    earlier = [need for need in step.needs if need.endswith("/gate")]
    if rise is not None and earlier:
        old = context.outcomes[earlier[0]]["hallucination"]
        if old is not None:
            name = f"the rise of {found.name.removeprefix('the share of ')}"
            yield Check(name, found.value - old, rise, False, found.examples)


def run_gain(step: Step, context: Context) -> Outcome:
    """Whether the last of some evaluations gained over the one before, and which is the best round so far."""
    settings = context.settings(step)
    found = [read_measured(Path(folder) / EVALUATION) for folder in settings["evaluations"]]
    measured = gains(found[-2], found[-1], tuple(settings["metrics"]))
    won = [gain.is_gain for gain in measured]
    gained = any(won) if settings["need"] == "any" else all(won)
    values = {
        "gained": gained,
        "saturated": settings["can_stop"] and not gained,
        "best": _best(found, settings["metrics"][0]),
        "gains": [gain.to_json() for gain in measured],
    }
    write_json(step.folder(context.run) / "gain.json", values)
    return Outcome(digest_of(values), values, {gain.metric: gain.value for gain in measured})


def _best(found: Sequence[Any], metric: str) -> int:
    """The round, from 1 on, with the best first metric; of equals the earlier."""
    sign = -1.0 if found[0].metrics[metric].better == "lower" else 1.0
    return max(range(1, len(found)), key=lambda number: (sign * found[number].metrics[metric].value, -number))


def run_compare(step: Step, context: Context) -> Outcome:
    """One model has to be better than another, by `margin` or beyond its interval. GateFailed if it is not."""
    settings = context.settings(step)
    before, after = (read_measured(Path(settings[name]) / EVALUATION) for name in ("before", "after"))
    measured = gains(before, after, tuple(settings["metrics"]))
    margin = settings["margin"]
    values = {"gains": [gain.to_json() for gain in measured], "margin": margin}
    write_json(step.folder(context.run) / "compare.json", values)
    for gain in measured:
        if gain.value < margin if margin is not None else not gain.is_gain:
            least = "beyond its interval" if margin is None else f"by {margin:g} or more"
            interval = "" if gain.low is None else f" ({gain.low:+.4f} to {gain.high:+.4f})"
            raise GateFailed(
                f"{step.name}: {gain.metric} went from {gain.before:.4f} to {gain.after:.4f}, {gain.value:+.4f}"
                f"{interval}; it has to be better {least}. {step.why} was the test; "
                "train longer or on other data, or change the recipe's limit, then run again"
            )
    return Outcome(digest_of(values), values, {gain.metric: gain.value for gain in measured})


def content_words(text: str) -> set[str]:
    """The words that say something."""
    return {word for word in parse.words(text) if len(word) > 1 and word not in _FUNCTION_WORDS}


def _overlap(a: str, b: str) -> float:
    """The F1 of two captions' content words."""
    first, second = content_words(a), content_words(b)
    return metrics.f1(len(first & second), len(first), len(second))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
