"""Mixtures: shares as the weights say, every document of a source once an epoch, all by arithmetic."""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vila2.errors import UsageError
from vila2.train.examples import Document
from vila2.train.mixture import BLOCK, WINDOW, Mixture, derived_seed, permuted, permuted_in_stretches


@dataclass
class Counted:
    """Documents that are their number."""

    name: str
    length: int | None
    stretch: int = 1

    def document(self, index: int) -> Document:
        return Document(f"{self.name}/{index}", "text", text=str(index))


@given(st.integers(1, 400), st.integers(0, 2**64 - 1))
def test_permuted_is_a_permutation(length: int, key: int) -> None:
    assert sorted(permuted(i, length, key) for i in range(length)) == list(range(length))


def test_permutations_differ_by_key_and_mix_well() -> None:
    length = 1000
    found = {tuple(permuted(i, length, derived_seed(key)) for i in range(length)) for key in range(20)}
    assert len(found) == 20
    for order in found:
        assert sum(abs(b - a) == 1 for a, b in pairwise(order)) < 20
        halves = Counter(order[i] < length // 2 for i in range(length // 2))
        assert 180 < halves[True] < 320


@settings(max_examples=50)
@given(st.integers(1, 700), st.integers(2, 9), st.integers(0, 2**64 - 1))
def test_stretches_are_permuted_and_stay_near_each_other(length: int, stretch: int, key: int) -> None:
    order = [permuted_in_stretches(i, length, stretch, key) for i in range(length)]
    assert sorted(order) == list(range(length))
    window = WINDOW * stretch
    for start in range(0, length // stretch * stretch, window):
        touched = {place // stretch for place in order[start : start + window]}
        assert len(touched) <= WINDOW + 1


@settings(max_examples=30)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 99))
def test_shares_follow_the_weights(weights: list[float], seed: int) -> None:
    mixture = Mixture([Counted(f"s{i}", None) for i in range(len(weights))], weights, seed)
    numbers = Counter(mixture.place(n)[0] for n in range(BLOCK))
    for number, weight in enumerate(weights):
        assert abs(numbers[number] - BLOCK * weight / sum(weights)) <= len(weights)
        assert numbers[number] >= 1


def test_every_window_of_a_step_holds_about_its_share() -> None:
    mixture = Mixture([Counted("a", None), Counted("b", None)], [3, 1], 5)
    for start in range(0, BLOCK, 64):
        count = sum(mixture.place(n)[0] for n in range(start, start + 64))
        assert 13 <= count <= 19  # 16 of 64, spread evenly and not at random


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(0, 9), st.sampled_from([1, 4]))
def test_each_epoch_of_a_source_holds_every_document_once(length: int, seed: int, stretch: int) -> None:
    mixture = Mixture([Counted("a", length, stretch), Counted("b", None)], [1, 2], seed)
    drawn = [place for source, place in map(mixture.place, range(4 * length * 3)) if source == 0]
    epochs = [drawn[i : i + length] for i in range(0, len(drawn) - length + 1, length)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    if length > 30:
        assert epochs[0] != epochs[1]


def test_an_endless_source_never_repeats() -> None:
    mixture = Mixture([Counted("a", None), Counted("b", 3)], [1, 1])
    drawn = [place for source, place in map(mixture.place, range(2 * BLOCK)) if source == 0]
    assert drawn == list(range(len(drawn)))


@settings(max_examples=30)
@given(st.integers(0, 3 * BLOCK))
def test_consumed_counts_what_came_before(n: int) -> None:
    mixture = Mixture([Counted("a", 10), Counted("b", None), Counted("c", 7)], [1, 2.5, 0.3], 3)
    counted = Counter(mixture.place(m)[0] for m in range(n))
    assert mixture.consumed(n) == {"a": counted[0], "b": counted[1], "c": counted[2]}


def test_any_example_is_found_at_once() -> None:
    far = 10**12 + 7
    one, other = (Mixture([Counted("a", 10**9), Counted("b", None)], [1, 3], 11) for _ in range(2))
    other.place(5)
    assert one.place(far) == other.place(far)
    assert one.document(far).key == other.document(far).key


def test_the_seed_decides_the_order() -> None:
    orders = {
        tuple(Mixture([Counted("a", 50)], None, seed).place(n)[1] for n in range(50)) for seed in range(5)
    }
    assert len(orders) == 5


def test_without_weights_sources_count_by_their_length() -> None:
    mixture = Mixture([Counted("a", 300), Counted("b", 100)])
    assert mixture.num_examples == 400
    assert Counter(mixture.place(n)[0] for n in range(BLOCK)) == {0: 3072, 1: 1024}
    assert [item["share"] for item in mixture.describe()] == [3072, 1024]
    assert Mixture([Counted("a", 300), Counted("b", None)], [1, 1]).num_examples is None


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        ([], None, "at least one source"),
        ([Counted("a", 1), Counted("a", 2)], None, "the same name"),
        ([Counted("a", None)], None, "is endless"),
        ([Counted("a", 1)], [1, 2], "as many weights"),
        ([Counted("a", 1)], [-1], "as many weights"),
        ([Counted("a", 1)], [0], "as many weights"),
        ([Counted("a", 1)], [float("nan")], "as many weights"),
        ([Counted("a", 0)], [1], "holds no documents"),
    ],
)
def test_what_is_no_mixture_is_refused(
    sources: list[Counted], weights: list[float] | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Mixture(sources, weights)
