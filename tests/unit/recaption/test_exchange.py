import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tests.unit.recaption.fakes import Answer, FakeCaptioner, echo, say
from vila2.config import RecaptionSettings, make_settings
from vila2.errors import UsageError
from vila2.recaption.exchange import Exchange, Outcome
from vila2.recaption.feed import Feed, Job, Loaded
from vila2.recaption.pipeline import HUNGRY
from vila2.recaption.prompts import make_prompts
from vila2.types import Caption, CaptionRequest, ErrorKind, FinishReason, Sample, SampleError, Status

PROMPTS = make_prompts({"a": ["first"], "b": ["second {original}"]}, 0)


def settings(**values: object) -> RecaptionSettings:
    return make_settings(RecaptionSettings, {"source": "s", "model": "m", "out": "o", **values})


def jobs(count: int, prompts: tuple[str, ...] = ("a",)) -> Iterator[Job]:
    for i in range(count):
        yield Job(Sample("s", i, f"k{i}", b"x", f"original {i}"), prompts)


def load(job: Job) -> Loaded:
    return Loaded(job, prepared=job.sample.index)


class Talk:
    """An exchange with a fake captioner, run to its end."""

    def __init__(
        self,
        source: Iterator[Job],
        answer: Answer = echo,
        *,
        load: Callable[[Job], Loaded] = load,
        stop_after: int | None = None,
        room: int = 4,
        **values: object,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.captioner = FakeCaptioner(answer, room)
        feed = Feed(source, load, workers=2)
        self.exchange = Exchange(
            feed,
            PROMPTS,
            settings(**values),
            emit=self.outcomes.append,
            tick=lambda: None,
            stop_requested=lambda: stop_after is not None and len(self.outcomes) >= stop_after,
        )
        try:
            for caption in self.captioner.caption(self.exchange.requests()):
                self.exchange.settle(caption)
        finally:
            feed.close()

    def found(self) -> list[tuple[int, str]]:
        return sorted((o.loaded.job.sample.index, o.prompt) for o in self.outcomes)


@pytest.mark.parametrize("room", [1, 3, 100])
def test_every_sample_and_prompt_ends_once_and_says_the_same_in_any_batch(room: int) -> None:
    talk = Talk(jobs(40, ("a", "b")), room=room)
    assert talk.found() == [(i, p) for i in range(40) for p in "ab"]
    texts = {(o.loaded.job.sample.index, o.prompt): o.text for o in talk.outcomes}
    assert texts[7, "b"].startswith("second original 7 | 7 |")
    alone = Talk(iter(list(jobs(40, ("a", "b")))[7:8]))
    assert {(7, o.prompt): o.text for o in alone.outcomes}.items() <= texts.items()
    assert talk.exchange.tally.images == 40
    assert talk.exchange.tally.captions == 80


def test_prompts_on_one_image_share_its_key_and_say_how_many_they_are() -> None:
    talk = Talk(jobs(3, ("a", "b")))
    groups = {request.image_key for request in talk.captioner.requests}
    assert len(groups) == 3
    assert {request.num_siblings for request in talk.captioner.requests} == {2}
    assert len({request.rng_key for request in talk.captioner.requests}) == 6


def test_a_loop_climbs_the_ladder_and_the_first_good_answer_is_kept() -> None:
    def answer(request: CaptionRequest) -> Caption:
        reason = FinishReason.STOP if request.sampling.temperature == 0.8 else FinishReason.REPETITION
        return Caption(request.id, f"at {request.sampling.temperature}.", (1, 2, 3), reason)

    talk = Talk(jobs(5), answer)
    assert {(o.status, o.text) for o in talk.outcomes} == {(Status.OK, "at 0.8.")}
    tally = talk.exchange.tally
    assert (tally.rows, tally.retries, tally.loops, tally.images) == (5, 10, 10, 5)
    assert tally.tokens == 45
    assert tally.kept_tokens == 15
    keys = {request.rng_key for request in talk.captioner.requests}
    assert len(keys) == 15


def test_a_loop_to_the_end_is_kept_and_marked() -> None:
    talk = Talk(jobs(2), say("so so so", FinishReason.REPETITION))
    assert {(o.status, o.text, o.finish_reason) for o in talk.outcomes} == {
        (Status.REPETITIVE, "so so so", FinishReason.REPETITION)
    }
    assert len(talk.captioner.requests) == 6


def test_no_retry_means_one_attempt() -> None:
    talk = Talk(jobs(2), say("so so so", FinishReason.REPETITION), retry=[])
    assert len(talk.captioner.requests) == 2


def test_an_empty_answer_ends_as_a_typed_error() -> None:
    talk = Talk(jobs(1), say("  "))
    (outcome,) = talk.outcomes
    assert outcome.status is Status.ERROR
    assert outcome.error is not None
    assert outcome.error.kind is ErrorKind.EMPTY_CAPTION
    assert len(talk.captioner.requests) == 3


def test_a_bad_image_costs_only_its_own_rows_and_no_request() -> None:
    def bad(job: Job) -> Loaded:
        if job.sample.index == 1:
            return Loaded(job, error=SampleError(ErrorKind.CORRUPT_IMAGE, "broken"))
        return load(job)

    talk = Talk(jobs(3, ("a", "b")), load=bad)
    assert talk.found() == [(i, p) for i in range(3) for p in "ab"]
    assert [o.loaded.job.sample.index for o in talk.outcomes if o.status is Status.ERROR] == [1, 1]
    assert len(talk.captioner.requests) == 4
    assert talk.exchange.tally.error_kind == {"corrupt_image": 2}


def test_an_answer_that_failed_keeps_the_captioners_reason() -> None:
    error = SampleError(ErrorKind.PROMPT_TOO_LONG, "too long")
    talk = Talk(jobs(1), lambda r: Caption(r.id, "", finish_reason=FinishReason.ERROR, error=error))
    assert talk.outcomes[0].error == error


PROMPTS_WITH_FIELD = make_prompts({"a": ["about {alt}"]}, 0)


def fielded(first: dict[str, str], second: dict[str, str]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    samples = [Sample("s", i, f"k{i}", b"x", fields=fields) for i, fields in enumerate((first, second))]
    feed = Feed(iter([Job(sample, ("a",)) for sample in samples]), load, workers=1)
    exchange = Exchange(
        feed,
        PROMPTS_WITH_FIELD,
        settings(),
        emit=outcomes.append,
        tick=lambda: None,
        stop_requested=lambda: False,
    )
    try:
        for caption in FakeCaptioner().caption(exchange.requests()):
            exchange.settle(caption)
    finally:
        feed.close()
    return outcomes


def test_a_field_that_the_first_sample_lacks_stops_the_run_and_a_later_lack_is_a_row() -> None:
    with pytest.raises(UsageError, match=r"\{alt\}.*first sample lacks"):
        fielded({}, {"alt": "x"})
    outcomes = fielded({"alt": "x"}, {})
    kinds = {o.loaded.job.sample.index: o.error and o.error.kind for o in outcomes}
    assert kinds == {0: None, 1: ErrorKind.BAD_RECORD}


def test_a_stop_lets_what_is_in_flight_finish_and_takes_no_more() -> None:
    talk = Talk(jobs(500), stop_after=10)
    assert 10 <= len(talk.outcomes) <= 14
    assert talk.exchange.num_in_flight == 0


def test_an_answer_to_nothing_is_a_fault_of_the_captioner() -> None:
    with pytest.raises(ValueError, match="not in flight"):
        Talk(jobs(1), lambda request: replace(echo(request), id=99))


class Broken(Exception):
    pass


def test_a_captioner_that_raises_ends_the_run_as_itself() -> None:
    def answer(request: CaptionRequest) -> Caption:
        raise Broken("out of memory")

    with pytest.raises(Broken, match="out of memory"):
        Talk(jobs(100), answer)


def test_hunger_tells_a_slow_source_from_a_slow_model() -> None:
    def slowly(job: Job) -> Loaded:
        time.sleep(0.02)
        return load(job)

    def answer_slowly(request: CaptionRequest) -> Caption:
        time.sleep(0.01)
        return echo(request)

    assert Talk(jobs(60), load=slowly).exchange.hunger > HUNGRY
    assert Talk(jobs(60), answer_slowly, room=2).exchange.hunger < HUNGRY
