"""Several processes as one run: their progress in one bar, their summaries in one file.

A process that died has left no summary, but its parts: its rows are counted from those.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vila2.config import RecaptionSettings
from vila2.data.rows import Row
from vila2.recaption.stats import DraftUse, Progress, RunSummary, Tally, rates_of
from vila2.types import Status


@dataclass(slots=True)
class Life:
    """One device's work: what its dead processes have committed, and how far the living one is."""

    total_images: (
        int  # to do, as the supervisor counted it and then the first process, which knows what is redone
    )
    left_images: int = field(init=False)  # still to do, by the latest that was heard
    buried: Tally = field(default_factory=Tally)
    progress: Progress | None = None
    _is_new: bool = True

    def __post_init__(self) -> None:
        self.left_images = self.total_images

    def update(self, message: Mapping[str, Any]) -> None:
        """Take the living process's progress."""
        self.progress = Progress(**{**message, "drafts": DraftUse(**message["drafts"])})
        if self._is_new:
            self.total_images, self._is_new = self.progress.total_images, False
        self.left_images = self.progress.total_images - self.progress.images

    def count(self, rows: Iterable[Row]) -> None:
        """Count the rows of a part that a dead process has committed."""
        for row in rows:
            self.buried.rows += 1
            self.buried.tokens += row.num_tokens
            self.buried.prompt_tokens += row.num_prompt_tokens
            self.buried.words += len(row.caption.split())
            self.buried.status[row.status.value] += 1
            if row.error_kind is not None:
                self.buried.error_kind[row.error_kind.value] += 1

    def end(self) -> None:
        """The process has died: what it had not committed is to be done again."""
        self.progress = None


def join_progress(lives: Sequence[Life], seconds: float) -> Progress:
    """All processes as one. One that restarts keeps what its forerunner has committed."""
    now = [life.progress for life in lives if life.progress is not None]
    stages = Counter(progress.bottleneck for progress in now)
    return Progress(
        images=sum(life.total_images - life.left_images for life in lives),
        total_images=sum(life.total_images for life in lives),
        captions=sum(p.captions for p in now) + sum(life.buried.captions for life in lives),
        tokens=sum(p.tokens for p in now) + sum(life.buried.tokens for life in lives),
        errors=sum(p.errors for p in now) + sum(life.buried.errors for life in lives),
        seconds=seconds,
        waiting_decode=sum(p.waiting_decode for p in now),
        waiting_model=sum(p.waiting_model for p in now),
        in_model=sum(p.in_model for p in now),
        bottleneck=stages.most_common(1)[0][0] if stages else "starting",
        drafts=_join_drafts([(p.drafts, p.tokens) for p in now]),
    )


def join_summaries(
    settings: RecaptionSettings,
    parts: Sequence[tuple[Life, Mapping[str, Any] | None]],
    *,
    devices: list[str],
    restarts: int,
    seconds: float,
    interrupted: bool,
    already_done: int,
    num_errors: int,
) -> RunSummary:
    """One summary of all processes. Seconds by stage and counters are sums over them."""
    told = [summary for _, summary in parts if summary is not None]
    buried = [life.buried for life, _ in parts]
    status: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    stages: Counter[str] = Counter()
    counters: Counter[str] = Counter()
    for summary in told:
        status.update(summary["status"])
        kinds.update(summary["error_kind"])
        stages.update(summary["stage_s"])
        counters.update(summary["captioner"])
    for tally in buried:
        status.update(tally.status)
        kinds.update(tally.error_kind)
    rows = sum(status.values())
    captions = rows - status[Status.ERROR.value]
    tokens = sum(s["num_tokens"] for s in told) + sum(t.tokens for t in buried)
    words = sum(s["words_per_caption"] * s["captions"] for s in told) + sum(t.words for t in buried)
    images = sum(life.total_images - life.left_images for life, _ in parts)
    seconds = max(seconds, 1e-9)
    return RunSummary(
        out=settings.out,
        source=settings.source,
        model=told[0]["model"] if told else settings.model,
        compute=f"{told[0]['compute']} in each of {len(devices)} processes" if told else "",
        rank=settings.rank,
        world_size=settings.world_size,
        interrupted=interrupted,
        images=images,
        captions=captions,
        rows=rows,
        already_done=already_done,
        errors_in_output=num_errors,
        seconds=seconds,
        images_per_s=images / seconds,
        captions_per_s=captions / seconds,
        tokens_per_s=tokens / seconds,
        num_tokens=tokens,
        num_prompt_tokens=sum(s["num_prompt_tokens"] for s in told) + sum(t.prompt_tokens for t in buried),
        words_per_caption=words / max(1, captions),
        status=dict(status),
        error_kind=dict(kinds),
        rates=_join_rates(told, status),
        drafts=_join_drafts([(DraftUse(**s["drafts"]), s["num_tokens"]) for s in told]),
        stage_s=dict(stages),
        captioner=dict(counters),
        devices=devices,
        restarts=restarts,
    )


def _join_rates(told: Sequence[Mapping[str, Any]], status: Counter[str]) -> dict[str, float]:
    """Each process's rates, weighted by its captions. What died took its count of attempts along."""
    total = sum(s["captions"] for s in told)
    rates = {
        name: sum(s["rates"][name] * s["captions"] for s in told) / max(1, total)
        for name in rates_of(Tally())
    }
    return {**rates, "errors": status[Status.ERROR.value] / max(1, sum(status.values()))}


def _join_drafts(uses: Sequence[tuple[DraftUse, int]]) -> DraftUse:
    tokens = sum(number for _, number in uses)
    steps = sum(number / use.tokens_per_step for use, number in uses)
    return DraftUse(
        sum(use.drafted for use, _ in uses),
        sum(use.accepted for use, _ in uses),
        round(tokens / steps, 3) if steps else 1.0,
    )
