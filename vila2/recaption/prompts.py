"""What the model is asked: named prompts with their wordings, and the sample's fields put into them.

A text holds plain `{name}` fields and `{{`, `}}` for braces; nothing else is interpreted. Values come from data, so
they are inserted as they stand and never scanned again, and an `<image>` inside a value is defused.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from vila2.config import RecaptionSettings, load_recipe, nearest
from vila2.errors import UsageError
from vila2.recaption.stable import stable_hash
from vila2.types import Prompt, Sample

DEFAULT_PROMPT = "detailed"
CUSTOM_PROMPT = "custom"  # the name of a --prompt-text
BUILTIN_FIELDS = ("original", "key", "shard", "index")

_TOKEN = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_-]*)\}|[{}]")
_IMAGE = re.compile(r"<image>", re.IGNORECASE)


class MissingFieldError(Exception):
    """A prompt names a field that a sample lacks."""


@dataclass(frozen=True, slots=True)
class Text:
    """A parsed wording: literal pieces (even places) and field names (odd places)."""

    pieces: tuple[str, ...]

    @property
    def fields(self) -> tuple[str, ...]:
        return self.pieces[1::2]

    def fill(self, values: Mapping[str, str]) -> str:
        """Put `values` into the fields; MissingFieldError names the first field without a value."""
        filled = list(self.pieces)
        for place, name in enumerate(filled):
            if place % 2 == 0:
                continue
            if name not in values:
                known = ", ".join(sorted(values))
                raise MissingFieldError(
                    f"the prompt wants {{{name}}}, which this sample lacks (it has: {known})"
                )
            filled[place] = _IMAGE.sub("<IMAGE>", values[name])
        return "".join(filled)


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of one run in the order they were asked for, and the template that each is put into."""

    prompts: tuple[Prompt, ...]
    seed: int
    template: str | None
    _questions: Mapping[str, tuple[Text, ...]]  # the wordings alone
    _turns: Mapping[str, tuple[Text, ...]]  # the wordings inside the template

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(prompt.name for prompt in self.prompts)

    @property
    def fields(self) -> frozenset[str]:
        """Every field that some wording wants."""
        return frozenset(name for texts in self._turns.values() for text in texts for name in text.fields)

    @property
    def question_fields(self) -> frozenset[str]:
        """The fields that the wordings alone want."""
        return frozenset(name for texts in self._questions.values() for text in texts for name in text.fields)

    def render(self, name: str, sample: Sample) -> str:
        """The user turn for one sample: its wording, drawn by the sample and the seed alone, with its fields."""
        return self._draw(self._turns[name], name, sample).fill(sample_values(sample))

    def question(self, name: str, sample: Sample) -> str:
        """The same wording without the template: what a trainer is given as the question."""
        return self._draw(self._questions[name], name, sample).fill(sample_values(sample))

    def to_json(self) -> dict[str, list[str]]:
        """What the manifest records: the wordings themselves, so that an edited prompt file is noticed."""
        return {prompt.name: list(prompt.texts) for prompt in self.prompts}

    def _draw(self, texts: tuple[Text, ...], name: str, sample: Sample) -> Text:
        return texts[stable_hash(self.seed, "wording", name, sample.shard, sample.index) % len(texts)]


def make_prompts(wordings: Mapping[str, Sequence[str]], seed: int, template: str | None = None) -> PromptSet:
    """Parse prompts given as name -> wordings. UsageError when a wording or the template does not parse."""
    if template is not None and "{prompt}" not in template:
        raise UsageError("prompt_template: it must hold {prompt}, the place where the prompt's own text goes")
    prompts = tuple(Prompt(name, tuple(texts)) for name, texts in wordings.items())
    questions, turns = {}, {}
    for prompt in prompts:
        where = f"prompt {prompt.name!r}"
        questions[prompt.name] = tuple(parse_text(text, where) for text in prompt.texts)
        wrapped = prompt.texts
        if template is not None:
            wrapped = tuple(template.replace("{prompt}", text) for text in prompt.texts)
        turns[prompt.name] = tuple(parse_text(text, where) for text in wrapped)
    return PromptSet(prompts, seed, template, questions, turns)


def sample_values(sample: Sample) -> dict[str, str]:
    """The fields of a sample by name. The four built-in names win over columns of the same name."""
    builtin = {
        "original": sample.original,
        "key": sample.key,
        "shard": sample.shard,
        "index": str(sample.index),
    }
    return {**sample.fields, **builtin}


def parse_text(text: str, where: str) -> Text:
    """Split a wording into literals and fields. UsageError for a brace that is neither."""
    pieces = [""]
    end = 0
    for match in _TOKEN.finditer(text):
        pieces[-1] += text[end : match.start()]
        end = match.end()
        token = match.group()
        if match.group(1):
            pieces += [match.group(1), ""]
        elif token in ("{{", "}}"):
            pieces[-1] += token[0]
        else:
            near = text[max(0, match.start() - 10) : match.start() + 20].replace("\n", " ")
            raise UsageError(
                f"{where}: a lone {token} near {near!r}: fields are written {{name}}, plain braces {{{{ and }}}}"
            )
    pieces[-1] += text[end:]
    return Text(tuple(pieces))


def load_prompts(path: str | Path | None = None) -> dict[str, Prompt]:
    """The packaged prompts by name, with those of the user's file (same form, TOML or YAML) on top."""
    with as_file(files("vila2.recaption") / "prompts.toml") as packaged:
        prompts = _read_file(packaged)
    if path is not None:
        prompts.update(_read_file(Path(path)))
    return prompts


def choose_prompts(settings: RecaptionSettings) -> PromptSet:
    """The prompts that the settings ask for. UsageError for an unknown name or a text that does not parse."""
    if settings.prompt_text is not None:
        return make_prompts({CUSTOM_PROMPT: (settings.prompt_text,)}, settings.seed, settings.prompt_template)
    known = load_prompts(settings.prompt_file)
    names = settings.prompt or (DEFAULT_PROMPT,)
    for name in names:
        if name not in known:
            hint = nearest(name, list(known))
            raise UsageError(f"no prompt is called {name!r}{hint}: there are {', '.join(sorted(known))}")
    return make_prompts({name: known[name].texts for name in names}, settings.seed, settings.prompt_template)


def _read_file(path: Path) -> dict[str, Prompt]:
    return {name: _read_prompt(name, value, path) for name, value in load_recipe(path).items()}


def _read_prompt(name: str, value: Any, path: Path) -> Prompt:
    form = f'{path}: prompt {name!r} must be a table with texts = ["...", ...]'
    if not isinstance(value, dict) or set(value) != {"texts"}:
        raise UsageError(form)
    texts = value["texts"]
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise UsageError(form)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise UsageError(f"{path}: a prompt's name is letters, digits, '_', '.' and '-', not {name!r}")
    return Prompt(name, tuple(texts))
