"""As much of lmms-eval 0.7 as its evaluator shows to a model: the base class, requests, the plug-in's manifest.

lmms-eval itself brings a hundred packages, so `make test` runs the adapter against this; `make test-eval` runs it
under the real one.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest


class CacheHook:
    def __init__(self) -> None:
        self.seen: list[tuple[str, Any, str]] = []

    def add_partial(self, attribute: str, request: Any, answer: str) -> None:
        self.seen.append((attribute, request, answer))


class lmms:
    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = CacheHook()
        self.task_dict: dict[str, dict[str, Sequence[Any]]] = {}

    @classmethod
    def create_from_arg_string(cls, text: str, more: dict[str, Any]) -> "lmms":
        """`a=1,b=x`, where numbers and truth values come as such; what the command line gave unless it is None."""
        given = dict(part.split("=", 1) for part in text.split(",") if part)
        return cls(
            **{k: _value(v) for k, v in given.items()}, **{k: v for k, v in more.items() if v is not None}
        )


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if text.isdigit() else text


@dataclass
class Instance:
    arguments: tuple[Any, ...]
    request_type: str = "generate_until"
    resps: list[str] = field(default_factory=list)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Task:
    """Documents with a way to show and to ask; `requests` are as lmms-eval's tasks build them."""

    def __init__(
        self, name: str, documents: Sequence[Any], visual: Callable[[Any], Any] | None, **settings: Any
    ) -> None:
        self.name, self.documents, self.visual, self.settings = name, documents, visual, settings

    def request(self, document: int, text: str) -> Instance:
        return Instance((text, dict(self.settings), self.visual, document, self.name, "test"))


def run(model: Any, tasks: Sequence[Task], requests: Sequence[Instance]) -> list[str]:
    """What the evaluator does around a model, in short."""
    model.task_dict = {task.name: {"test": task.documents} for task in tasks}
    answers: list[str] = model.generate_until(list(requests))
    for request, answer in zip(requests, answers, strict=True):
        request.resps.append(answer)
    return answers


def install(patch: pytest.MonkeyPatch) -> None:
    """Make `import lmms_eval` find this, and the adapter be imported afresh."""
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        patch.setitem(sys.modules, name, module)
    patch.delitem(sys.modules, "vila2.evaluate.lmms", raising=False)
