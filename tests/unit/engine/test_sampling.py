"""Sampling and loop detection, each against its definition."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vila2.engine.repetition import advance_runs, find_loop, find_loop_reference, new_runs, update_runs
from vila2.engine.sampler import (
    best_tokens,
    choose_tokens,
    sample_row,
    sample_row_reference,
    sample_tokens,
    uniform,
)
from vila2.engine.scheduler import Chunk
from vila2.engine.sequence import EngineRequest, Sequence, start_sequence
from vila2.ops.head import MOST_TOP
from vila2.ops.linear import Linear, pack
from vila2.ops.native import native
from vila2.ops.top import linear_top
from vila2.types import RepetitionRule, SamplingParams


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 3), max_size=60),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(1, 20),
)
def test_loops_are_found_as_the_definition_finds_them(tokens, max_period, min_repeats, min_tokens):
    rule = RepetitionRule(max_period, min_repeats, min_tokens)
    runs, advanced = new_runs(rule), new_runs(rule)
    output: list[int] = []
    for token in tokens:
        output.append(token)
        update_runs(runs, output)
        expected = find_loop_reference(output, rule)
        assert find_loop(runs, rule) == expected
        assert advance_runs(advanced, output, rule) == expected
        assert (advanced == runs).all()


@pytest.mark.skipif(not hasattr(native, "find_loop"), reason="vila2._C is not built")
def test_wrong_calls_of_the_loop_search_are_refused():
    runs = new_runs(RepetitionRule(8, 3, 6))
    assert native is not None
    for wrong in (runs.astype("int64"), runs[::2], runs.reshape(2, 4)):
        with pytest.raises(ValueError, match="runs"):
            native.find_loop(wrong, [1, 2], 3, 6)
    for tokens in ([], [-1], [1, 2**31]):
        with pytest.raises(ValueError, match="tokens"):
            native.find_loop(runs, tokens, 3, 6)
    with pytest.raises(TypeError):
        native.find_loop(runs, ["a"], 3, 6)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="positive"):
        native.find_loop(runs, [1], 0, 6)
    assert not runs.any()


def test_a_cut_loop_keeps_its_first_pass():
    rule = RepetitionRule(max_period=8, min_repeats=3, min_tokens=6)
    runs = new_runs(rule)
    output = [9, 8]
    for token in [1, 2, 3] * 3:
        output.append(token)
        update_runs(runs, output)
    repeated = find_loop(runs, rule)
    assert output[: len(output) - repeated] == [9, 8, 1, 2, 3]


def sequence(**sampling) -> Sequence:
    rng_key = sampling.pop("rng_key", 1)
    return start_sequence(EngineRequest(0, (1, 2), sampling=SamplingParams(**sampling), rng_key=rng_key))


def next_tokens(logits: torch.Tensor, sequences: list[Sequence], eos: set[int] | None = None) -> list[int]:
    chunks = [Chunk(one, len(one.tokens)) for one in sequences]
    return [token for [token] in sample_tokens(logits.clone(), chunks, frozenset(eos or ()))]


def test_greedy_takes_the_best_and_minimum_tokens_hold_back_the_end():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    assert next_tokens(logits, [sequence()], {1}) == [1]
    assert next_tokens(logits, [sequence(min_new_tokens=1)], {1}) == [2]
    assert next_tokens(logits, [sequence(ignore_eos=True)], {1, 2}) == [3]


def test_sampling_follows_the_distribution_cut_by_top_k_and_top_p():
    logits = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))

    def frequencies(**sampling) -> np.ndarray:
        draws = [
            next_tokens(logits[None], [sequence(temperature=1.0, rng_key=key, **sampling)])[0]
            for key in range(4000)
        ]
        return np.bincount(draws, minlength=4) / len(draws)

    np.testing.assert_allclose(frequencies(), [0.1, 0.4, 0.2, 0.3], atol=0.03)
    np.testing.assert_allclose(frequencies(top_k=2), [0, 4 / 7, 0, 3 / 7], atol=0.03)
    # 0.4 + 0.3 reaches 0.65, so the third token is never needed.
    np.testing.assert_allclose(frequencies(top_p=0.65), [0, 4 / 7, 0, 3 / 7], atol=0.03)
    np.testing.assert_allclose(frequencies(top_p=1e-9), [0, 1, 0, 0])


def test_a_draw_depends_on_its_key_and_step_and_not_on_the_batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 50, generator=generator)
    sequences = [sequence(temperature=1.5, top_p=0.9, rng_key=key) for key in range(5)]
    together = next_tokens(logits, sequences)
    alone = [next_tokens(logits[i : i + 1], sequences[i : i + 1])[0] for i in range(5)]
    assert together == alone
    assert len({uniform(key, step) for key in range(50) for step in range(50)}) == 2500
    assert abs(np.mean([uniform(7, step) for step in range(10_000)]) - 0.5) < 0.01


@pytest.mark.parametrize(
    "spread", [0.0, 1.0, 6.0]
)  # flat: the head never reaches top_p; peaked: it always does
@pytest.mark.parametrize("top_p", [0.3, 0.95, 1.0])
def test_the_head_of_a_long_vocabulary_gives_what_the_whole_gives(spread, top_p):
    generator = torch.Generator().manual_seed(1)
    # Distinct values: among equal ones either is a right answer.
    logits = (
        torch.randn(5000, generator=generator) * spread + torch.randperm(5000, generator=generator) * 1e-5
    )
    for key in range(40):
        one = sequence(temperature=0.8, top_p=top_p, rng_key=key)
        assert sample_row(logits, one) == sample_row_reference(logits, one)


class Head:
    """A decoder that is a head and no more: `hidden` are its logits, with the columns that want to win moved up."""

    def __init__(self, size: int) -> None:
        self.lm_head = Linear(size, size, bias=False)
        self.lm_head.set_packed(pack(torch.eye(size), None, torch.float32))
        self.config = SimpleNamespace(vocab_size=size)
        self.finds_top = True
        self.num_whole = 0

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.num_whole += len(hidden)
        return self.lm_head(hidden)

    def top(self, hidden: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return linear_top(hidden, self.lm_head, *rest)


@pytest.mark.skipif(native is None, reason="vila2._C is not built")
def test_the_best_scores_alone_give_the_tokens_of_all_scores():
    """Greedy, top-k and whole-vocabulary sequences, drafted and not, together and alone."""
    size = 700
    head = Head(size)
    samplings: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_k": MOST_TOP, "top_p": 0.8},
        {"temperature": 1.0, "top_k": MOST_TOP + 1},
        {"temperature": 1.0, "top_p": 0.9},
        {"min_new_tokens": 2},
        {"ignore_eos": True, "temperature": 0.5, "top_k": 3},
    ]
    logits = torch.randn(3 * len(samplings), size, generator=torch.Generator().manual_seed(0))
    logits[:, 9] += 4.0
    best = logits.argmax(-1).tolist()
    eos = frozenset({9, 11})
    chunks = []
    for i, sampling in enumerate(samplings):
        one = sequence(rng_key=i, **sampling)
        chunks.append(Chunk(one, len(one.tokens), draft=tuple(best[3 * i : 3 * i + 2])))
    expected = sample_tokens(logits.clone(), chunks, eos)
    assert choose_tokens(cast(Any, head), logits, chunks, eos) == expected
    assert head.num_whole == 3 * 2  # of the two that all scores decide
    for i, chunk in enumerate(chunks):
        alone = choose_tokens(cast(Any, head), logits[3 * i : 3 * i + 3], [chunk], eos)
        assert alone == expected[i : i + 1]
    assert best_tokens(cast(Any, head), logits) == best
