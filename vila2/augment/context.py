"""What a step is given when it is carried out, and what it gives back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vila2.augment.recipe import LoopRecipe
from vila2.augment.step import Step, place
from vila2.errors import VilaError
from vila2.recaption.interrupt import Interrupts


class Stopped(Exception):
    """The run was asked to stop, and the step has saved what it has."""


class GateFailed(VilaError):
    """What a step made is not good enough to go on with."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """`digest` names what came out by its content. `values` is what later plans decide by, `metrics` are figures for
    the ledger, `images` how many were worked on, `seconds` the work's own clock where it has one."""

    digest: str
    values: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    images: int = 0
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """The first that is heard of a step: what it is there for."""

    why: str


Observe = Callable[[str, Any], None]  # the step's name, and `Begun` or its own progress


@dataclass(frozen=True, slots=True)
class Context:
    """A run under way."""

    run: Path
    recipe: LoopRecipe
    interrupts: Interrupts
    observe: Observe
    outcomes: Mapping[str, Mapping[str, Any]]  # step -> the values of its outcome, of all that are complete

    def settings(self, step: Step) -> dict[str, Any]:
        """A step's settings with the run folder in place."""
        placed: dict[str, Any] = place(step.settings, self.run)
        return placed
