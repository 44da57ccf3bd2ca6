"""The conversation with a captioner: loaded jobs become requests, captions become rows or another attempt.

Everything here runs in the thread that iterates the captions. A request is in flight from the moment it is yielded
until its caption has got a verdict that is not "retry".
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vila2.config import RecaptionSettings
from vila2.errors import UsageError
from vila2.recaption.feed import Feed, Loaded
from vila2.recaption.filters import error_of, judge
from vila2.recaption.prompts import MissingFieldError, PromptSet, sample_values
from vila2.recaption.stable import stable_hash
from vila2.recaption.stats import Tally
from vila2.types import Caption, CaptionRequest, ErrorKind, FinishReason, SampleError, Status

MEMORY_OF_HUNGER = 0.95  # how much of `hunger` a pull leaves as it was
IDLE_WAIT_S = 0.1  # how long an idle captioner waits for an image before the run looks at its clock again


@dataclass(frozen=True, slots=True)
class Outcome:
    """One finished (sample, prompt), ready to be written."""

    loaded: Loaded
    prompt: str
    text: str
    status: Status
    error: SampleError | None = None
    finish_reason: FinishReason = FinishReason.ERROR
    num_prompt_tokens: int = 0
    num_tokens: int = 0


@dataclass(slots=True)
class _Pending:
    loaded: Loaded
    prompt: str
    request: CaptionRequest
    attempt: int = 0


class Exchange:
    """Feeds a captioner and judges what it answers. `emit` gets each outcome once; `tick` is called often."""

    def __init__(
        self,
        feed: Feed,
        prompts: PromptSet,
        settings: RecaptionSettings,
        *,
        emit: Callable[[Outcome], None],
        tick: Callable[[], None],
        stop_requested: Callable[[], bool],
    ) -> None:
        self.tally = Tally()
        self.hunger = 0.0  # the share of the captioner's latest pulls that found no image ready, in [0, 1]
        self._feed, self._prompts, self._settings = feed, prompts, settings
        self._emit, self._tick, self._stop_requested = emit, tick, stop_requested
        self._pending: dict[int, _Pending] = {}
        self._to_send: deque[CaptionRequest] = deque()
        self._rows_left: dict[tuple[str, int], int] = {}
        self._next_id = 0
        self._checked_fields = False

    @property
    def num_in_flight(self) -> int:
        return len(self._pending)

    def requests(self) -> Iterator[CaptionRequest | None]:
        """What `Captioner.caption` iterates. Ends when every caption has been settled, or soon after a stop.

        Waits for an image only while nothing is in flight; else yields None, so that the captioner goes on.
        """
        while True:
            self._tick()
            if self._stop_requested():
                self._drop_unsent()
            if self._to_send:
                yield self._to_send.popleft()
                continue
            if not self._stop_requested():
                loaded = self._feed.poll(0.0 if self._pending else IDLE_WAIT_S)
                if not self._feed.ended:
                    self._note_hunger(loaded is None)
                if loaded is not None:
                    self._admit(loaded)
                    continue
            if self._pending:
                yield None
            elif self._stop_requested() or self._feed.ended:
                return

    def settle(self, caption: Caption) -> None:
        """Take one caption: write its row, or queue the next attempt."""
        pending = self._pending.get(caption.id)
        if pending is None:
            raise ValueError(f"the captioner answered request {caption.id}, which is not in flight")
        settings = self._settings
        self.tally.attempt(caption)
        verdict = judge(
            caption,
            attempts_left=len(settings.retry) - pending.attempt,
            truncation=settings.truncation,
            ignore_eos=settings.ignore_eos,
        )
        del self._pending[caption.id]
        if verdict.retry:
            self.tally.retries += 1
            self._ask(pending.loaded, pending.prompt, pending.request.prompt, pending.attempt + 1)
            return
        self.tally.trimmed += verdict.trimmed
        failed = verdict.status is Status.ERROR
        self._finish(
            Outcome(
                loaded=pending.loaded,
                prompt=pending.prompt,
                text=verdict.text,
                status=verdict.status,
                error=error_of(caption) if failed else None,
                finish_reason=FinishReason.ERROR if failed else caption.finish_reason,
                num_prompt_tokens=caption.num_prompt_tokens,
                num_tokens=caption.num_tokens,
            )
        )

    def _note_hunger(self, hungry: bool) -> None:
        self.hunger = MEMORY_OF_HUNGER * self.hunger + (1 - MEMORY_OF_HUNGER) * hungry

    def _admit(self, loaded: Loaded) -> None:
        """Turn one loaded job into requests, one a prompt, that share its image."""
        sample = loaded.job.sample
        self._rows_left[sample.shard, sample.index] = len(loaded.job.prompts)
        if loaded.error is not None:
            for name in loaded.job.prompts:
                self._finish(Outcome(loaded, name, "", Status.ERROR, loaded.error))
            return
        self._check_fields(loaded)
        texts = {name: self._render(loaded, name) for name in loaded.job.prompts}
        rendered = {name: text for name, text in texts.items() if text is not None}
        for name, text in rendered.items():
            self._ask(loaded, name, text, 0, num_siblings=len(rendered))

    def _render(self, loaded: Loaded, name: str) -> str | None:
        """The user turn, or None after an error row when the sample lacks a field."""
        try:
            return self._prompts.render(name, loaded.job.sample)
        except MissingFieldError as error:
            self._finish(
                Outcome(loaded, name, "", Status.ERROR, SampleError(ErrorKind.BAD_RECORD, str(error)))
            )
            return None

    def _ask(self, loaded: Loaded, name: str, text: str, attempt: int, num_siblings: int = 1) -> None:
        sample = loaded.job.sample
        key: tuple[str | int, ...] = (sample.shard, sample.index)
        if attempt:
            key = (*key, name, attempt)  # its siblings may be gone, and the shared prefill with them
        request = CaptionRequest(
            id=self._next_id,
            prompt=text,
            images=(loaded.prepared,),
            sampling=self._settings.sampling(attempt),
            image_key=key,
            num_siblings=num_siblings,
            rng_key=stable_hash(self._settings.seed, "sample", sample.shard, sample.index, name, attempt),
            draft=loaded.job.drafts.get(name, ""),
        )
        self._next_id += 1
        self._pending[request.id] = _Pending(loaded, name, request, attempt)
        self._to_send.append(request)

    def _finish(self, outcome: Outcome) -> None:
        sample = outcome.loaded.job.sample
        self.tally.row(outcome.status, outcome.text, outcome.num_tokens, outcome.error)
        self._emit(outcome)
        where = (sample.shard, sample.index)
        self._rows_left[where] -= 1
        if not self._rows_left[where]:
            del self._rows_left[where]
            self.tally.images += 1

    def _drop_unsent(self) -> None:
        for request in self._to_send:
            del self._pending[request.id]
        self._to_send.clear()

    def _check_fields(self, loaded: Loaded) -> None:
        """A field that the very first image lacks is most likely a typo: better one error now than a million rows."""
        if self._checked_fields:
            return
        self._checked_fields = True
        known = sample_values(loaded.job.sample)
        for name in sorted(self._prompts.fields):
            if name not in known:
                raise UsageError(
                    f"a prompt wants {{{name}}}, which the first sample lacks; it has: {', '.join(sorted(known))}"
                )
