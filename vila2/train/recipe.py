"""What a training run does, as a file that can be read aloud: the model's parts, then stage after stage.

A field marked `FREE` does not change what is learnt (how often to save, where to draw a plot): it may differ when a
run continues. All others are recorded in the run folder and must agree.
"""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vila2.config import load_recipe, make_settings, nearest
from vila2.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Part = Literal["vision", "projector", "decoder"]
PARTS: tuple[Part, ...] = ("vision", "projector", "decoder")
OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]
DataKind = Literal["world", "webdataset", "recaption", "llava", "text", "interleaved"]

FREE = "free"  # a marker in a field's metadata, see the module's docstring

# kind of data -> the keys that it knows besides kind, weight and limit
DATA_KEYS: dict[str, frozenset[str]] = {
    "world": frozenset({"split", "texts", "scenes", "start", "image_size", "seed", "style", "options"}),
    "webdataset": frozenset({"path", "prompt"}),
    "recaption": frozenset({"path", "image_root", "mode", "prompts"}),
    "llava": frozenset({"path", "image_root"}),
    "text": frozenset({"path"}),
    "interleaved": frozenset({"path", "image_root", "max_images"}),
}
_EVERY_KIND = frozenset({"kind", "weight", "limit"})


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class DataSettings(_Settings):
    """One source of examples. `weight` is its share of the mixture, `limit` takes only its first documents."""

    kind: DataKind
    weight: Annotated[float, Field(gt=0)] = 1.0
    limit: Annotated[int | None, Field(ge=1)] = None

    path: str | None = None
    image_root: str | None = None
    prompt: str | None = None
    prompts: tuple[str, ...] = ()
    mode: str | None = None
    max_images: Annotated[int, Field(ge=1)] = 6

    split: str = "pretrain"
    texts: tuple[str, ...] = ()
    scenes: Annotated[int | None, Field(ge=1)] = None
    start: Annotated[int, Field(ge=0)] = 0
    image_size: Annotated[int, Field(ge=8)] = 128
    seed: int = 0
    style: str = "fluent"
    options: dict[str, Any] = {}

    @field_validator("texts", "prompts", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "DataSettings":
        known = DATA_KEYS[self.kind] | _EVERY_KIND
        fields = type(self).model_fields
        given = {key for key in self.model_fields_set if getattr(self, key) != fields[key].default}
        for key in sorted(given - known):
            raise ValueError(f"{self.kind} data has no key {key!r}{nearest(key, sorted(known))}")
        if "path" in known and not self.path:
            raise ValueError(f"{self.kind} data needs a path")
        if self.kind == "world" and not self.texts:
            raise ValueError("world data needs texts: which texts of a scene to train on")
        return self


class VisionPart(_Settings):
    """A tower: `weights` (a VILA checkpoint, or a SigLIP or CLIP folder), or the shape of a fresh one."""

    weights: str | None = None
    kind: Literal["siglip", "clip"] = "siglip"
    image_size: Annotated[int, Field(ge=1)] = 384
    patch_size: Annotated[int, Field(ge=1)] = 14
    width: Annotated[int, Field(ge=1)] = 1152
    inner_width: Annotated[int | None, Field(ge=1)] = None  # None: four times the width
    num_layers: Annotated[int, Field(ge=1)] = 27
    num_heads: Annotated[int, Field(ge=1)] = 16
    select_layer: int | None = (
        None  # None: -2 of pretrained towers, as VILA takes it; the last of a fresh one
    )


class ProjectorPart(_Settings):
    """A projector: that of the VILA checkpoint `weights`, or a fresh one."""

    weights: str | None = None
    kind: str = "mlp_downsample"


class DecoderPart(_Settings):
    """A language model: `weights` (a VILA checkpoint, or a Llama or Qwen2 folder), or the shape of a fresh one."""

    weights: str | None = None
    vocab_size: Annotated[int | None, Field(ge=1)] = None  # None: what the tokenizer has
    hidden_size: Annotated[int, Field(ge=1)] = 4096
    intermediate_size: Annotated[int | None, Field(ge=1)] = None  # None: 8/3 of the width, in steps of 32
    num_layers: Annotated[int, Field(ge=1)] = 32
    num_heads: Annotated[int, Field(ge=1)] = 32
    num_kv_heads: Annotated[int | None, Field(ge=1)] = None  # None: one a head
    max_positions: Annotated[int, Field(ge=1)] = 4096
    rope_theta: float = 10000.0
    tie_embeddings: bool = False


class ModelSettings(_Settings):
    """A model put together from parts, each from a folder of its own or fresh."""

    vision: VisionPart
    projector: ProjectorPart = ProjectorPart()
    decoder: DecoderPart
    tokenizer: str | None = None  # None: the one beside the decoder's weights
    template: str = "auto"
    generation: Literal["vila1.5", "nvila"] = "nvila"
    image_mode: Literal["resize", "pad"] = "resize"

    @field_validator("vision", "projector", "decoder", mode="before")
    @classmethod
    def _a_path_is_weights(cls, value: Any) -> Any:
        """`vision = "siglip/"` means `vision = {weights = "siglip/"}`."""
        return {"weights": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> "ModelSettings":
        if self.decoder.weights is None and self.tokenizer is None:
            raise ValueError("a fresh decoder needs a tokenizer: the folder of one")
        return self


class Rates(_Settings):
    """A number for each part of the model."""

    vision: Annotated[float, Field(ge=0)] = 0.0
    projector: Annotated[float, Field(ge=0)] = 0.0
    decoder: Annotated[float, Field(ge=0)] = 0.0

    def of(self, part: Part) -> float:
        return float(getattr(self, part))


class Optimizers(_Settings):
    """An optimiser for each part of the model."""

    vision: OptimizerName = "adamw"
    projector: OptimizerName = "adamw"
    decoder: OptimizerName = "adamw"

    def of(self, part: Part) -> OptimizerName:
        chosen: OptimizerName = getattr(self, part)
        return chosen


class LoraSettings(_Settings):
    """Low-rank adapters on the linear layers of `parts`, whose own weights then stay as they are."""

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[int, Field(ge=1)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    parts: tuple[Part, ...] = ("decoder",)


class GuardSettings(_Settings):
    """When a run has diverged: the loss lies `deviations` robust deviations, and `margin`, above its recent median."""

    window: Annotated[int, Field(ge=8)] = 64
    deviations: Annotated[float, Field(ge=0)] = 12.0  # 0: spikes do not stop a run
    margin: Annotated[float, Field(ge=0)] = 1.0


class StageSettings(_Settings):
    """One stage: what trains, on what, how fast, how long."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    train: Annotated[tuple[Part, ...], Field(min_length=1)]
    from_: Annotated[Literal["previous", "base"], Field(alias="from")] = "previous"
    steps: Annotated[int | None, Field(ge=1)] = None
    epochs: Annotated[float | None, Field(gt=0)] = None

    batch_examples: Annotated[int, Field(ge=1)] = 32  # of one optimiser step, over all processes
    max_tokens: Annotated[int, Field(ge=16)] = 8192  # of a micro-batch, of one process
    max_example_tokens: Annotated[int | None, Field(ge=16)] = None  # None: as max_tokens; longer ones are cut
    template: str | None = None  # the chat template of this stage; None: the model's
    data: tuple[DataSettings, ...]

    lr: Rates
    optimizer: Optimizers = Optimizers()
    adamw_lr: Annotated[float | None, Field(gt=0)] = None  # of what muon leaves to it; None: as lr
    weight_decay: Rates = Rates()
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    schedule: Schedule = "cosine"
    warmup: Annotated[float, Field(ge=0)] = 0.03  # below 1 a share of the steps, from 1 on a number of steps
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2  # wsd: the share of the steps over which the rate falls
    min_lr: Annotated[float, Field(ge=0, le=1)] = 0.0  # where a schedule ends, as a share of lr
    clip: Annotated[float | None, Field(gt=0)] = 1.0
    lora: LoraSettings | None = None
    checkpoint_activations: Annotated[bool, FREE] = False

    eval: Annotated[tuple[DataSettings, ...], FREE] = ()
    eval_every: Annotated[int, FREE, Field(ge=1)] = 100
    eval_examples: Annotated[int, FREE, Field(ge=1)] = 256
    log_every: Annotated[int, FREE, Field(ge=1)] = 1
    save_every: Annotated[int | None, FREE, Field(ge=1)] = None  # steps
    save_minutes: Annotated[float, FREE, Field(gt=0)] = 10.0

    @field_validator("train", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("lr", "weight_decay", "optimizer", mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        """`lr = 1e-3` is the rate of every part."""
        return value if isinstance(value, dict | BaseModel) else dict.fromkeys(PARTS, value)

    @model_validator(mode="after")
    def _consistent(self) -> "StageSettings":
        if not self.data:
            raise ValueError(f"stage {self.name}: it has no data: add a [[stage.data]]")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"stage {self.name}: give steps or epochs, one of them")
        if len(set(self.train)) != len(self.train):
            raise ValueError(f"stage {self.name}: train names one part twice")
        idle = [part for part in self.train if self.lr.of(part) == 0]
        if idle:
            raise ValueError(f"stage {self.name}: trains {' and '.join(idle)} with lr 0")
        if self.lora is not None and not set(self.lora.parts) <= set(self.train):
            raise ValueError(f"stage {self.name}: lora.parts must be among train ({', '.join(self.train)})")
        return self


class Recipe(_Settings):
    """A whole run. Frozen: it never changes under a run."""

    base: str | None = None
    model: ModelSettings | None = None
    out: Annotated[str, FREE]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Literal["auto", "float32", "bf16"] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], FREE] = "auto"
    threads: Annotated[int | None, FREE, Field(ge=1)] = None  # None: the cores, shared among the processes
    tensorboard: Annotated[bool, FREE] = False
    measure_ceiling: Annotated[bool, FREE] = True  # half a second, for the share that progress shows
    image_cache_gb: Annotated[float, FREE, Field(ge=0)] = 4.0  # images cut once, in OUT/cache
    image_workers: Annotated[int, FREE, Field(ge=1)] = 1  # threads that load and cut images
    guard: Annotated[GuardSettings, FREE] = GuardSettings()
    stage: tuple[StageSettings, ...]

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if not self.out.strip():
            raise ValueError("out must not be empty")
        if not self.stage:
            raise ValueError("the recipe has no [[stage]]")
        if (self.base is None) == (self.model is None):
            raise ValueError("give base (a checkpoint) or [model] (its parts), one of them")
        names = [stage.name for stage in self.stage]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two stages are called {twice[0]!r}")
        return self

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values under the names that a recipe file uses."""
        return self.model_dump(mode="json", by_alias=True)

    def deciding(self) -> dict[str, Any]:
        """What decides the weights that come out: `to_json` without the FREE fields."""
        return _deciding(self)


def read_recipe(path: str | Path, overrides: Iterable[str] = (), out: str | None = None) -> Recipe:
    """The recipe in a TOML or YAML file with `key=value` overrides on top. UsageError says what is wrong where."""
    values = load_recipe(path)
    for text in overrides:
        override(values, text)
    if out is not None:
        values["out"] = out
    if "out" not in values:
        raise UsageError(f"{path}: missing out (the run folder): name it there or with --out")
    return make_settings(Recipe, values, str(path))


def differences(recorded: Any, wanted: Any, key: str = "") -> list[str]:
    """The dotted keys at which two JSON values differ, each with both values."""
    if isinstance(recorded, Mapping) and isinstance(wanted, Mapping):
        names = dict.fromkeys([*recorded, *wanted])
        parts = [(str(name), recorded.get(name), wanted.get(name)) for name in names]
    elif isinstance(recorded, list) and isinstance(wanted, list) and len(recorded) == len(wanted):
        parts = [(_label(a, i), a, b) for i, (a, b) in enumerate(zip(recorded, wanted, strict=True))]
    else:
        return [] if recorded == wanted else [f"{key} was {_short(recorded)}, is {_short(wanted)}"]
    return [line for name, a, b in parts for line in differences(a, b, f"{key}.{name}".lstrip("."))]


def _label(value: Any, index: int) -> str:
    return str(value["name"]) if isinstance(value, Mapping) and "name" in value else str(index)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _deciding(settings: BaseModel) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        if FREE not in field.metadata:
            found[field.alias or name] = _plain(getattr(settings, name))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return _deciding(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def override(values: dict[str, Any], text: str) -> None:
    """Set `stage.align.lr=1e-4` in the nested `values`; a list is reached by its items' names or numbers."""
    key, equals, written = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {text!r}: expected key=value, like stage.align.lr=1e-4")
    *path, last = key.strip().split(".")
    place: Any = values
    for name in path:
        place = place.setdefault(name, {}) if isinstance(place, dict) else _item(place, name, text)
    if not isinstance(place, dict):
        raise UsageError(f"--set {text!r}: {'.'.join(path)} holds no keys")
    place[last] = _value(written.strip())


def _item(items: Any, name: str, text: str) -> Any:
    if isinstance(items, list):
        for index, item in enumerate(items):
            if name == str(index) or (isinstance(item, dict) and item.get("name") == name):
                return item
        named = [str(item["name"]) for item in items if isinstance(item, dict) and "name" in item]
        raise UsageError(f"--set {text!r}: there is no {name!r}{nearest(name, named)}")
    raise UsageError(f"--set {text!r}: {name!r} lies in a value that holds no keys")


def _value(written: str) -> Any:
    """A TOML value, else the text as it stands."""
    try:
        return tomllib.loads(f"value = {written}")["value"]
    except tomllib.TOMLDecodeError:
        return written
