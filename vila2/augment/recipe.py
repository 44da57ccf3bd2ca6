"""What a loop does, as a file that can be read aloud: the images, the training, the rounds, the evaluation.

The training is a recipe of `vila2-fast train` in which one data entry, `kind = "captions"`, stands for the captions of
the round: the original ones in round 0, then what the model of the round before wrote.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vila2.augment.step import RUN
from vila2.config import RecaptionSettings, load_recipe, make_settings, nearest
from vila2.errors import UsageError
from vila2.train.recipe import Recipe, StageSettings, override

BASE = "base"  # the step that makes the base
CAPTIONS = "captions"  # the kind of the data entry that a round fills
OWN_KEYS = (
    "source",
    "model",
    "out",
    "round",
    "prompt",
    "prompt_text",
    "limit",
    "rank",
    "world_size",
    "draft",
)
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Share = Annotated[float, Field(ge=0, le=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WorldSource(_Settings):
    """Scenes to be drawn into tars: what `vila2-fast world make` writes. `options`: rates of the world."""

    scenes: Annotated[int, Field(ge=1)]
    split: str = "pretrain"
    seed: Annotated[int, Field(ge=0)] = 0
    style: str = "fluent"
    image_size: Annotated[int, Field(ge=16)] = 128
    format: Literal["jpg", "png"] = "jpg"
    shard_size: Annotated[int, Field(ge=1)] = 1000
    options: dict[str, Any] = {}


class SourceSettings(_Settings):
    """The images whose captions are augmented: `path` (tars, a folder, Parquet), or a `world` to be drawn."""

    path: str | None = None
    world: WorldSource | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "SourceSettings":
        if (self.path is None) == (self.world is None):
            raise ValueError("give path (images that are there) or world (scenes to draw), one of them")
        return self


class Base(_Settings):
    """A command that makes what every training starts from, once for all seeds: `checkpoint` below {folder}.

    It goes on where it was if it is run again. `probe`: a command that makes one of the same shape in seconds, for
    the estimate. `minutes`: what the whole took its author.
    """

    command: str
    checkpoint: str = "base"
    probe: str | None = None
    minutes: Annotated[float, Field(ge=0)] = 0.0


class RoundSettings(_Settings):
    """How often the set is recaptioned, and how new captions join the originals."""

    max: Annotated[int, Field(ge=0)] = 3
    min: Annotated[int, Field(ge=0)] = 1  # rounds before saturation may stop the loop
    merge: Literal["concat", "replace"] = "concat"
    prompt: tuple[str, ...] = ("detailed",)  # several wordings of one prompt: one is drawn for each image
    fraction: Annotated[float, Field(gt=0, le=1)] = (
        1.0  # of the images, from the start of each process's share; the rest keep theirs
    )
    draft: bool = True  # from round 2 on the captions of the round before are tried as drafts

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class Saturation(_Settings):
    """A round has gained if `need` of these metrics moved the right way by more than their interval. The first metric
    also says which round is the best one."""

    metrics: Annotated[tuple[str, ...], Field(min_length=1)] = ("objects.f1",)
    need: Literal["any", "all"] = "any"


class Gates(_Settings):
    """What captions must be like before anything is trained on them; None: not asked.

    Rates are shares of captions, `hallucination` of mentions (where the truth is known) or of content words that a
    second, sampled caption of the same image does not have (where it is not).
    """

    hallucination: Share | None = None
    hallucination_rise: Share | None = 0.1  # against the round before
    repetitive: Share | None = 0.05
    truncated: Share | None = 0.1
    errors: Share | None = 0.05
    longer: Annotated[float, Field(gt=1)] | None = 2.0  # words, against the round before
    shorter: Annotated[float, Field(gt=0, lt=1)] | None = 0.5
    diversity_drop: Share | None = 0.4  # of distinct word pairs, against the round before
    agreement: Share | None = 0.2  # content words shared with the round before, as an F1, at least
    probe: Annotated[int, Field(ge=1)] = 1000  # captions that are compared word by word
    examples: Annotated[int, Field(ge=1)] = 5

    @property
    def asks_hallucination(self) -> bool:
        return self.hallucination is not None or self.hallucination_rise is not None


class Controls(_Settings):
    """Runs on the original captions alone: `steps` trains the captions' stage as much longer as the best round had
    rounds, `length` appends unrelated originals up to the length of the best round's captions."""

    kinds: tuple[Literal["steps", "length"], ...] = ("steps",)


class Oracle(_Settings):
    """A run on true captions, the ceiling. `captions`: `truth` (of a world), or a file of keys and captions.

    With `min_gap` the loop goes on only if the oracle beats round 0 by that much on `metric`: if true captions do not
    help, no recaptioning can.
    """

    captions: str = "truth"
    min_gap: Annotated[float, Field(ge=0)] | None = None
    metric: str = "objects.f1"


class BoxFilter(_Settings):
    """Which records of a LLaVA file with boxes are trained on (VILA² appendix A.2). A data entry reads what is left of
    them by `path = "boxes:NAME"`."""

    name: Name
    path: str
    max_area: Share = 0.7
    max_same: Annotated[int, Field(ge=1)] = 3


class Specialist(_Settings):
    """A model for one kind of question: the best round's pretrained checkpoint, trained on data of its own, asked
    `prompt` about every image. `must_beat`: metrics on which it has to be better than the generalist first."""

    name: Name
    prompt: Annotated[tuple[str, ...], Field(min_length=1)]
    stage: Annotated[tuple[StageSettings, ...], Field(min_length=1)]
    must_beat: tuple[str, ...] = ()
    filter: tuple[BoxFilter, ...] = ()

    @field_validator("prompt", "must_beat", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class Generalist(_Settings):
    """The model that is retrained with the specialists' answers as questions and answers after a caption."""

    onto: Literal["original", "round"] = "original"  # which caption the turns follow
    each: bool = False  # also one model for each specialist alone


class Scenes(_Settings):
    split: str
    scenes: Annotated[int, Field(ge=1)]


class Evaluate(_Settings):
    """How a model is measured: on the world, or by a `command` that is given {checkpoint} and writes {out}.

    `dev` decides (saturation, the best round, the oracle's gap); `test` is asked once, at the end.
    """

    tasks: tuple[str, ...] = ("all",)
    dev: Scenes = Scenes(split="dev", scenes=500)
    test: Scenes | None = Scenes(split="heldout", scenes=1000)
    style: str = "fluent"
    themes: tuple[str, ...] = ()  # those of the source's world, if it has any
    sign_words: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    limit: Annotated[int, Field(ge=1)] | None = None
    precision: str = "bf16"
    max_new_tokens: Annotated[int, Field(ge=1)] = 192
    command: str | None = None
    test_command: str | None = None


class Launcher(_Settings):
    """The command that a kind of step is started with, instead of this process.

    `{arguments}` stands for those of `vila2-fast`; {name}, {folder}, {rank}, {processes} and {python} may be used.
    Words are split as a shell would split them; no shell runs.
    """

    command: str
    processes: Annotated[int, Field(ge=1)] = 1  # recaption: so many at once, each with its rank

    @model_validator(mode="after")
    def _takes_arguments(self) -> "Launcher":
        if "{arguments}" not in self.command:
            raise ValueError("command must hold {arguments}, the place of vila2-fast's own")
        return self


class Launch(_Settings):
    """Which steps run elsewhere."""

    train: Launcher | None = None
    recaption: Launcher | None = None
    evaluate: Launcher | None = None


class Cost(_Settings):
    """Prices, for the ledger and the estimate. `gpus`: those of a step that a launcher starts."""

    cpu_hour: Annotated[float, Field(ge=0)] = 0.0
    gpu_hour: Annotated[float, Field(ge=0)] = 0.0
    currency: str = "USD"
    gpus: Annotated[int, Field(ge=1)] = 1


class LoopRecipe(_Settings):
    """A whole loop. Frozen: it never changes under a run."""

    out: str
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=1)] | None = None
    source: SourceSettings
    base: Base | None = None
    train: dict[str, Any]
    recaption: dict[str, Any] = {}
    rounds: RoundSettings = RoundSettings()
    saturation: Saturation = Saturation()
    gates: Gates = Gates()
    control: Controls = Controls()
    oracle: Oracle | None = None
    specialist: tuple[Specialist, ...] = ()
    generalist: Generalist = Generalist()
    evaluate: Evaluate = Evaluate()
    launch: Launch = Launch()
    cost: Cost = Cost()

    @field_validator("train", mode="before")
    @classmethod
    def _a_path_is_a_file(cls, value: Any) -> Any:
        """`train = "train.toml"` means the recipe in that file."""
        try:
            return load_recipe(value) if isinstance(value, str) else value
        except UsageError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _consistent(self) -> "LoopRecipe":
        if not self.out.strip():
            raise ValueError("out must not be empty")
        if len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError("seeds must be different numbers of 0 or more")
        if self.rounds.min > self.rounds.max:
            raise ValueError(f"rounds.min {self.rounds.min} must not exceed rounds.max {self.rounds.max}")
        names = [specialist.name for specialist in self.specialist]
        if len(set(names)) != len(names):
            raise ValueError("two specialists have the same name")
        if names and self.rounds.max == 0:
            raise ValueError("specialists start from a round's model: rounds.max must be at least 1")
        for key in self.recaption:
            if key in OWN_KEYS:
                raise ValueError(f"recaption.{key}: the loop sets it itself")
        if self.base is not None and ("base" in self.train or "model" in self.train):
            raise ValueError(
                "base: its command makes what train.base or train.model would name; give one of them"
            )
        if self.oracle is not None and self.oracle.captions == "truth" and self.source.world is None:
            raise ValueError("oracle.captions: the truth is known of a world only; name a file of captions")
        if self.evaluate.command is None and self.evaluate.test_command is not None:
            raise ValueError("evaluate.test_command goes with evaluate.command")
        return self

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the training's stages."""
        return tuple(str(stage["name"]) for stage in self.train["stage"])

    @property
    def captions_stage(self) -> int:
        """The first stage that trains on the round's captions: the pretraining."""
        return next(i for i, stage in enumerate(self.train["stage"]) if _takes_captions(stage))

    def train_recipe(self, captions: str, source: str, seed: int, out: str) -> dict[str, Any]:
        """The values of the training on the captions in the folder `captions`, of the images of `source`."""
        filled = {"kind": "recaption", "path": captions, "image_root": source}
        stages = []
        for stage in self.train["stage"]:
            data = [
                {**entry, **filled} if entry.get("kind") == CAPTIONS else entry for entry in stage["data"]
            ]
            stages.append({**stage, "data": data})
        base = {} if self.base is None else {"base": f"{RUN}/{BASE}/{self.base.checkpoint}"}
        return {**self.train, **base, **self.machine, "seed": seed, "out": out, "stage": stages}

    @property
    def machine(self) -> dict[str, Any]:
        """What says where training runs, not what is learnt."""
        values: dict[str, Any] = {"device": self.device, "measure_ceiling": False}
        return values if self.threads is None else {**values, "threads": self.threads}

    def recaption_settings(self, source: str, model: str, out: str, **more: Any) -> RecaptionSettings:
        """The settings of a recaption of the images of `source`. On a CPU captions do not depend on their batch."""
        values: dict[str, Any] = {"device": self.device, "threads": self.threads, **self.recaption}
        return make_settings(
            RecaptionSettings, {**values, **more, "source": source, "model": model, "out": out}, "recaption"
        )


def read_loop_recipe(path: str | Path, overrides: Iterable[str] = (), out: str | None = None) -> LoopRecipe:
    """The recipe in a TOML or YAML file with `key=value` overrides on top. UsageError says what is wrong where."""
    values = load_recipe(path)
    for text in overrides:
        override(values, text)
    if out is not None:
        values["out"] = out
    if "out" not in values:
        raise UsageError(f"{path}: missing out (the run folder): name it there or with --out")
    recipe = make_settings(LoopRecipe, values, str(path))
    _check_parts(recipe, str(path))
    return recipe


def _check_parts(recipe: LoopRecipe, where: str) -> None:
    """What the settings of other commands say of their parts, before anything runs."""
    stages = recipe.train.get("stage")
    if not isinstance(stages, list) or not all(isinstance(s, Mapping) and "data" in s for s in stages):
        raise UsageError(f"{where}: train: it needs [[train.stage]]s, each with [[train.stage.data]]")
    if not any(_takes_captions(stage) for stage in stages):
        raise UsageError(
            f'{where}: train: no data entry has kind = "{CAPTIONS}", the place of the round\'s captions'
        )
    make_settings(Recipe, recipe.train_recipe("captions", "source", 0, "out"), f"{where}: train")
    recipe.recaption_settings("source", "model", "out")
    if recipe.evaluate.command is None:
        _check_metrics(recipe, where)


def _check_metrics(recipe: LoopRecipe, where: str) -> None:
    """The metrics that decide must be measured: better known now than after the training."""
    from vila2.evaluate.tasks import METRICS, expand_tasks

    tasks = set(expand_tasks(recipe.evaluate.tasks))
    known = [metric.name for metric in METRICS if tasks & set(metric.tasks)]
    asked = {"saturation.metrics": recipe.saturation.metrics}
    if recipe.oracle is not None:
        asked["oracle.metric"] = (recipe.oracle.metric,)
    for specialist in recipe.specialist:
        asked[f"specialist {specialist.name}: must_beat"] = specialist.must_beat
    for key, names in asked.items():
        for name in names:
            if name not in known:
                tasks_hint = f"the evaluation's tasks give no metric {name!r}{nearest(name, known)}"
                raise UsageError(f"{where}: {key}: {tasks_hint}")


def _takes_captions(stage: Mapping[str, Any]) -> bool:
    return any(isinstance(entry, Mapping) and entry.get("kind") == CAPTIONS for entry in stage["data"])
