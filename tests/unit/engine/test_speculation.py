"""Drafts: output is that of plain decoding to the token, whatever the draft; good ones save steps, bad ones give up.

Weights are random, so the model's own continuation is a strict test of every row that a step verifies.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints import write_llava, write_nvila, write_vila15
from tests.unit.engine.engines import another_engine, engine_requests, photo, with_limits
from vila2.backends.native import NativeCaptioner
from vila2.engine import speculation
from vila2.engine.blocks import BlockPool
from vila2.engine.draft import MAX_MATCH, Acceptance, Draft, Grounds, Line
from vila2.engine.engine import Engine
from vila2.engine.phrases import MAX_CONTEXT, SHARES, Phrases
from vila2.engine.scheduler import Chunk, Scheduler
from vila2.engine.sequence import EngineRequest, Finished, start_sequence
from vila2.engine.speculation import MAX_DRAFT, Speculator, StepCost, measure_step_cost
from vila2.model.tokenizer import TokenKind
from vila2.types import CaptionRequest, FinishReason, RepetitionRule, SamplingParams

FREE = StepCost((1, 2), (1.0, 1.0))  # a row more costs nothing: every draft is verified
LINEAR = StepCost((1, 2), (1.0, 2.0))  # a row costs as much as a token: no draft pays
FAMILIES = [write_llava, write_vila15, write_nvila]
QUESTIONS = ["What is this?", "Describe the picture in a few words.", "Where are things?"]


@pytest.fixture(scope="module", params=FAMILIES, ids=["llava", "vila15", "nvila"])
def checkpoint(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    request.param(path)
    return path


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llava") / "tiny"
    write_llava(path)
    return path


def made(
    captioner: NativeCaptioner, images: int, prompts: int, sampling: SamplingParams
) -> list[EngineRequest]:
    """Requests for `prompts` questions about each of some images."""
    requests = []
    for i in range(images):
        image = captioner.prepare(photo(i))
        for j in range(prompts):
            number = i * prompts + j
            requests.append(
                CaptionRequest(number, QUESTIONS[j], (image,), sampling, i, prompts, rng_key=1000 + number)
            )
    return engine_requests(captioner, requests)


def run(engine: Engine, requests: list[EngineRequest], cost: StepCost = FREE) -> dict[int, Finished]:
    engine.speculator = Speculator(cost)
    for request in requests:
        engine.add(request)
    finished: dict[int, Finished] = {}
    while engine.num_unfinished:
        finished |= {end.id: end for end in engine.step()}
    pool = engine.scheduler.pool
    engine.scheduler.prefixes.evict(pool.num_blocks)
    assert pool.num_free == pool.num_blocks
    return finished


def odd_drafts(truth: tuple[int, ...], size: int, eos: int, seed: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    garbage = tuple(rng.integers(0, size, 40).tolist())
    wrong = list(truth)
    for place in rng.permutation(len(truth))[: len(truth) // 4]:
        wrong[place] = int(rng.integers(0, size))
    half = len(truth) // 2
    return [
        (),
        garbage,
        truth,
        truth * 3,
        truth[1:],
        (garbage[0], garbage[1], *truth),
        tuple(wrong),
        (*truth[:half], eos, *truth[half:]),
        (*truth[:half], *garbage[:3], *truth[half + 1 :]),
        (*truth[:5], size + 7, -3),
        truth[:1] * 30,
    ]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_new_tokens=20, ignore_eos=True),
        SamplingParams(max_new_tokens=20, min_new_tokens=3),
        SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=0.4, top_p=0.9),
    ],
    ids=["greedy", "eos", "sampled"],
)
def test_output_is_that_of_plain_decoding(checkpoint, sampling):
    captioner = with_limits(checkpoint, max_num_seqs=8, max_batch_tokens=512)
    plain = made(captioner, 4, 3, sampling)
    expected = run(captioner.engine, plain)
    size = captioner.checkpoint.config.decoder.vocab_size
    eos = min(captioner.engine.eos_ids)
    longest = max(len(request.token_ids) for request in plain) + 20
    for limits in (
        {"max_num_seqs": 8, "max_batch_tokens": 512},
        {"max_num_seqs": 5, "max_batch_tokens": 24, "block_size": 4},
        {
            "max_num_seqs": 12,
            "max_batch_tokens": 256,
            "block_size": 8,
            "num_kv_tokens": 8 * (longest // 8 + 4),
        },
    ):
        engine = another_engine(captioner, **limits)
        for turn in range(3):  # each request meets several drafts, its batch mates others
            drafted = []
            for number, request in enumerate(plain):
                drafts = odd_drafts(expected[request.id].token_ids, size, eos, number)
                drafted.append(replace(request, draft=drafts[(number * 5 + turn * 4) % len(drafts)]))
            assert run(engine, drafted) == expected, (limits, turn)
        assert engine.counters.accepted_tokens > 0
        assert engine.counters.drafted_tokens > engine.counters.accepted_tokens
        assert engine.counters.sequence_steps < engine.counters.new_tokens
        if "num_kv_tokens" in limits:
            assert engine.scheduler.num_preemptions > 0


def test_a_right_draft_saves_steps_and_a_wrong_one_hardly_costs_any(llava):
    sampling = SamplingParams(max_new_tokens=64, ignore_eos=True)
    captioner = with_limits(llava, max_num_seqs=2, max_batch_tokens=256)
    engine = captioner.engine
    [plain] = made(captioner, 1, 1, sampling)
    truth = run(engine, [plain])[0].token_ids

    def steps(draft: tuple[int, ...], cost: StepCost) -> tuple[int, int]:
        before = replace(engine.counters)
        assert run(engine, [replace(plain, draft=draft)], cost)[0].token_ids == truth
        after = engine.counters
        return after.sequence_steps - before.sequence_steps, after.drafted_tokens - before.drafted_tokens

    assert steps(truth, FREE)[0] <= 2 + 64 // (MAX_DRAFT + 1)
    assert steps(truth, LINEAR) == (64, 0)
    # Weights are read once a step, and a row adds a tenth to that: what this machine does at small batches.
    weights = StepCost((1, 2), (1.0, 1.1))
    assert steps(truth, weights)[0] <= 12
    garbage = tuple(np.random.default_rng(1).integers(0, 90, 80).tolist())
    taken, drafted = steps(garbage, weights)
    assert taken >= 60
    assert drafted <= 24  # at a tenth of a step each


def test_stops_and_loops_within_a_verified_stretch(llava):
    captioner = with_limits(llava, max_num_seqs=2, max_batch_tokens=256)
    [plain] = made(captioner, 1, 1, SamplingParams(max_new_tokens=40, ignore_eos=True))
    truth = run(captioner.engine, [plain])[0].token_ids
    word = captioner.checkpoint.tokenizer.decode(truth[10:12]).strip()
    assert word
    for sampling in (
        SamplingParams(max_new_tokens=40, ignore_eos=True, stop=(word,)),
        SamplingParams(
            max_new_tokens=40, repetition=RepetitionRule(max_period=24, min_repeats=1, min_tokens=1)
        ),
        SamplingParams(max_new_tokens=7),
        SamplingParams(max_new_tokens=1),
    ):
        request = replace(plain, sampling=sampling)
        expected = run(captioner.engine, [request])
        assert run(captioner.engine, [replace(request, draft=truth)]) == expected
        # A model that loops forever is cut where plain decoding cuts it, however far the draft goes on.
        assert run(captioner.engine, [replace(request, draft=truth * 4)]) == expected


def test_an_end_of_sequence_within_a_verified_stretch(checkpoint):
    captioner = with_limits(checkpoint, max_num_seqs=2, max_batch_tokens=256)
    [plain] = made(captioner, 1, 1, SamplingParams(max_new_tokens=24, ignore_eos=True))
    engine = captioner.engine
    truth = run(engine, [plain])[0].token_ids
    # Call a token of the middle an end: the model then ends there by itself.
    end = next(token for token in truth[6:] if token not in truth[:6])
    engine.eos_ids = frozenset({end})
    ending = replace(plain, sampling=SamplingParams(max_new_tokens=24))
    expected = run(engine, [ending])
    assert expected[0].finish_reason is FinishReason.STOP
    assert len(expected[0].token_ids) < 24
    before = engine.counters.new_tokens
    assert run(engine, [ending]) == expected
    plainly = engine.counters.new_tokens - before
    assert run(engine, [replace(ending, draft=truth)]) == expected
    assert engine.counters.new_tokens == before + 2 * plainly  # nothing after the end is counted


# The bookkeeping alone


def followed(draft: list[int], output: list[int], sizes: list[int]) -> Draft:
    """A draft that has met `output`, which came in pieces of these sizes."""
    kept = Draft(draft)
    done = 0
    for size in sizes:
        done += size
        kept.follow(output[:done], size)
    assert done == len(output)
    return kept


def test_a_draft_follows_and_finds_its_way_back():
    draft = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
    assert followed(draft, [10, 11, 12], [1, 2]).ahead(2) == (13, 14)
    # One token stands for another: the place goes on behind it, without proof at first.
    replaced = followed(draft, [10, 99], [2])
    assert (replaced.ahead(1), replaced.num_matched) == ((12,), 0)
    # Tokens were left out, or put in: found by what came last.
    assert followed(draft, [10, 15, 16], [3]).ahead(1) == (17,)
    assert followed(draft, [10, 97, 98, 99, 11, 12], [1, 5]).ahead(1) == (13,)
    # Far away, one token proves nothing, and three do.
    far = [1, *range(100, 160), 7, 8, 9, 5]
    assert followed(far, [1, 9], [1, 1]).ahead(1) == (101,)
    assert followed(far, [1, 7, 8, 9], [1, 1, 1, 1]).ahead(1) == (5,)
    # Of two places the nearer one, and the one with the longer match before that.
    assert followed([1, 2, 3, 2, 4], [1, 9, 2], [3]).ahead(1) == (4,)
    assert followed([3, 2, 5, 7, 1, 2, 6], [8, 1, 2], [3]).ahead(1) == (6,)
    # Past the end there is nothing ahead.
    assert followed([1, 2], [1, 2, 3, 4], [4]).ahead(5) == ()


INSIDE, WORD, MARK, LINE = (bytes([kind]) for kind in TokenKind)
KINDS = 10 * INSIDE + 60 * WORD + 20 * MARK + 10 * LINE  # words from 10, marks from 70, lines from 90


def after(draft: list[int], output: list[int]) -> tuple[int, ...]:
    kept = Draft(draft, KINDS)
    kept.follow(output, len(output))
    return kept.ahead(2)


def test_a_word_stands_for_a_word_however_many_tokens_each_has():
    draft = [10, 11, 1, 2, 12, 3, 13]
    assert after(draft, [10, 11, 1]) == (2, 12)
    assert after(draft, [10, 69]) == (12, 3)  # one token for three
    assert after(draft, [10, 69, 4]) == after(draft, [10, 69, 4, 5]) == (12, 3)  # and more than one
    assert after(draft, [10, 11, 4]) == (12, 3)  # another ending
    assert after(draft, [10, 11, 1, 2, 4]) == (12, 3)  # a longer one
    assert after(draft, [10, 11, 69]) == (12, 3)  # a shorter word, and then another
    assert after(draft, [10, 11, 1, 2, 12, 3, 13, 4]) == ()


def test_what_hangs_on_a_word_goes_with_it_and_marks_and_lines_may_be_put_in():
    draft = [10, 11, 1, 70, 2, 71, 12, 70, 13, 90, 14]
    assert after(draft, [10, 69]) == (12, 70)  # a word for another that holds marks
    assert after(draft, [10, 69, 79]) == (12, 70)  # with a mark of its own
    assert after(draft, [10, 11, 1, 70, 2, 71, 12, 69]) == (13, 90)  # a word more, and a mark less
    assert after(draft, [10, 11, 1, 70, 2, 71, 12, 79]) == (13, 90)  # another mark
    assert after(draft, [10, 70]) == (11, 1)  # a mark more
    assert after(draft, [10, 90]) == after(draft, [10, 90, 91]) == (11, 1)  # lines more
    assert after(draft, [10, 11, 1, 70, 2, 71, 12, 70, 69]) == (90, 14)  # a line is no part of a word


def test_the_longer_nothing_fits_the_farther_away_the_draft_may_go_on():
    draft = [*range(10, 40), 50, 51, *range(40, 50)]
    start = [10, 11, 12]
    assert after(draft, [*start, 50]) == (14, 15)  # a word that occurs far away, for another
    assert after(draft, [*start, 50, 51]) == (15, 16)
    assert after(draft, [*start, 50, 51, 40]) == (41, 42)  # three of them there, and none here
    assert after(draft, [*start, 15]) == (14, 15)  # one that occurs near: perhaps
    assert after(draft, [*start, 15, 16]) == (17, 18)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 4), max_size=30),
    st.lists(st.integers(0, 4), max_size=30),
    st.integers(1, 7),
)
def test_a_draft_does_not_care_in_which_pieces_output_comes(draft, output, size):
    whole = Draft(draft)
    whole.follow(output, len(output))
    pieces = Draft(draft)
    for start in range(0, len(output), size):
        piece = output[start : start + size]
        pieces.follow(output[: start + len(piece)], len(piece))
    assert (pieces.next, pieces.num_matched) == (whole.next, whole.num_matched)
    assert 0 <= whole.next <= len(draft)
    assert whole.num_matched <= len(output) + 1


def test_luck_and_acceptance_are_learnt_and_forgotten():
    acceptance = Acceptance()
    sure = Grounds(MAX_MATCH)
    at_first = acceptance[sure]
    good, bad = Draft(range(400)), Draft(range(400))
    for _ in range(200):
        good.learn(acceptance, 4, 4)
    assert at_first < acceptance[sure] > 0.97
    assert good.luck > 0.95
    for _ in range(10):
        bad.learn(acceptance, 2, 0)
    assert bad.luck < 0.25
    for _ in range(120):
        bad.learn(acceptance, 0, 0)
    assert bad.luck > 0.8


def test_phrases_know_what_came_most_often_after_the_longest_context():
    phrases = Phrases()
    assert phrases.after([1, 2]) is None
    phrases.note([1, 2, 3, 4], 4)
    assert phrases.after([9, 2]) == (3, 1, SHARES // 2)  # once is no proof
    assert phrases.after([1, 2, 3]) == (4, 3, SHARES // 2)
    phrases.note([7, 2, 5], 1)  # only what is new is learnt, with what comes before it
    assert phrases.after([7]) is None
    for _ in range(9):
        phrases.note([1, 2, 3], 1)
    assert phrases.after([2]) == (3, 1, SHARES * 10 // 12)
    for _ in range(12):
        phrases.note([0, 2, 8], 1)
    assert phrases.after([2])[0] == 8
    assert phrases.after([1, 2])[0] == 3  # a longer context goes before a shorter one


def test_phrases_forget_a_generation_at_a_time_and_keep_what_is_used():
    phrases = Phrases(most=30)
    for token in range(2000):
        phrases.note([token, token + 1], 1)
        phrases.note([5, 6], 1)
        assert len(phrases) <= 2 * 30
    assert phrases.after([5]) == (6, 1, SHARES - 1)
    assert phrases.after([100]) is None
    assert phrases.after([1999]).token == 2000


def test_a_line_takes_the_likelier_of_draft_and_phrases_and_goes_on_with_both():
    draft = Draft([10, 11, 12, 13, 14, 15, 16], KINDS)
    draft.follow([10, 50], 2)  # another word for 11: nothing is proved
    phrases, acceptance = Phrases(), Acceptance()
    alone = Line(draft, [10, 50], phrases, acceptance)
    assert not alone.reach(6)
    assert alone.tokens == [12, 13, 14, 15, 16]
    assert [grounds.matched for grounds in alone.grounds] == [0, 1, 2, 3, MAX_MATCH]
    for _ in range(20):  # that word has two more tokens, which phrases have learnt
        phrases.note([50, 1, 2], 2)
        acceptance.learn(Grounds(None, 1, SHARES - 1), right=True)
        acceptance.learn(Grounds(None, 2, SHARES - 1), right=True)
        acceptance.learn(Grounds(0, 1, SHARES - 1), right=False)
    both = Line(draft, [10, 50], phrases, acceptance)
    assert both.reach(7)
    assert both.tokens == [1, 2, 12, 13, 14, 15, 16]
    assert both.grounds[0] == Grounds(None, 1, SHARES - 1)
    phrases.note([12, 13], 1)
    agreed = Line(draft, [50], Phrases(), acceptance)
    agreed._phrases = phrases
    assert agreed.reach(4)
    assert agreed.grounds[3].agree
    assert all(0 < chance < 1 for chance in both.chances)
    assert len(both.chances) == len(both.tokens)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5))
def test_phrases_do_not_care_in_which_pieces_output_comes(output, size):
    whole, pieces = Phrases(), Phrases()
    for place in range(len(output)):
        whole.note(output[: place + 1], 1)
    for start in range(0, len(output), size):
        piece = output[start : start + size]
        pieces.note(output[: start + len(piece)], len(piece))
    for place in range(len(output)):
        assert pieces.after(output[:place]) == whole.after(output[:place])
    assert all(found is None or found.context <= MAX_CONTEXT for found in [whole.after(output)])


def chunks_with(drafts: list[list[int]]) -> list[Chunk]:
    scheduler = Scheduler(BlockPool(256, 16), 64, 512)
    for i, draft in enumerate(drafts):
        scheduler.add(start_sequence(EngineRequest(i, (1, 2), draft=tuple(draft))))
    return scheduler.schedule().chunks


def test_lengths_follow_the_cost_of_a_row_the_batch_and_the_acceptance():
    draft = list(range(100))
    few, many = chunks_with([draft]), chunks_with([draft] * 32)
    room = [MAX_DRAFT] * 32
    # Flat to 8 rows, then in proportion: a small batch drafts, a large one does not.
    cost = StepCost((1, 8, 64), (1.0, 1.2, 8.0))
    [alone] = Speculator(cost).plan(few, room[:1], 512)
    assert 3 <= alone <= 8
    assert sum(Speculator(cost).plan(many, room, 512)) == 0
    assert Speculator(FREE).plan(few, room[:1], 512) == [MAX_DRAFT]
    assert Speculator(FREE).plan(few, [3], 512) == [3]
    assert Speculator(FREE).plan(few, room[:1], 6) == [4]  # two rows are the prompt's
    assert Speculator(LINEAR).plan(few, room[:1], 512) == [0]
    # Among batch mates the one with luck gets more.
    pair = chunks_with([draft, draft])
    speculator = Speculator(cost)
    for _ in range(4):
        pair[1].sequence.draft.learn(speculator.acceptance, 1, 0)
    first, second = speculator.plan(pair, room[:2], 512)
    assert first > second


def test_a_draft_takes_no_block_that_somebody_needs():
    scheduler = Scheduler(BlockPool(5, 4), 4, 64)
    for i in range(2):
        scheduler.add(start_sequence(EngineRequest(i, (1, 2, 3), draft=tuple(range(50)))))
    step = scheduler.schedule()  # a block each, so three are free, and two must stay
    assert [scheduler.room_ahead(chunk) for chunk in step.chunks] == [1 + 4, 1 + 4]
    first = scheduler.with_draft(step.chunks[0], range(50))
    assert first.draft == (0, 1, 2, 3, 4)
    assert scheduler.room_ahead(step.chunks[1]) == 1
    assert scheduler.with_draft(step.chunks[1], range(50)).draft == (0,)
    assert scheduler.pool.num_free == 2


def test_step_cost_is_measured_as_far_as_it_bends(monkeypatch):
    # A clock that steps move: flat to 8 rows, then a row more costs an eighth; now and then a second passes.
    now, asked = [0.0], []

    def step(rows: int) -> None:
        asked.append(rows)
        now[0] += max(8, rows) / 8 + 1.0 * (len(asked) % 7 == 3)

    clock = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0])
    monkeypatch.setattr(speculation, "time", clock)
    monkeypatch.setattr(speculation, "_PATIENCE_S", 1e9)
    cost = measure_step_cost(step, 512)
    assert 16 <= max(asked) <= 64  # from there on it is in proportion
    for rows in (1, 4, 8, 12, 16, 100):
        assert cost(rows) == pytest.approx(max(8, rows) / 8)
    assert cost.of_one_more(200) == pytest.approx(1 / 8)
    asked.clear()
    monkeypatch.setattr(speculation, "_PATIENCE_S", 0.0)
    measure_step_cost(step, 12)
    assert asked == [1, 1, 2, 3, 4, 6, 8, 12, 1, 2, 3, 4, 6, 8, 12]
    line = StepCost((1, 4, 8), (10.0, 10.0, 14.0))
    assert (line(1), line(4), line(6), line(16)) == (10.0, 10.0, 12.0, 22.0)
    assert (line.of_one_more(1), line.of_one_more(4), line.of_one_more(100)) == (0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="ascending"):
        StepCost((1, 1), (1.0, 1.0))
