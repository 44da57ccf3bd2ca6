"""`--dry-run`: what is left to do, and what it will take, by what earlier steps took or by a measured probe.

The probe draws a few images into a temporary folder, takes a few training steps, captions a few images and answers a
few scenes, with the recipe's own model and on this machine. Nothing is written into the run folder. New captions are
taken to be as long as they may be, so the estimate errs on the long side.
"""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from vila2.augment.base import make_base
from vila2.augment.boxes import FILE_NAME as BOXES_FILE
from vila2.augment.carry import device_of, recaption_settings
from vila2.augment.context import Context
from vila2.augment.encodes import encode_plan
from vila2.augment.loop import State
from vila2.augment.plan import SOURCE
from vila2.augment.recipe import BASE, LoopRecipe
from vila2.augment.source import original_records, shard_plan
from vila2.augment.step import BEGUN, Step, digest_of, place
from vila2.augment.texts import FILE_NAME as CAPTIONS_FILE
from vila2.config import make_settings
from vila2.data.shards import open_source
from vila2.errors import UsageError
from vila2.recaption.interrupt import Interrupts

PROBE_IMAGES = 32
PROBE_SCENES = 8
_WORDS_A_TOKEN = 0.75
_CAPTION_BYTES = 64  # of a line of captions.jsonl beside its text


@dataclass(frozen=True, slots=True)
class StepEstimate:
    """A step that is left. `basis`: ledger (an earlier step of its kind), probe, recipe (what it says of its base), or
    nothing where it takes no time worth naming."""

    step: str
    kind: str
    why: str
    begun: bool
    seconds: float = 0.0
    disk_bytes: int = 0
    cost: float = 0.0
    basis: str = ""


@dataclass(frozen=True, slots=True)
class LoopEstimate:
    """What is complete, and what is left with its time, disk and money. `disk_bytes`: what the steps leave, and the
    states of the largest training beside it while it runs."""

    out: str
    complete: list[str]
    steps: list[StepEstimate]
    seconds: float
    disk_bytes: int
    cost: float
    currency: str
    device: str
    probe_s: float
    encodes: list[str]  # what an image costs of encodes when the specialists are asked

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(recipe: LoopRecipe) -> LoopEstimate:
    """Plan and measure. Raises as the loop does, for what it would refuse at once."""
    run = Path(recipe.out).absolute()
    state = State(run, recipe)
    steps = state.steps()
    started = time.monotonic()
    left = [step for step in steps if not state.is_complete(step)]
    found: list[StepEstimate] = []
    boxes = {
        str(run / step.name / BOXES_FILE): step.settings["path"] for step in steps if step.kind == "boxes"
    }
    with _Probe(recipe, run, state, boxes) as probe:
        for step in left:
            seconds, disk, basis = probe.measure(step)
            hours = seconds / 3600
            on_gpu = device_of(probe.context, step) == "cuda"
            threads = recipe.threads or 1
            price = recipe.cost.gpu_hour * recipe.cost.gpus if on_gpu else recipe.cost.cpu_hour * threads
            begun = (step.folder(run) / BEGUN).exists()
            found.append(
                StepEstimate(step.name, step.kind, step.why, begun, seconds, disk, hours * price, basis)
            )
        passing = probe.passing_bytes
        device = "cuda" if any(device_of(probe.context, step) == "cuda" for step in left) else "cpu"
    return LoopEstimate(
        recipe.out,
        [step.name for step in steps if state.is_complete(step)],
        found,
        sum(e.seconds for e in found),
        sum(e.disk_bytes for e in found) + passing,
        sum(e.cost for e in found),
        recipe.cost.currency,
        device,
        time.monotonic() - started,
        encode_plan(recipe),
    )


class _Probe:
    """A small copy of the run in a temporary folder, made piece by piece as measures are asked for."""

    def __init__(self, recipe: LoopRecipe, run: Path, state: State, boxes: Mapping[str, str]) -> None:
        self.recipe, self.run, self.state = recipe, run, state
        self._boxes = boxes  # what a filter will write -> what it will read: the probe takes that
        self._stack = ExitStack()
        # what -> seconds before the first unit (a model is loaded), seconds a unit, bytes a unit
        self._measured: dict[str, tuple[float, float, float]] = {}
        # what -> seconds beside the steps, seconds a step by stage, bytes
        self._trained: dict[str, tuple[float, dict[str, float], int]] = {}
        self.passing_bytes = 0  # of the states of a training under way, which go when it ends
        self._source: tuple[str, int, float, float] | None = None
        self._checkpoint: str | None = None

    def __enter__(self) -> "_Probe":
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="vila2-probe-")))
        self.context = Context(self.folder, self.recipe, Interrupts(), lambda step, progress: None, {})
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def measure(self, step: Step) -> tuple[float, int, str]:
        """Seconds, bytes, and what they are known from."""
        if step.kind == "source":
            return self._of_source(step)
        if step.kind == "base":
            seconds = 60 * (self.recipe.base.minutes if self.recipe.base is not None else 0.0)
            return seconds, 0, "recipe" if seconds else ""
        if step.kind == "captions":
            words = self._new_words() if step.settings["mode"] != "original" else 0
            return 0.0, self.total * int(_CAPTION_BYTES + 6 * words), ""
        if step.kind not in ("train", "recaption", "evaluate"):
            return 0.0, 0, ""
        units = self._units(step)
        earlier = self._in_ledger(step)
        if earlier is not None:
            return earlier * units, self._disk(step, units), "ledger"
        if "command" in step.settings:
            return 0.0, 0, ""  # what a command of the user's takes is not ours to measure
        what = self._family(step)
        if step.kind == "train":
            if what not in self._trained:
                self._trained[what] = self._probe_train(step)
            begin_s, step_s, size = self._trained[what]
            seconds = sum(step_s[name] * count for name, count in self._steps_of(step).items())
            return begin_s + seconds, size, "probe"
        if what not in self._measured:
            probe = self._probe_recaption if step.kind == "recaption" else self._probe_evaluate
            self._measured[what] = probe(step)
        begin_s, seconds, bytes_each = self._measured[what]
        return begin_s + seconds * units, int(bytes_each * units), "probe"

    @property
    def total(self) -> int:
        """How many images there are."""
        record = self.state.records.get(SOURCE)
        return int(record["values"]["samples"]) if record is not None else self._images()[1]

    def _of_source(self, step: Step) -> tuple[float, int, str]:
        _, total, seconds, size = self._images()
        return (seconds * total, int(size * total), "probe") if "world" in step.settings else (0.0, 0, "")

    def _units(self, step: Step) -> float:
        if step.kind == "recaption":
            wanted = math.ceil(self.total * step.settings["fraction"])
            return min(wanted, step.settings.get("limit", wanted)) * len(step.settings["prompt"])
        if step.kind == "evaluate":
            return float(step.settings.get("scenes", 1))
        return sum(self._steps_of(step).values())

    def _family(self, step: Step) -> str:
        """Steps of one family take the same time a unit."""
        settings = {key: value for key, value in step.settings.items() if key not in _VARYING}
        if step.kind == "train":
            settings = self._training(step)
            for stage in settings["stage"]:
                stage.pop("steps", None)
                stage.pop("epochs", None)
            settings.pop("out", None)
        return digest_of([step.kind, settings])

    def _in_ledger(self, step: Step) -> float | None:
        """Seconds a unit of a complete step like this one."""
        for record in reversed(list(self.state.records.values())):
            other = record["settings"]
            if record["kind"] != step.kind or other.get("command") != step.settings.get("command"):
                continue
            if step.kind == "train":
                names = [stage["name"] for stage in step.settings["stage"]]
                if [stage["name"] for stage in other["stage"]] == names:
                    return float(record["seconds"]) / max(1, record["metrics"]["steps"])
            elif step.kind == "recaption":
                return float(record["seconds"]) / max(1, record["metrics"]["captions"])
            else:
                return float(record["seconds"]) / max(1.0, float(other.get("scenes", 1)))
        return None

    def _disk(self, step: Step, units: float) -> int:
        """Bytes of a step like complete ones, by what those hold."""
        for name, record in self.state.records.items():
            if record["kind"] == step.kind:
                size = folder_bytes(self.run / name)
                return size if step.kind == "train" else int(size / max(1, record.get("images", 1)) * units)
        return 0

    def _images(self) -> tuple[str, int, float, float]:
        """A folder with a few images, how many there will be, and seconds and bytes an image."""
        if self._source is None:
            source = self.recipe.source
            if source.world is None:
                self._source = str(source.path), len(open_source(str(source.path))), 0.0, 0.0
            else:
                from vila2.world.shards import shard_bytes

                plan = shard_plan(source.world.model_dump(mode="json"))
                count = min(PROBE_IMAGES, plan.scenes)
                shard_bytes(
                    replace(plan, scenes=2 * count), range(count, 2 * count)
                )  # the first ones fill caches
                started = time.monotonic()
                data = shard_bytes(replace(plan, scenes=count), range(count))
                seconds = time.monotonic() - started
                folder = self.folder / "images"
                folder.mkdir()
                (folder / "probe.tar").write_bytes(data)
                self._source = str(folder), plan.scenes, seconds / count, len(data) / count
        return self._source

    def _captions(self, long: bool) -> Path:
        """Captions of the probe's images, with as many words more as a new caption may have."""
        folder = self.folder / ("long" if long else "short")
        if not folder.exists():
            more = " picture" * self._new_words() if long else ""
            found = islice(original_records(open_source(self._images()[0])), PROBE_IMAGES)
            lines = [json.dumps({**record, "text": (record["text"] or "a") + more}) for record in found]
            folder.mkdir()
            (folder / CAPTIONS_FILE).write_text("\n".join(lines) + "\n")
        return folder

    def _new_words(self) -> int:
        return int(self.recipe.recaption.get("max_new_tokens", 256) * _WORDS_A_TOKEN)

    def _training(self, step: Step) -> dict[str, Any]:
        """A training on the probe's captions, on a model of the same shape."""
        long = not step.settings["stage"] or not any("/round-0/" in text for text in _paths(step.settings))
        values = place(step.free["recipe"], self.run)
        stages = []
        for stage in values["stage"]:
            data = []
            for entry in stage["data"]:
                own = entry.get("kind") == "recaption" and str(entry.get("path")).startswith(str(self.run))
                where = {"path": str(self._captions(long)), "image_root": self._images()[0]}
                filtered = {"path": self._boxes[entry["path"]]} if entry.get("path") in self._boxes else {}
                data.append({**entry, **where} if own else {**entry, **filtered})
            stages.append({**stage, "data": data, "eval": []})
        if str(values.get("base", "")).startswith(str(self.run)):
            values["base"] = self._model()
        return {**values, "stage": stages, "seed": 0, "out": str(self.folder / "train")}

    def _steps_of(self, step: Step) -> dict[str, int]:
        """Stage -> how many steps it takes on all images."""
        from vila2.train.recipe import Recipe
        from vila2.train.sources import open_mixture

        recipe = make_settings(Recipe, self._training(step), step.name)
        found = {}
        for stage in recipe.stage:
            if stage.steps is not None:
                found[stage.name] = stage.steps
                continue
            examples = open_mixture(stage.data).num_examples or 0
            of_probe = sum(entry.path in self._probe_paths() for entry in stage.data)
            here = sum(1 for _ in islice(original_records(open_source(self._images()[0])), PROBE_IMAGES))
            examples += of_probe * (self.total - here)
            assert stage.epochs is not None
            found[stage.name] = max(1, math.ceil(stage.epochs * examples / stage.batch_examples))
        return found

    def _probe_paths(self) -> tuple[str, ...]:
        return str(self.folder / "long"), str(self.folder / "short")

    def _probe_train(self, step: Step) -> tuple[float, dict[str, float], int]:
        from vila2.train.estimate import estimate as estimate_training
        from vila2.train.recipe import Recipe

        started = time.monotonic()
        found = estimate_training(make_settings(Recipe, self._training(step), step.name))
        stepping = sum((found.probed_steps + 1) * stage.step_s for stage in found.stages)
        begin_s = max(0.0, time.monotonic() - started - stepping)  # loading; saving takes about as long again
        kept = len(found.stages) * folder_bytes(Path(self._model()))
        self.passing_bytes = max(self.passing_bytes, found.disk_bytes - kept)
        return begin_s, {stage.name: stage.step_s for stage in found.stages}, kept

    def _probe_recaption(self, step: Step) -> tuple[float, float, float]:
        from vila2.recaption.estimate import estimate as estimate_captions

        context = replace(self.context, outcomes={SOURCE: {"samples": PROBE_IMAGES}})
        settings = {**step.settings, "source": self._images()[0], "model": self._model(), "fraction": 1.0}
        settings.pop("limit", None)
        small = replace(step, settings=settings)
        started = time.monotonic()
        found = estimate_captions(recaption_settings(small, context))
        begin_s = time.monotonic() - started - found.probe_s
        captions = max(1, found.pending_images * found.prompts)
        return begin_s, found.seconds / captions, found.disk_bytes / captions

    def _probe_evaluate(self, step: Step) -> tuple[float, float, float]:
        from vila2.evaluate import evaluate

        settings = {key: value for key, value in step.settings.items() if key != "checkpoint"}
        count = min(PROBE_SCENES, settings["scenes"])
        tasks = settings.pop("tasks")
        model = self._model()
        started = time.monotonic()
        found = evaluate(
            model,
            tasks,
            device=self.recipe.device,
            threads=self.recipe.threads,
            **{**settings, "scenes": count},
        )
        begin_s = time.monotonic() - started - found.seconds
        file = self.folder / "evaluation.json"
        found.save(file)
        return begin_s, found.seconds / count, file.stat().st_size / count

    def _model(self) -> str:
        """A checkpoint of the recipe's shape: one that is trained, its base, or one trained for a single step."""
        if self._checkpoint is None:
            trained = [name for name, record in self.state.records.items() if record["kind"] == "train"]
            if trained:
                names = [path.parent for path in (self.run / trained[-1]).glob("*/checkpoint/config.json")]
                self._checkpoint = str(max(names))
            else:
                self._checkpoint = self._base() or self._one_step()
        return self._checkpoint

    def _base(self) -> str | None:
        """The base of the recipe, or one of its shape while it is not made. UsageError if nothing makes one."""
        base = self.recipe.base
        if base is None:
            named: str | None = self.recipe.train.get("base")
            return named
        if BASE in self.state.records:
            return str(self.run / BASE / base.checkpoint)
        if base.probe is None:
            raise UsageError(f"the base is not made yet: do `--until {BASE}` first, or give base.probe")
        return str(make_base({**base.model_dump(), "command": base.probe}, self.folder / BASE, Interrupts()))

    def _one_step(self) -> str:
        from vila2.train.recipe import Recipe
        from vila2.train.trainer import Trainer

        data = [{"kind": "recaption", "path": str(self._captions(False)), "image_root": self._images()[0]}]
        stage: Mapping[str, Any] = {
            "name": "probe", "train": ["projector"], "steps": 1, "batch_examples": 1, "lr": 1e-6, "data": data,
        }  # fmt: skip
        out = self.folder / "model"
        values = {**self.recipe.train, **self.recipe.machine, "out": str(out), "stage": [stage]}
        summary = Trainer(make_settings(Recipe, values, "train")).run()
        shutil.rmtree(out / "cache", ignore_errors=True)
        assert summary.checkpoint is not None
        return summary.checkpoint


def folder_bytes(folder: Path) -> int:
    """The sizes of all files below, those that links lead to left out."""
    files = (file for file in folder.resolve().rglob("*") if file.is_file() and not file.is_symlink())
    return sum(file.stat().st_size for file in files)


_VARYING = ("checkpoint", "model", "scenes", "split", "round", "seed", "limit", "temperature", "prompt")


def _paths(values: Any) -> list[str]:
    """Every path of a data entry."""
    return [str(e["path"]) for stage in values["stage"] for e in stage["data"] if e.get("path")]
