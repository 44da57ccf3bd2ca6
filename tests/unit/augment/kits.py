"""A loop's recipe, recaption outputs and evaluations without a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vila2.augment.context import Context
from vila2.augment.recipe import LoopRecipe
from vila2.config import make_settings
from vila2.data.manifest import Manifest
from vila2.data.rows import Row
from vila2.data.writer import PartWriter
from vila2.evaluate.evaluation import Evaluation, Record, estimate
from vila2.evaluate.tasks import METRICS
from vila2.recaption.interrupt import Interrupts
from vila2.types import ErrorKind, Status

STAGES = [
    {
        "name": "align",
        "train": ["projector"],
        "steps": 2,
        "lr": 1e-3,
        "data": [{"kind": "world", "texts": ["alt"]}],
    },
    {
        "name": "pretrain",
        "train": ["projector", "decoder"],
        "epochs": 2.0,
        "lr": 1e-3,
        "data": [{"kind": "captions"}],
    },
    {
        "name": "sft",
        "train": ["decoder"],
        "steps": 3,
        "lr": 1e-3,
        "data": [{"kind": "world", "texts": ["brief"]}],
    },
]
SPECIALIST: dict[str, Any] = {
    "name": "spatial",
    "prompt": "spatial",
    "stage": [
        {
            "name": "tune",
            "train": ["decoder"],
            "steps": 1,
            "lr": 1e-3,
            "data": [{"kind": "world", "texts": ["spatial"]}],
        }
    ],
}


def recipe(**changes: Any) -> LoopRecipe:
    """A small recipe of a world; `changes` replace its keys."""
    values: dict[str, Any] = {
        "out": "run",
        "source": {"world": {"scenes": 10}},
        "train": {"base": "base", "stage": STAGES},
    }
    return make_settings(LoopRecipe, values | changes)


def context(run: Path, of: LoopRecipe | None = None, **outcomes: Mapping[str, Any]) -> Context:
    found = {name.replace("__", "/"): values for name, values in outcomes.items()}
    return Context(run, of or recipe(), Interrupts(), lambda step, progress: None, found)


def write_output(
    out: Path,
    captions: Sequence[tuple[str, str]],
    *,
    prompt: str = "detailed",
    wordings: Sequence[str] = ("What is here?",),
    status: Mapping[int, Status] | None = None,
    originals: Sequence[str] | None = None,
    start: int = 0,
) -> Path:
    """An output folder with one caption for each (key, caption), from place `start` on of the shard `a.tar`."""
    settings = {
        "source": "webdataset:/x",
        "prompts": {prompt: list(wordings)},
        "seed": 0,
        "prompt_template": None,
    }
    Manifest(settings | {"image_root": None}).ensure(out)
    writer = PartWriter(out, 0, 1, 2)
    for index, (key, caption) in enumerate(captions):
        found = (status or {}).get(index, Status.OK)
        failed = found is Status.ERROR
        writer.add(
            Row(
                key=key,
                shard="a.tar",
                index=start + index,
                prompt=prompt,
                status=found,
                error_kind=ErrorKind.ENGINE_ERROR if failed else None,
                error="it failed" if failed else None,
                model_digest="m",
                caption="" if failed else caption,
                original=originals[index] if originals else "",
                width=4,
                height=4,
            )
        )
    writer.flush()
    return out


def evaluation(right: Sequence[bool], task: str = "relation") -> Evaluation:
    """One question a scene, answered right or wrong."""
    records = [
        Record(scene, task, "q", "yes", "yes" if good else "no", {"asked": 1.0, "correct": float(good)})
        for scene, good in enumerate(right)
    ]
    settings = {"split": "dev", "style": "fluent", "seed": 0}
    return Evaluation("c", "d", "", settings, estimate(records, METRICS, 0), tuple(records), 1.0)
