"""When a run has diverged: a loss or a gradient that is no number, or a loss far above its recent past."""

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

from vila2.errors import VilaError
from vila2.train.recipe import GuardSettings

_NORMAL = 1.4826  # the standard deviation of a normal distribution, in median absolute deviations
_SHOWN_KEYS = 8


class DivergedError(VilaError):
    """Training was stopped before it did harm."""


class Guard:
    """Watches a stage. Its memory, the recent losses, belongs to the stage's state."""

    def __init__(self, settings: GuardSettings, recent: Iterable[float] = ()) -> None:
        self.settings = settings
        self.recent = deque(recent, maxlen=settings.window)

    def check(self, loss: float, grad_norm: float) -> str | None:
        """Why the step must not be taken, or None: the loss is then remembered."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient's norm is {grad_norm} (loss {loss:.4g})"
        limit = self.limit()
        if limit is not None and loss > limit:
            return f"the loss is {loss:.4g}, its recent median {median(self.recent):.4g} (limit {limit:.4g})"
        self.recent.append(loss)
        return None

    def limit(self) -> float | None:
        """The loss above which the run counts as diverged; None while too few losses are known, or if switched off."""
        if not self.settings.deviations or len(self.recent) < self.settings.window // 2:
            return None
        middle = median(self.recent)
        deviation = _NORMAL * median(abs(loss - middle) for loss in self.recent)
        return middle + max(self.settings.margin, self.settings.deviations * deviation)


def diverged(where: str, step: int, reason: str, keys: list[str], kept: int | None) -> DivergedError:
    """The one line that a user sees. `kept` is the step of the saved state, if there is one."""
    shown = ", ".join(keys[:_SHOWN_KEYS])
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    state = "no state was saved yet" if kept is None else f"the state of step {kept} is kept"
    return DivergedError(
        f"{where}: diverged at step {step}: {reason}; its batch: {shown}{more}; {state}; "
        "lower the learning rate or look at these examples, and train into a new folder"
    )
