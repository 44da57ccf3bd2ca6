"""`run`: a source of images becomes a complete output folder, or goes on where an earlier run stopped.

The order of things: check the request, list the source, load the model, claim the output folder, then let decode
threads, the model and the writer overlap until every sample of this rank has a row a prompt. Any exception, in
whichever thread, ends the run as itself after the rows that are complete have been committed.
"""

import time
from collections.abc import Callable

from vila2.backends import Captioner, open_captioner
from vila2.config import RecaptionSettings
from vila2.errors import OutputError
from vila2.recaption.drafts import Drafts, open_drafts, with_drafts
from vila2.recaption.exchange import Exchange, Outcome
from vila2.recaption.feed import Feed
from vila2.recaption.interrupt import Interrupts
from vila2.recaption.output import Output, discard_index, open_samples
from vila2.recaption.prompts import PromptSet, choose_prompts
from vila2.recaption.stats import DraftUse, Progress, RunSummary, Stages, rates_of
from vila2.recaption.work import Cut, Plan, decode_workers, make_loader

OBSERVE_EVERY_S = 0.1
HUNGRY = 0.3  # a captioner that outruns its images finds none at every second pull; one that is full, at hardly any

Observe = Callable[[Progress], None]
OpenModel = Callable[[RecaptionSettings], Captioner]


def run(
    settings: RecaptionSettings,
    *,
    observe: Observe | None = None,
    interrupts: Interrupts | None = None,
    open_model: OpenModel = open_captioner,
    cut: Cut | None = None,
) -> RunSummary:
    """Caption what is not captioned yet, and leave `summary.json`.

    `observe` is called at the start, some times a second, and at the end, in this thread. With `cut` this is one
    process of several, whose supervisor has listed the source and writes the summary (vila2.recaption.processes).
    Raises UsageError, SourceError, CheckpointError or OutputError.
    """
    stages = Stages()
    prompts = choose_prompts(settings)
    captioner: Captioner | None = None
    try:
        with stages("list_source"):
            source = open_samples(settings)
            drafts = open_drafts(settings, prompts)
        with stages("load_model"):
            captioner = open_model(settings)
        with Output(settings, source, captioner, prompts) as output:
            plan = Plan(source, settings, prompts.names, output.done, output.redo, cut)
            one = _Run(
                settings, captioner, prompts, drafts, output, stages, observe, interrupts or Interrupts()
            )
            summary = one.execute(plan)
            if cut is None:
                output.write_summary(summary.to_json())
            return summary
    except BaseException:
        if cut is None:
            discard_index(settings)
        raise
    finally:
        if captioner is not None:
            captioner.close()


class _Run:
    """The parts of one run, and the clock that commits and reports."""

    def __init__(
        self,
        settings: RecaptionSettings,
        captioner: Captioner,
        prompts: PromptSet,
        drafts: Drafts | None,
        output: Output,
        stages: Stages,
        observe: Observe | None,
        interrupts: Interrupts,
    ) -> None:
        self.settings, self.captioner, self.output = settings, captioner, output
        self.stages, self.observe, self.interrupts = stages, observe, interrupts
        self.prompts, self.drafts = prompts, drafts
        self.start = self.committed = self.observed = time.monotonic()

    def execute(self, plan: Plan) -> RunSummary:
        """Caption what the plan names."""
        self.plan = plan
        self.start = self.committed = time.monotonic()
        self.feed = Feed(
            with_drafts(plan.jobs(), self.drafts),
            make_loader(self.captioner, self.settings),
            workers=decode_workers(self.captioner, self.settings),
        )
        self.exchange = Exchange(
            self.feed,
            self.prompts,
            self.settings,
            emit=self._emit,
            tick=self._tick,
            stop_requested=lambda: self.interrupts.requested,
        )
        self._observe()
        try:
            self._caption()
        except (OutputError, KeyboardInterrupt):
            raise  # nothing more can be written, or nothing more shall be waited for
        except BaseException:
            self._commit()
            raise
        finally:
            self.feed.close()
        self._commit()
        self._observe()
        return self._finish()

    def _caption(self) -> None:
        captions = self.captioner.caption(self.exchange.requests())
        try:
            with self.interrupts.orderly():
                for caption in captions:
                    self.exchange.settle(caption)
        finally:
            close = getattr(captions, "close", None)  # a generator: let go of what it holds
            if close is not None:
                close()

    def _emit(self, outcome: Outcome) -> None:
        with self.stages("write"), self.interrupts.shield():
            if self.output.add(outcome):
                self.committed = time.monotonic()

    def _commit(self) -> None:
        with self.stages("write"), self.interrupts.shield():
            self.output.flush()
        self.committed = time.monotonic()

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self.committed >= self.settings.commit_seconds:
            self._commit()
        if now - self.observed >= OBSERVE_EVERY_S:
            self.observed = now
            self._observe()

    def _observe(self) -> None:
        if self.observe is not None:
            self.observe(self._progress())

    def _progress(self) -> Progress:
        tally = self.exchange.tally
        return Progress(
            images=tally.images,
            total_images=self.plan.num_pending,
            captions=tally.captions,
            tokens=tally.tokens,
            errors=tally.errors,
            seconds=time.monotonic() - self.start,
            waiting_decode=self.feed.num_encoded,
            waiting_model=self.feed.num_ready,
            in_model=self.exchange.num_in_flight,
            bottleneck=self._bottleneck(),
            drafts=DraftUse.of(self.captioner.stats()),
        )

    def _bottleneck(self) -> str:
        """The stage that the others wait for: by how often the captioner found no image, then by its own clocks."""
        if not self.exchange.tally.rows:
            return "starting"
        if self.exchange.hunger > HUNGRY and not self.feed.ended:
            return "decode" if self.feed.num_encoded else "reading"
        stats = self.captioner.stats()
        return "vision" if stats.get("vision_s", 0.0) > stats.get("language_s", 0.0) else "language"

    def _finish(self) -> RunSummary:
        settings, tally = self.settings, self.exchange.tally
        seconds = max(time.monotonic() - self.start, 1e-9)
        stats = self.captioner.stats()
        self.stages.add("read_source", self.feed.read_s)
        self.stages.add("decode_images", self.feed.decode_s)
        for name, value in stats.items():
            if name.endswith("_s"):
                self.stages.add(name.removesuffix("_s"), value)
        return RunSummary(
            out=settings.out,
            source=settings.source,
            model=self.captioner.model_name,
            compute=self.captioner.description,
            rank=settings.rank,
            world_size=settings.world_size,
            interrupted=self.interrupts.requested,
            images=tally.images,
            captions=tally.captions,
            rows=tally.rows,
            already_done=self.plan.num_done,
            errors_in_output=self.output.num_errors,
            seconds=seconds,
            images_per_s=tally.images / seconds,
            captions_per_s=tally.captions / seconds,
            tokens_per_s=tally.tokens / seconds,
            num_tokens=tally.tokens,
            num_prompt_tokens=tally.prompt_tokens,
            words_per_caption=tally.words / max(1, tally.captions),
            status=dict(tally.status),
            error_kind=dict(tally.error_kind),
            rates=rates_of(tally),
            drafts=DraftUse.of(stats),
            stage_s=dict(self.stages.seconds),
            captioner={name: value for name, value in stats.items() if not name.endswith("_s")},
        )
