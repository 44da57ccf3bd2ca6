"""The plan: a recipe, and what has been decided so far, to the list of steps. Pure: it touches no file.

Before anything is decided it holds every round that there may be. As soon as a round's gain is known (`decided`), the
rounds after saturation are gone from it, and what follows refers to the best round.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila2.augment.encodes import asked_together, why_alone
from vila2.augment.recipe import BASE, LoopRecipe, Scenes, Specialist
from vila2.augment.step import RUN, Kind, Step
from vila2.config import DECIDES, RecaptionSettings
from vila2.errors import UsageError
from vila2.train.recipe import FREE, Recipe, StageSettings

Decided = Mapping[str, Mapping[str, Any]]  # step -> what its outcome says
SOURCE = "source"
TOGETHER = "specialists"  # the folder of what specialists that see alike are asked about an image at once
_ASKED = {"prompt_file", "prompt_template", "image_root"}
PROBE_TEMPERATURE = 0.7  # of the second caption by which made-up words show


@dataclass(frozen=True, slots=True)
class Rounds:
    """The rounds of one seed as far as they are known. `best` and `last` are open until a gain is measured."""

    last: int
    best: int
    is_final: bool


def plan(recipe: LoopRecipe, decided: Decided | None = None) -> list[Step]:
    """Every step, each after what it needs."""
    steps = [_source(recipe)]
    if recipe.base is not None:
        settings = recipe.base.model_dump(mode="json", include={"command", "checkpoint"})
        steps.append(Step(BASE, "base", settings, why="what every round starts from"))
    for seed in recipe.seeds:
        steps += _Seed(recipe, seed, decided or {}).steps()
    return steps


def rounds_of(recipe: LoopRecipe, seed: int, decided: Decided) -> Rounds:
    """How many rounds there are and which is the best, by the gains measured so far."""
    best, last = 0, 0
    for number in range(1, recipe.rounds.max + 1):
        gain = decided.get(f"seed-{seed}/round-{number}/gain")
        if gain is None:
            return Rounds(recipe.rounds.max, recipe.rounds.max, False)
        last, best = number, int(gain["best"])
        if gain["saturated"]:
            break
    return Rounds(last, best, True)


def find_step(steps: Sequence[Step], text: str, option: str) -> list[str]:
    """The names that `text` means: a step, or all steps below a folder, of every seed. UsageError if there is none."""
    text = text.strip("/")
    found = [
        step.name
        for step in steps
        for name in (step.name, step.name.partition("/")[2])
        if name == text or name.startswith(f"{text}/")
    ]
    if not found:
        known = dict.fromkeys(step.name.partition("/")[2] or step.name for step in steps)
        raise UsageError(f"{option} {text!r}: there is no such step; there are {', '.join(known)}")
    return list(dict.fromkeys(found))


def dependants(steps: Sequence[Step], names: Sequence[str]) -> list[str]:
    """`names` and every step that waits for one of them, however indirectly, in the plan's order."""
    found = set(names)
    for step in steps:
        if found.intersection(step.waits_for):
            found.add(step.name)
    return [step.name for step in steps if step.name in found]


def ancestors(steps: Sequence[Step], names: Sequence[str]) -> set[str]:
    """`names` and every step that one of them waits for, however indirectly."""
    found = set(names)
    for step in reversed(steps):
        if step.name in found:
            found.update(step.waits_for)
    return found


def _source(recipe: LoopRecipe) -> Step:
    source = recipe.source
    if source.world is not None:
        return Step(
            SOURCE, "source", {"world": source.world.model_dump(mode="json")}, why="scenes to caption"
        )
    return Step(SOURCE, "source", {"path": source.path}, why="the images to caption")


class _Seed:
    """The steps of one seed."""

    def __init__(self, recipe: LoopRecipe, seed: int, decided: Decided) -> None:
        self.recipe, self.seed = recipe, seed
        self.rounds = rounds_of(recipe, seed, decided)
        self.found: list[Step] = []
        self.images = f"{RUN}/{SOURCE}" if recipe.source.world is not None else str(recipe.source.path)
        self.has_truth = recipe.source.world is not None
        self.before_rounds: tuple[str, ...] = ()
        self.after_rounds = (f"round-{self.rounds.last}/gain",)  # which say what the best round is

    def steps(self) -> list[Step]:
        recipe = self.recipe
        self._captions("round-0/captions", {"mode": "original"}, (), "the original captions, for round 0")
        self._model("round-0", "VILA_0, on the original captions")
        if recipe.oracle is not None:
            self._oracle()
        for number in range(1, self.rounds.last + 1):
            self._round(number)
        if self.rounds.last:
            self._controls()
        if recipe.specialist:
            self._specialists()
        evaluate = recipe.evaluate
        if evaluate.test_command if evaluate.command is not None else evaluate.test:
            for name in self._models():
                self._evaluate(
                    f"test/{name}", f"{name}/train", recipe.evaluate.test, "on scenes nobody chose by"
                )
        return self.found

    def _add(
        self,
        name: str,
        kind: Kind,
        settings: dict[str, Any],
        needs: Sequence[str],
        why: str,
        free: dict[str, Any] | None = None,
        after: Sequence[str] = (),
    ) -> None:
        own, through = (
            tuple(other if other in (SOURCE, BASE) else f"{self.base}/{other}" for other in others)
            for others in (needs, after)
        )
        self.found.append(Step(f"{self.base}/{name}", kind, settings, own, through, free or {}, why))

    @property
    def base(self) -> str:
        return f"seed-{self.seed}"

    def _path(self, name: str) -> str:
        return f"{RUN}/{self.base}/{name}"

    def _models(self) -> list[str]:
        """The steps' folders that hold a model to be judged at the end."""
        names = [step.name.removeprefix(f"{self.base}/") for step in self.found if step.kind == "train"]
        folders = [name.removesuffix("/train") for name in names]
        return [name for name in folders if not name.startswith("specialist-")]

    def _round(self, number: int) -> None:
        name, before = f"round-{number}", f"round-{number - 1}"
        rounds = self.recipe.rounds
        drafts = number > 1 and rounds.draft
        self._recaption(
            name,
            model=f"{before}/train",
            prompts=rounds.prompt,
            number=number,
            draft=f"{before}/recaption" if drafts else None,
            after=[f"{before}/gain"] if number > 1 else self.before_rounds,
        )
        self._gate(name, f"{before}/recaption" if number > 1 else None)
        settings = {"mode": "new", "merge": rounds.merge, "outputs": [self._path(f"{name}/recaption")]}
        needs = ("round-0/captions", f"{name}/recaption")
        why = f"originals and round {number}'s, {rounds.merge}"
        self._captions(f"{name}/captions", settings, needs, why, [f"{name}/gate"])
        self._model(name, f"VILA_{number}, from the base weights again")
        self._gain(number)

    def _recaption(
        self,
        name: str,
        model: str,
        prompts: Sequence[str],
        number: int,
        draft: str | None = None,
        after: Sequence[str] = (),
        models: Mapping[str, str] | None = None,
        note: str = "",
    ) -> None:
        settings: dict[str, Any] = {
            "source": self.images,
            "model": self._checkpoint(model, -1),
            "prompt": list(prompts),
            "round": number,
            "seed": self.seed,
            "fraction": self.recipe.rounds.fraction,
            "settings": captioning_that_decides(self.recipe.recaption),
        }
        needs = [SOURCE, *dict.fromkeys([model, *(models or {}).values()])]
        if models is not None:
            settings["models"] = {prompt: self._checkpoint(name, -1) for prompt, name in models.items()}
        free: dict[str, Any] = {"settings": self.recipe.recaption}
        # Drafts make it faster and change no caption.
        drafts = {} if draft is None else {"draft": self._path(draft)}
        why = f"{', '.join(prompts)} of every image{note}"
        self._add(f"{name}/recaption", "recaption", settings, needs, why, free | drafts, after)
        if not self.has_truth and self.recipe.gates.asks_hallucination:
            probe = {**settings, "temperature": PROBE_TEMPERATURE, "limit": self.recipe.gates.probe}
            self._add(f"{name}/again", "recaption", probe, needs, "sampled, to see what is made up", free)

    def _gate(self, name: str, before: str | None) -> None:
        settings: dict[str, Any] = {
            "limits": self.recipe.gates.model_dump(mode="json"),
            "captions": self._path(f"{name}/recaption"),
            "before": None if before is None else self._path(before),
            "truth": self.images if self.has_truth else None,
            "again": None,
        }
        needs = [f"{name}/recaption"]
        if before is not None:
            needs += [before, before.replace("/recaption", "/gate")]
        if any(step.name == f"{self.base}/{name}/again" for step in self.found):
            settings["again"] = self._path(f"{name}/again")
            needs.append(f"{name}/again")
        self._add(f"{name}/gate", "gate", settings, needs, "are these captions fit to train on?")

    def _captions(
        self, name: str, settings: dict[str, Any], needs: Sequence[str], why: str, after: Sequence[str] = ()
    ) -> None:
        """A file of what is trained on: one line for each image of the source."""
        if needs:
            settings = {**settings, "originals": self._path("round-0/captions")}
        else:
            settings, needs = {**settings, "source": self.images}, (SOURCE,)
        self._add(name, "captions", settings, needs, why, after=after)

    def _model(
        self,
        name: str,
        why: str,
        captions: str | None = None,
        longer: int = 1,
        after: Sequence[str] = (),
    ) -> None:
        """Train on the captions of `name`, then measure."""
        captions = captions or f"{name}/captions"
        recipe = self.recipe.train_recipe(
            self._path(captions), self.images, self.seed, self._path(f"{name}/train")
        )
        if longer > 1:
            stage = recipe["stage"][self.recipe.captions_stage]
            stage |= {key: stage[key] * longer for key in ("steps", "epochs") if stage.get(key) is not None}
        base = () if self.recipe.base is None else (BASE,)
        self._train(f"{name}/train", recipe, (SOURCE, *base, captions), why, after)
        self._evaluate(f"{name}/evaluate", f"{name}/train", self.recipe.evaluate.dev, "on the dev split")

    def _train(
        self, name: str, recipe: dict[str, Any], needs: Sequence[str], why: str, after: Sequence[str] = ()
    ) -> None:
        self._add(name, "train", training_that_decides(recipe), needs, why, {"recipe": recipe}, after)

    def _evaluate(self, name: str, model: str, scenes: Scenes | None, why: str) -> None:
        evaluate = self.recipe.evaluate
        test = name.startswith("test/")
        settings: dict[str, Any] = {"checkpoint": self._checkpoint(model, -1)}
        if evaluate.command is not None:
            settings["command"] = (evaluate.test_command if test else None) or evaluate.command
        else:
            assert scenes is not None
            settings |= evaluate.model_dump(
                mode="json", exclude={"dev", "test", "command", "test_command"}
            ) | scenes.model_dump(mode="json")
        self._add(name, "evaluate", settings, (model,), why)

    def _gain(self, number: int) -> None:
        names = [f"round-{k}/evaluate" for k in range(number + 1)]
        rounds = self.recipe.rounds
        settings = {
            "evaluations": [self._path(name) for name in names],
            "can_stop": number >= rounds.min,
            "is_last": number == rounds.max,
            **self.recipe.saturation.model_dump(mode="json"),
        }
        self._add(f"round-{number}/gain", "gain", settings, names, "did this round gain anything?")

    def _oracle(self) -> None:
        oracle = self.recipe.oracle
        assert oracle is not None
        truth = self.images if oracle.captions == "truth" else oracle.captions
        settings = {"mode": "truth", "merge": self.recipe.rounds.merge, "truth": truth}
        self._captions("oracle/captions", settings, ("round-0/captions",), "true captions")
        self._model("oracle", "the ceiling: trained on true captions")
        if oracle.min_gap is not None:
            self._compare("oracle/gap", "round-0", "oracle", (oracle.metric,), oracle.min_gap)
            self.before_rounds = ("oracle/gap",)

    def _compare(
        self, name: str, before: str, after: str, metrics: Sequence[str], margin: float | None
    ) -> None:
        settings = {
            "before": self._path(f"{before}/evaluate"),
            "after": self._path(f"{after}/evaluate"),
            "metrics": list(metrics),
            "margin": margin,
        }
        self._add(
            name,
            "compare",
            settings,
            (f"{before}/evaluate", f"{after}/evaluate"),
            f"{after} against {before}",
        )

    def _controls(self) -> None:
        best = self.rounds.best
        if "steps" in self.recipe.control.kinds:
            why = f"original captions, {1 + best} times the steps of {self._stage()}"
            self._model("control-steps", why, "round-0/captions", 1 + best, self.after_rounds)
        if "length" in self.recipe.control.kinds and best:
            settings = {"mode": "unrelated", "like": self._path(f"round-{best}/captions"), "seed": self.seed}
            needs = ("round-0/captions", f"round-{best}/captions")
            why = "originals made as long by unrelated ones"
            self._captions("control-length/captions", settings, needs, why, self.after_rounds)
            self._model("control-length", "as long captions that say nothing more")

    def _stage(self) -> str:
        return self.recipe.stages[self.recipe.captions_stage]

    def _specialists(self) -> None:
        best = f"round-{max(self.rounds.best, 1)}"
        for specialist in self.recipe.specialist:
            self._specialist(specialist, best)
        generalist = self.recipe.generalist
        together = self._ask_together()
        groups = {"vila2": list(self.recipe.specialist)}
        if generalist.each and len(self.recipe.specialist) > 1:
            groups = {f"vila2-{s.name}": [s] for s in self.recipe.specialist} | groups
        for name, members in groups.items():
            asked = list(
                dict.fromkeys(TOGETHER if s in together else f"specialist-{s.name}" for s in members)
            )
            settings: dict[str, Any] = {
                "mode": "turns",
                "outputs": [self._path(f"{where}/recaption") for where in asked],
                "prompts": [prompt for s in members for prompt in s.prompt],
            }
            needs = ["round-0/captions", *(f"{where}/recaption" for where in asked)]
            if generalist.onto == "round":
                settings["onto"] = self._path(f"{best}/captions")
                needs.append(f"{best}/captions")
            who = ", ".join(s.name for s in members)
            why = f"answers of {who} as questions and answers"
            self._captions(f"{name}/captions", settings, needs, why, [f"{where}/gate" for where in asked])
            self._model(name, f"the generalist with the answers of {who}")

    def _specialist(self, specialist: Specialist, best: str) -> None:
        name = f"specialist-{specialist.name}"
        needs = [f"{best}/train"]
        stages = [
            stage.model_dump(mode="json", by_alias=True, exclude_unset=True) for stage in specialist.stage
        ]
        for boxes in specialist.filter:
            self._add(
                f"{name}/data-{boxes.name}", "boxes", boxes.model_dump(mode="json", exclude={"name"}), (),
                "records with boxes worth learning from",
            )  # fmt: skip
            needs.append(f"{name}/data-{boxes.name}")
            found = self._path(f"{name}/data-{boxes.name}/boxes.jsonl")
            _point_to(stages, f"boxes:{boxes.name}", found, str(Path(boxes.path).parent))
        recipe = {
            **{
                key: value
                for key, value in self.recipe.train.items()
                if key not in ("model", "base", "stage")
            },
            **self.recipe.machine,
            "base": self._checkpoint(f"{best}/train", self.recipe.captions_stage),
            "seed": self.seed,
            "out": self._path(f"{name}/train"),
            "stage": stages,
        }
        why = f"{best} after {self._stage()}, on its own data"
        self._train(f"{name}/train", recipe, needs, why, self.after_rounds)
        self._evaluate(f"{name}/evaluate", f"{name}/train", self.recipe.evaluate.dev, "at its own task")
        checked: list[str] = []
        if specialist.must_beat:
            self._compare(f"{name}/check", best, name, specialist.must_beat, None)
            checked.append(f"{name}/check")
        if specialist not in asked_together(self.recipe):
            number = self.rounds.last + 1
            alone = why_alone(self.recipe, specialist)
            note = f", an encode of its own: {alone}" if alone else ""
            self._recaption(name, f"{name}/train", specialist.prompt, number, after=checked, note=note)
            self._gate(name, None)

    def _ask_together(self) -> tuple[Specialist, ...]:
        """The specialists that share an encode, asked in one step."""
        members = asked_together(self.recipe)
        if not members:
            return ()
        models = {prompt: f"specialist-{s.name}/train" for s in members for prompt in s.prompt}
        checked = [f"specialist-{s.name}/check" for s in members if s.must_beat]
        number = self.rounds.last + 1
        note = f", one encode for all {len(members)} specialists"
        first = next(iter(models.values()))
        self._recaption(TOGETHER, first, list(models), number, after=checked, models=models, note=note)
        self._gate(TOGETHER, None)
        return members

    def _checkpoint(self, model: str, stage: int) -> str:
        """The checkpoint of a training after one of its stages."""
        names = self._stages_of(model)
        index = range(len(names))[stage]
        return self._path(f"{model}/{index + 1:02d}-{names[index]}/checkpoint")

    def _stages_of(self, model: str) -> tuple[str, ...]:
        for specialist in self.recipe.specialist:
            if model == f"specialist-{specialist.name}/train":
                return tuple(stage.name for stage in specialist.stage)
        return self.recipe.stages


def training_that_decides(values: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings of a training without those that do not change what is learnt."""
    kept = {key: value for key, value in values.items() if key not in _free_of(Recipe)}
    free = _free_of(StageSettings)
    stages = [{key: value for key, value in stage.items() if key not in free} for stage in values["stage"]]
    return {**kept, "stage": stages}


def captioning_that_decides(values: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings of a recaption that change what a caption says."""
    fields = RecaptionSettings.model_fields
    deciding = {name for name, field in fields.items() if DECIDES in field.metadata} | _ASKED
    return {key: value for key, value in values.items() if key in deciding}


def _free_of(kind: type[Recipe] | type[StageSettings]) -> set[str]:
    return {field.alias or name for name, field in kind.model_fields.items() if FREE in field.metadata}


def _point_to(stages: list[dict[str, Any]], name: str, path: str, images: str) -> None:
    """Replace the path `name` of data entries by `path`; their images stay where the original file has them."""
    for stage in stages:
        for entry in [*stage["data"], *stage.get("eval", [])]:
            if entry.get("path") == name:
                entry["path"] = path
                entry.setdefault("image_root", images)
