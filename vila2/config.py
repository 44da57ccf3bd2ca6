"""Validated settings of a run: every key of a recipe file, which is every option of the command line.

A field marked `DECIDES` decides what a caption says: it is recorded in the output's manifest, and a second run
into the same folder must agree on it. The others (batch size, threads, rank, limit, ...) may change between runs.
"""

import difflib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vila2.errors import UsageError
from vila2.types import RepetitionRule, SamplingParams

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bf16", "int8", "fp8", "int4"]
Truncation = Literal["trim", "mark"]
Orientation = Literal["apply", "ignore"]
Resize = Literal["exact", "fast"]
Decoder = Literal["auto", "dali", "cpu"]

# What each backend runs today; anything else is refused before a checkpoint is read.
BACKEND_PRECISIONS: dict[str, tuple[str, ...]] = {
    "native": ("float32", "bf16", "int8", "fp8", "int4"),
    "http": (),
    "trtllm": ("bf16", "fp8", "int4"),
}
_SERVER = ("base_url", "api_key_env", "patience", "send_format", "send_size")
_ENGINE = ("engine", "engine_option")
# Settings that mean nothing to a backend: refused if they are given, and no part of what decides its captions.
FOREIGN: dict[str, tuple[str, ...]] = {
    "native": ("request_timeout", *_SERVER, *_ENGINE),
    "http": (
        "device",
        "devices",
        "precision",
        "template",
        "deterministic",
        "resize",
        "threads",
        "gpu_memory",
        *_ENGINE,
    ),
    "trtllm": ("device", "deterministic", "threads", "gpu_memory", *_SERVER),
}

DEFAULT_MODEL = "nano"  # ships with the package

DRAFT_COLUMN = "column:"

DECIDES = "decides"  # a marker in a field's metadata, see the module's docstring


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Retry(_Settings):
    """One more attempt at a caption that looped or came out empty, with sampling of its own."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95


class Repetition(_Settings):
    """When a caption counts as a loop (see `vila2.types.RepetitionRule`)."""

    max_period: Annotated[int, Field(ge=1)] = 48
    min_repeats: Annotated[int, Field(ge=2)] = 4
    min_tokens: Annotated[int, Field(ge=1)] = 24


class RecaptionSettings(_Settings):
    """What `vila2-fast recaption` does. Frozen: a run's settings never change under it."""

    # What is read, by what, into where. The manifest identifies source and model by their content, not their path.
    source: str
    model: str = DEFAULT_MODEL
    out: str
    image_root: str | None = None

    # How the model runs.
    backend: Annotated[str, DECIDES] = "native"
    device: Device = "auto"
    devices: str | None = None  # one process each: all, 0,2,3 (GPUs), or cpu:N; None: one process
    precision: Annotated[Precision, DECIDES] = "auto"
    batch_size: Annotated[int | None, Field(ge=1)] = None  # None: tuned to the memory there is
    threads: Annotated[int | None, Field(ge=1)] = None  # None: one a core
    gpu_memory: Annotated[float, Field(gt=0, le=1)] = 0.9  # share of a card's memory that may be used in all
    decode_workers: Annotated[int | None, Field(ge=1)] = None  # None: by the number of cores
    deterministic: Annotated[bool, DECIDES] = False

    # Servers (--backend http). The key stands in the environment variable `api_key_env`.
    base_url: tuple[str, ...] = ()
    api_key_env: str = "OPENAI_API_KEY"
    request_timeout: Annotated[float, Field(gt=0)] = 300.0
    patience: Annotated[float, Field(gt=0)] = 120.0  # seconds that all servers may fail before the run stops
    send_format: Annotated[Literal["jpeg", "png"], DECIDES] = "jpeg"
    send_size: Annotated[int | None, DECIDES, Field(ge=16)] = None  # the longest side; None: as it is

    # An engine that was built before: ours stands in `model` from here on. Further settings of TensorRT-LLM's LLM as
    # name=value.
    engine: str | None = None
    engine_option: Annotated[tuple[str, ...], DECIDES] = ()

    # What the model is asked.
    prompt: Annotated[tuple[str, ...], Field(max_length=64)] = ()
    prompt_text: str | None = None
    prompt_file: str | None = None
    prompt_template: str | None = None  # round every prompt: holds {prompt}, and may hold the sample's fields
    template: Annotated[str | None, DECIDES] = None  # the chat template; None: the checkpoint's own

    # How it answers.
    temperature: Annotated[float, DECIDES, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, DECIDES, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, DECIDES, Field(ge=0)] = 0
    seed: Annotated[int, DECIDES, Field(ge=0, lt=2**63)] = 0
    max_new_tokens: Annotated[int, DECIDES, Field(ge=1)] = 256
    min_new_tokens: Annotated[int, DECIDES, Field(ge=0)] = 0
    stop: Annotated[tuple[str, ...], DECIDES] = ()
    ignore_eos: Annotated[bool, DECIDES] = False

    # What becomes of a caption that is not good.
    retry: Annotated[tuple[Retry, ...], DECIDES, Field(max_length=8)] = (
        Retry(temperature=0.4, top_p=0.9),
        Retry(temperature=0.8, top_p=0.95),
    )
    repetition: Annotated[Repetition | None, DECIDES] = Repetition()
    truncation: Annotated[Truncation, DECIDES] = "trim"

    # What captions will resemble: written faster for it, never differently (see vila2.recaption.drafts). A hint:
    # a backend that cannot use it does without, and so do products whose bits depend on the batch (torch's).
    draft: str = "auto"  # off, auto, original, column:NAME, or the output folder of an earlier run

    # Which images are taken.
    max_pixels: Annotated[int, DECIDES, Field(ge=1)] = 100_000_000  # 300 MB of RGB
    min_side: Annotated[int, DECIDES, Field(ge=1)] = 4
    max_aspect: Annotated[float, DECIDES, Field(ge=1)] = 100.0
    orientation: Annotated[Orientation, DECIDES] = "apply"
    decoder: Annotated[Decoder, DECIDES] = "auto"  # DALI beside a model on a GPU, if it is installed
    resize: Annotated[Resize, DECIDES] = (
        "exact"  # Pillow's own pixels, or torch's, at most two grey levels away
    )

    # How much, and whose share.
    limit: Annotated[int | None, Field(ge=1)] = None
    rank: Annotated[int, Field(ge=0)] = 0
    world_size: Annotated[int, Field(ge=1)] = 1
    rows_per_part: Annotated[int, Field(ge=1)] = 2000
    commit_seconds: Annotated[float, Field(gt=0)] = 30.0

    # How the run behaves.
    round: Annotated[int, DECIDES, Field(ge=0)] = 0
    retry_errors: bool = False
    strict: bool = False
    dry_run: bool = False
    json_lines: Annotated[bool, Field(alias="json")] = False  # `json` is a method of pydantic's models

    @model_validator(mode="before")
    @classmethod
    def _of_engine(cls, values: Any) -> Any:
        """An engine directory says which backend it is for, and stands for a model."""
        engine = values.get("engine") if isinstance(values, dict) else None
        if not isinstance(engine, str) or values.get("backend") == "http":
            return values
        backend = _engine_says(Path(engine).expanduser(), "backend")
        if backend not in ("native", "trtllm"):
            raise ValueError(
                f"engine {engine} is none of `vila2-fast build`: it has no readable engine.json (a checkpoint goes "
                "by model)"
            )
        if values.get("backend") not in (None, backend):
            raise ValueError(f"engine {engine} is for --backend {backend}, not {values['backend']}")
        if values.get("model") not in (None, engine, DEFAULT_MODEL):
            raise ValueError("give model or engine, not both: an engine holds its model")
        if backend == "trtllm":
            return {**values, "backend": backend}
        return {**values, "backend": backend, "engine": None, "model": str(Path(engine).expanduser())}

    @field_validator("prompt", "stop", "base_url", "engine_option", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        """`prompt = "brief"` in a recipe means `prompt = ["brief"]`."""
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> "RecaptionSettings":
        for name in ("source", "model", "out"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} must not be empty")
        if self.rank >= self.world_size:
            raise ValueError(f"rank {self.rank} must be below world_size {self.world_size}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} must not exceed max_new_tokens {self.max_new_tokens}"
            )
        if self.prompt and self.prompt_text is not None:
            raise ValueError("give prompt (a name) or prompt_text, not both")
        if self.prompt_text is not None and not self.prompt_text.strip():
            raise ValueError("prompt_text must not be empty")
        if len(set(self.prompt)) != len(self.prompt):
            raise ValueError("prompt names one prompt twice")
        if any(not text for text in self.stop):
            raise ValueError("stop must not hold an empty string")
        if not self.draft.removeprefix(DRAFT_COLUMN).strip():
            raise ValueError(f"draft {self.draft!r} must be off, auto, original, column:NAME or a folder")
        if self.devices is not None and not re.fullmatch(r"all|\d+(,\d+)*|cpu:[1-9]\d*", self.devices):
            raise ValueError(
                f"devices {self.devices!r} must be all, GPUs like 0,2,3, or cpu:N for N processes"
            )
        if self.devices is not None and len(set(self.devices.split(","))) != len(self.devices.split(",")):
            raise ValueError(f"devices {self.devices!r} names a GPU twice")
        self._check_backend()
        return self

    @property
    def processes_on_cpu(self) -> int:
        """How many of our processes share this machine's memory for their models."""
        return int(self.devices[4:]) if self.devices is not None and self.devices.startswith("cpu:") else 1

    def _check_backend(self) -> None:
        if self.backend not in BACKEND_PRECISIONS:
            raise ValueError(f"backend {self.backend!r} is not one of: {', '.join(BACKEND_PRECISIONS)}")
        for name in FOREIGN[self.backend]:
            if getattr(self, name) != type(self).model_fields[name].default:
                knows = " or ".join(backend for backend, names in FOREIGN.items() if name not in names)
                raise ValueError(f"{name} means nothing to --backend {self.backend}, only to {knows}")
        if self.backend == "http" and not self.base_url:
            raise ValueError("--backend http needs --base-url")
        if self.engine is not None and self.engine_option:
            raise ValueError(
                "engine_option belongs to the building of an engine: give it to `vila2-fast build`"
            )
        allowed = BACKEND_PRECISIONS[self.backend]
        if self.precision != "auto" and self.precision not in allowed:
            raise ValueError(
                f"precision {self.precision} does not run on the {self.backend} backend yet: "
                f"choose {', '.join(allowed[:-1])} or {allowed[-1]}"
            )

    @property
    def resolved_precision(self) -> str:
        """`precision` with `auto` decided: an engine's own, else bf16 weights, on every device.

        A server's is not ours to know.
        """
        if self.backend == "http" or self.precision != "auto":
            return self.precision
        folder = self.model if self.engine is None else self.engine
        return _engine_says(Path(folder).expanduser(), "precision") or "bf16"

    def sampling(self, attempt: int = 0) -> SamplingParams:
        """How to sample the given attempt: 0 is the caption asked for, then the retry ladder."""
        temperature, top_p = self.temperature, self.top_p
        if attempt:
            temperature, top_p = self.retry[attempt - 1].temperature, self.retry[attempt - 1].top_p
        rule = self.repetition
        return SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=self.top_k,
            seed=self.seed,
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            # A benchmark that ignores the end of a sequence wants its full length, loops and all.
            repetition=None if rule is None or self.ignore_eos else RepetitionRule(**rule.model_dump()),
        )

    def deciding(self) -> dict[str, Any]:
        """The settings that decide what a caption says, as plain JSON values."""
        values = self.model_dump(mode="json")
        values["precision"] = self.resolved_precision
        return {
            name: values[name]
            for name, field in type(self).model_fields.items()
            if DECIDES in field.metadata and name not in FOREIGN[self.backend]
        }


def _engine_says(folder: Path, name: str) -> str | None:
    """A line of what an engine directory says of itself; None if `folder` is none. Whoever opens it checks the rest."""
    try:
        values = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    value = values.get(name) if isinstance(values, dict) else None
    return value if isinstance(value, str) else None


AnySettings = TypeVar("AnySettings", bound=BaseModel)


def make_settings(kind: type[AnySettings], values: Mapping[str, Any], where: str = "") -> AnySettings:
    """Validate `values`; UsageError in one line names the key, what is wrong and, for a typo, the nearest key.

    `where` names the file that they came from, if any.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        prefix = f"{where}: " if where else ""
        raise UsageError(prefix + "; ".join(_explain(kind, item) for item in error.errors())) from None


def load_recipe(path: str | Path) -> dict[str, Any]:
    """The keys of a recipe file, TOML or YAML by its suffix. UsageError when it cannot be read or parsed."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".yaml", ".yml"):
        raise UsageError(f"{path}: a recipe ends in .toml, .yaml or .yml")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"{path}: cannot read the file: {reason}") from None
    try:
        loaded = tomllib.loads(text) if suffix == ".toml" else _load_yaml(text)
    except ValueError as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise UsageError(f"{path}: expected `name = value` pairs")
    return loaded


def recaption_settings(recipe: str | Path | None, overrides: Mapping[str, Any]) -> RecaptionSettings:
    """Settings from a recipe file (or none) with the command line's values on top; None means "not given"."""
    values: dict[str, Any] = {}
    where = ""
    if recipe is not None:
        values, where = load_recipe(recipe), str(recipe)
        _check_keys(RecaptionSettings, values, where)
    given = {name: value for name, value in overrides.items() if value is not None}
    # The command line's prompt replaces the recipe's, of whichever kind that was; so does its model.
    for pair in (("prompt", "prompt_text"), ("model", "engine")):
        for one, other in (pair, pair[::-1]):
            if one in given and other not in given:
                values.pop(other, None)
    missing = [name for name in ("source", "out") if name not in {**values, **given}]
    if missing:
        prefix = f"{where}: " if where else ""
        raise UsageError(f"{prefix}missing {', '.join(missing)}")
    return make_settings(RecaptionSettings, {**values, **given}, where)


def nearest(word: str, words: list[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no word is near."""
    found = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _load_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _keys(kind: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in kind.model_fields.items()]


def _check_keys(kind: type[BaseModel], values: Mapping[str, Any], where: str) -> None:
    known = _keys(kind)
    for key in values:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}{nearest(key, known)}")


def _explain(kind: type[BaseModel], item: Any) -> str:
    """One pydantic error as words: `max_new_tokens: must be at least 1, got 0`."""
    location = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        owner = _owner(kind, item["loc"][:-1])
        key = str(item["loc"][-1])
        hint = nearest(key, _keys(owner)) if owner is not None else ""
        return f"unknown key {location!r}{hint}"
    message = item["msg"].removeprefix("Value error, ")
    if not location:
        return message
    if item["type"] == "missing":
        return f"missing {location}"
    if item["type"] == "value_error" and isinstance(item["input"], Mapping):
        return f"{location}: {message}"  # of a whole table: the message names the key
    message = message.replace("Input should be", "must be").replace("Input should", "must")
    return f"{location}: {message}, got {item['input']!r}"


def _owner(kind: type[BaseModel], path: tuple[Any, ...]) -> type[BaseModel] | None:
    """The settings class that a location inside `kind` belongs to."""
    owner: type[BaseModel] | None = kind
    for part in path:
        if isinstance(part, int):
            continue
        if owner is None or part not in owner.model_fields:
            return None
        owner = _find_model(owner.model_fields[part].annotation)
    return owner


def _find_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = _find_model(inner)
        if found is not None:
            return found
    return None
