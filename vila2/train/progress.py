"""What a run tells while it works, and how fast it works."""

from collections import deque
from dataclasses import dataclass

_WINDOW = 50  # steps that a rate is taken over


@dataclass(frozen=True, slots=True)
class StepFigures:
    """One optimiser step over all processes. `loss` is the mean over the labels, None where there was none."""

    step: int  # how many are done with this one
    loss: float | None
    lr: float  # of the fastest part
    grad_norm: float
    tokens: int
    images: int
    flops: float
    seconds: float


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """Where a stage stands. Rates are those of the last steps; `share` of the ceiling is None where it is unknown."""

    stage: str
    stage_number: int
    num_stages: int
    step: int
    steps: int
    loss: float | None
    lr: float
    grad_norm: float
    eval_loss: float | None
    tokens_per_s: float
    images_per_s: float
    flops_per_s: float
    share: float | None
    seconds: float  # in this stage, over all of its runs
    eta_s: float


@dataclass(frozen=True, slots=True)
class StageSummary:
    """A stage that is done, over all of its runs."""

    name: str
    steps: int
    tokens: int
    images: int
    seconds: float
    checkpoint: str


class Rates:
    """Sums over the last steps."""

    def __init__(self) -> None:
        self._steps: deque[StepFigures] = deque(maxlen=_WINDOW)

    def add(self, figures: StepFigures) -> None:
        self._steps.append(figures)

    def per_second(self) -> tuple[float, float, float, float]:
        """Steps, tokens, images and operations a second."""
        seconds = sum(figures.seconds for figures in self._steps) or float("inf")
        tokens = sum(figures.tokens for figures in self._steps)
        images = sum(figures.images for figures in self._steps)
        flops = sum(figures.flops for figures in self._steps)
        return len(self._steps) / seconds, tokens / seconds, images / seconds, flops / seconds
