"""Captions that are there already: against references by CIDEr, or against the truth of the scenes they describe."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vila2.errors import UsageError
from vila2.evaluate import parse
from vila2.evaluate.cider import cider, tokenize
from vila2.evaluate.evaluation import Estimate, Evaluation, Metric, Record, estimate
from vila2.evaluate.run import diversity
from vila2.evaluate.tasks import CAPTIONS, METRICS, score_caption
from vila2.world import Scene, read_lexicon

REFERENCE = "reference"
REFERENCE_METRICS = (
    Metric("cider", (REFERENCE,), ("cider",), ("captions",), is_share=False),
    Metric("captions.words", (REFERENCE,), ("words",), ("captions",), better="", is_share=False),
)


def evaluate_references(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]], name: str, seed: int = 0
) -> Evaluation:
    """CIDEr (1.0 is what papers call 100) of the captions whose keys have references.

    Its document frequencies are those of all `references`' captions under these keys. UsageError if no key fits.
    """
    started = time.perf_counter()
    keys = _shared(captions, references, "references")
    scores = cider(
        {key: tokenize(captions[key]) for key in keys},
        {key: [tokenize(text) for text in references[key]] for key in keys},
    )
    number = {
        key: i for i, key in enumerate(sorted(references))
    }  # the same key is the same scene in each result
    records = [
        Record(
            number[key],
            REFERENCE,
            key,
            "\n".join(references[key]),
            captions[key],
            {"captions": 1.0, "cider": scores[key] / 10, "words": float(len(parse.words(captions[key])))},
        )
        for key in keys
    ]
    settings: dict[str, Any] = {
        "tasks": [REFERENCE],
        "seed": seed,
        "without_caption": len(references) - len(keys),
    }
    metrics = estimate(records, REFERENCE_METRICS, seed)
    return _evaluation(name, settings, metrics, records, time.perf_counter() - started)


def evaluate_truths(
    captions: Mapping[str, str], truths: Mapping[str, Scene], name: str, seed: int = 0
) -> Evaluation:
    """The caption metrics of `vila2.evaluate.tasks`, for captions of scenes whose truth is known."""
    started = time.perf_counter()
    keys = _shared(captions, truths, "truths")
    find = read_lexicon().find
    records = [
        Record(
            truths[key].index,
            CAPTIONS,
            key,
            "",
            captions[key],
            score_caption(captions[key], truths[key], find),
        )
        for key in keys
    ]
    scenes = {(scene.split, scene.style, scene.seed) for scene in truths.values()}
    split, style, world_seed = next(iter(scenes)) if len(scenes) == 1 else ("several", "several", None)
    settings: dict[str, Any] = {
        "tasks": [CAPTIONS],
        "split": split,
        "style": style,
        "seed": world_seed,
        "without_caption": len(truths) - len(keys),
    }
    metrics = estimate(records, METRICS, seed) | diversity([record.reply for record in records])
    return _evaluation(name, settings, metrics, records, time.perf_counter() - started)


def source_of(out: Path) -> Path:
    """Where the images of a recaption output came from. OutputError if the folder is none."""
    from vila2.recaption.output import Finished

    return Path(Finished(out).spec.partition(":")[2])


def _shared(captions: Mapping[str, str], others: Mapping[str, object], what: str) -> list[str]:
    keys = sorted(captions.keys() & others.keys())
    if not keys:
        shown = ", ".join(repr(next(iter(sorted(keys)), "none")) for keys in (captions, others))
        raise UsageError(f"the captions and the {what} have no key in common (they begin with {shown})")
    return keys


def _evaluation(
    name: str,
    settings: dict[str, Any],
    metrics: dict[str, Estimate],
    records: Sequence[Record],
    seconds: float,
) -> Evaluation:
    return Evaluation(name, "", "", settings, metrics, tuple(records), seconds)
