"""`--dry-run`: count what there is to do, caption a few images without writing a row, and say what it would take.

The probe is one small batch, so on a machine with room for more the estimate errs on the long side.
"""

import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from vila2.backends import open_captioner
from vila2.config import RecaptionSettings
from vila2.data.done import DoneSet
from vila2.recaption.drafts import open_drafts, with_drafts
from vila2.recaption.exchange import Exchange, Outcome
from vila2.recaption.feed import Feed
from vila2.recaption.output import open_samples
from vila2.recaption.pipeline import OpenModel
from vila2.recaption.prompts import choose_prompts
from vila2.recaption.work import Plan, decode_workers, make_loader

PROBE_IMAGES = 8
ROW_BYTES = 64  # of a row's numbers and digests, compressed


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run would take. `seconds` and `disk_bytes` are 0 when there is nothing to do."""

    samples: int  # of this rank, within --limit
    pending_images: int
    prompts: int
    probed: int
    probe_s: float
    errors: int  # among the probed images' rows
    captions_per_s: float
    tokens_per_s: float
    seconds: float
    disk_bytes: int
    processes: int = 1  # that share the work; one of them was probed

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    settings: RecaptionSettings, *, open_model: OpenModel = open_captioner, processes: int = 1
) -> Estimate:
    """Count and probe. Writes nothing into the output folder. Raises as `run` does.

    `processes` will share the work, each as fast as the one that is probed.
    """
    prompts = choose_prompts(settings)
    source = open_samples(settings, keep_index=False)
    plan = Plan(source, settings, prompts.names, DoneSet.load(Path(settings.out).expanduser()))
    if not plan.num_pending:
        return Estimate(plan.num_samples, 0, len(prompts.names), 0, 0.0, 0, 0.0, 0.0, 0.0, 0, processes)
    drafts = open_drafts(settings, prompts)
    outcomes: list[Outcome] = []
    captioner = open_model(settings)
    try:
        start = time.monotonic()
        feed = Feed(
            with_drafts(islice(plan.jobs(), PROBE_IMAGES), drafts),
            make_loader(captioner, settings),
            workers=decode_workers(captioner, settings),
        )
        try:
            exchange = Exchange(
                feed, prompts, settings, emit=outcomes.append, tick=lambda: None, stop_requested=lambda: False
            )
            for caption in captioner.caption(exchange.requests()):
                exchange.settle(caption)
        finally:
            feed.close()
        seconds = max(time.monotonic() - start, 1e-9)
    finally:
        captioner.close()
    tally = exchange.tally
    scale = plan.num_pending / max(1, tally.images)
    row_bytes = sum(
        ROW_BYTES + len(o.text.encode()) + len(o.loaded.job.sample.original.encode()) for o in outcomes
    )
    return Estimate(
        samples=plan.num_samples,
        pending_images=plan.num_pending,
        prompts=len(prompts.names),
        probed=tally.images,
        probe_s=seconds,
        errors=tally.errors,
        captions_per_s=tally.captions / seconds,
        tokens_per_s=tally.tokens / seconds,
        seconds=seconds * scale / processes,
        disk_bytes=int(row_bytes * scale),
        processes=processes,
    )
