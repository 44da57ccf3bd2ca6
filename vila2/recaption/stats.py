"""What a run counts, and the summary that it leaves in `summary.json`."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vila2.types import Caption, FinishReason, SampleError, Status


@dataclass(slots=True)
class Tally:
    """Counts of one run, fed row by row. Not thread-safe: the main thread owns it."""

    images: int = 0  # samples that have all the rows they lacked
    rows: int = 0
    tokens: int = 0  # written by the model, retries included
    kept_tokens: int = 0
    prompt_tokens: int = 0
    words: int = 0
    trimmed: int = 0
    length_stops: int = 0  # attempts cut by max_new_tokens
    loops: int = 0  # attempts cut as a repetition
    retries: int = 0
    status: Counter[str] = field(default_factory=Counter)
    error_kind: Counter[str] = field(default_factory=Counter)

    def attempt(self, caption: Caption) -> None:
        """Count one answer of the captioner, kept or not."""
        self.tokens += caption.num_tokens
        self.prompt_tokens += caption.num_prompt_tokens
        self.length_stops += caption.finish_reason is FinishReason.LENGTH
        self.loops += caption.finish_reason is FinishReason.REPETITION

    def row(self, status: Status, text: str, num_tokens: int, error: SampleError | None) -> None:
        self.rows += 1
        self.kept_tokens += num_tokens
        self.words += len(text.split())
        self.status[status.value] += 1
        if error is not None:
            self.error_kind[error.kind.value] += 1

    @property
    def errors(self) -> int:
        return self.status[Status.ERROR.value]

    @property
    def captions(self) -> int:
        """Rows that hold a caption."""
        return self.rows - self.errors


@dataclass(frozen=True, slots=True)
class DraftUse:
    """What drafts were worth: tokens verified, how many of them were right, and new tokens a step and sequence."""

    drafted: int = 0
    accepted: int = 0
    tokens_per_step: float = 1.0

    @classmethod
    def of(cls, stats: Mapping[str, float]) -> "DraftUse":
        """From a captioner's counters, of which those of other backends have none."""
        steps, tokens = stats.get("sequence_steps", 0), stats.get("new_tokens", 0)
        return cls(
            int(stats.get("drafted_tokens", 0)),
            int(stats.get("accepted_tokens", 0)),
            round(tokens / steps, 3) if steps else 1.0,
        )


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What one run did. `to_json` is `summary.json`; rates are per caption, in [0, 1]."""

    out: str
    source: str
    model: str
    compute: str  # what arithmetic ran, see Captioner.description
    rank: int
    world_size: int
    interrupted: bool
    images: int
    captions: int
    rows: int
    already_done: int  # rows that an earlier run had written
    errors_in_output: int  # error rows there are now, of this run and earlier ones
    seconds: float  # from the first sample read to the last part committed; loading the model is in stage_s
    images_per_s: float
    captions_per_s: float
    tokens_per_s: float
    num_tokens: int
    num_prompt_tokens: int
    words_per_caption: float
    status: dict[str, int]
    error_kind: dict[str, int]
    rates: dict[str, float]
    drafts: DraftUse
    stage_s: dict[str, float]  # decode_images is summed over its threads, the rest is wall time
    captioner: dict[str, float]
    devices: list[str] = field(default_factory=list)  # of --devices
    restarts: int = 0  # of processes that died

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands. Queue depths: images waiting for decode, decoded ones waiting, requests in the model."""

    images: int
    total_images: int  # that this run has to do
    captions: int
    tokens: int
    errors: int
    seconds: float
    waiting_decode: int
    waiting_model: int
    in_model: int
    bottleneck: str  # starting, reading, decode, vision or language
    drafts: DraftUse = DraftUse()

    @property
    def captions_per_s(self) -> float:
        return self.captions / self.seconds if self.seconds > 0 else 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end at the pace so far; None before the first image."""
        if not self.images:
            return None
        return self.seconds / self.images * (self.total_images - self.images)


class Stages:
    """Wall seconds by stage of the main thread, as `with stages("write"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name = ""
        self._start = 0.0

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def __call__(self, name: str) -> "Stages":
        self._name = name
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.add(self._name, time.perf_counter() - self._start)


def rates_of(tally: Tally) -> dict[str, float]:
    """How often captions were trimmed, truncated, looping, retried: the health of a run at one glance."""
    captions = max(1, tally.captions)
    attempts = max(1, tally.captions + tally.retries)
    return {
        "trimmed": tally.trimmed / captions,
        "truncated": tally.status[Status.TRUNCATED.value] / captions,
        "repetitive": tally.status[Status.REPETITIVE.value] / captions,
        "looped_attempts": tally.loops / attempts,
        "retried": tally.retries / captions,
        "errors": tally.errors / max(1, tally.rows),
    }
