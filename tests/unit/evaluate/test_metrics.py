"""The arithmetic against values worked out by hand, and what must hold for any input."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vila2.evaluate import metrics
from vila2.evaluate.metrics import ObjectCounts

unit = st.floats(0, 1, allow_nan=False)
boxes = st.tuples(unit, unit, unit, unit).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)
words = st.lists(st.sampled_from("abcd"), max_size=12)


def test_objects_by_hand() -> None:
    # Mentions cat twice (there), dog twice (not there); misses the owl.
    counts = metrics.object_counts(["cat", "dog", "cat", "dog"], ["cat", "owl"])
    assert counts == ObjectCounts(hits=1, named=2, present=2, mentions=4, hallucinated=2)
    assert metrics.f1(counts.hits, counts.named, counts.present) == 0.5


def test_nothing_said_of_nothing_is_perfect() -> None:
    assert metrics.object_counts([], []) == ObjectCounts(0, 0, 0, 0, 0)
    assert metrics.f1(0, 0, 0) == 1.0
    assert metrics.f1(0, 0, 3) == 0.0


@given(words, st.sets(st.sampled_from("abcd")))
def test_objects_are_consistent(mentions: list[str], present: set[str]) -> None:
    counts = metrics.object_counts(mentions, present)
    assert 0 <= counts.hits <= min(counts.named, counts.present)
    assert counts.named - counts.hits <= counts.hallucinated <= counts.mentions == len(mentions)
    assert (counts.hallucinated == 0) == (set(mentions) <= present)


@pytest.mark.parametrize(
    ("a", "b", "value"),
    [
        ((0, 0, 1, 1), (0, 0, 1, 1), 1.0),
        ((0, 0, 0.5, 1), (0.5, 0, 1, 1), 0.0),
        ((0, 0, 0.4, 0.4), (0.2, 0.2, 0.6, 0.6), 1 / 7),
        ((0, 0, 1, 1), (0.25, 0.25, 0.75, 0.75), 0.25),
        ((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5), 0.0),
    ],
)
def test_iou_by_hand(a: metrics.Box, b: metrics.Box, value: float) -> None:
    assert metrics.iou(a, b) == pytest.approx(value)


@given(boxes, boxes)
def test_iou_is_symmetric_and_a_share(a: metrics.Box, b: metrics.Box) -> None:
    assert metrics.iou(a, b) == pytest.approx(metrics.iou(b, a))
    assert 0 <= metrics.iou(a, b) <= 1 + 1e-9
    if metrics.area(a) > 1e-6:
        assert metrics.iou(a, a) == pytest.approx(1)


@pytest.mark.parametrize(
    ("a", "b", "edits"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("STOP", "SHOP", 1), ("flaw", "lawn", 2)],
)
def test_edit_distance_by_hand(a: str, b: str, edits: int) -> None:
    assert metrics.edit_distance(a, b) == metrics.edit_distance(b, a) == edits


letters = st.text("abc", max_size=8)


@given(letters, letters, letters)
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert (metrics.edit_distance(a, b) == 0) == (a == b)
    assert metrics.edit_distance(a, c) <= metrics.edit_distance(a, b) + metrics.edit_distance(b, c)
    assert abs(len(a) - len(b)) <= metrics.edit_distance(a, b) <= max(len(a), len(b))


def test_distinct_by_hand() -> None:
    texts = [["a", "b", "a"], ["a", "b"]]
    assert metrics.distinct_n(texts, 1) == pytest.approx(2 / 5)
    assert metrics.distinct_n(texts, 2) == pytest.approx(2 / 3)  # ab ba ab
    assert metrics.distinct_n([], 1) == metrics.distinct_n([["a"]], 2) == 0.0


def test_self_bleu_by_hand() -> None:
    same = [list("abcde")] * 3
    assert metrics.self_bleu(same) == pytest.approx(1)
    assert metrics.self_bleu([list("abcd"), list("efgh")]) == 0.0
    # "a b" against "a c", unigrams: 1/2 matched, bigrams: none, so 0 with n up to 2 and 1/2 with n = 1.
    assert metrics.self_bleu([list("ab"), list("ac")], max_n=1) == pytest.approx(0.5)
    assert metrics.self_bleu([list("ab"), list("ac")], max_n=2) == 0.0
    # The shorter of the two pays a brevity penalty of exp(1 - 4/2).
    assert metrics.self_bleu([list("ab"), list("abcc")], max_n=1) == pytest.approx((math.exp(-1) + 0.5) / 2)
    assert metrics.self_bleu([list("ab")]) == 0.0


def plain_self_bleu(texts: list[list[str]], max_n: int) -> float:
    """The definition, in quadratic time."""
    total = 0.0
    for i, text in enumerate(texts):
        others = texts[:i] + texts[i + 1 :]
        logs, used = 0.0, 0
        for n in range(1, max_n + 1):
            grams = metrics.ngrams(text, n)
            if not grams:
                break
            clipped = sum(
                min(grams.count(gram), max(metrics.ngrams(other, n).count(gram) for other in others))
                for gram in set(grams)
            )
            if not clipped:
                logs = -math.inf
                break
            logs += math.log(clipped / len(grams))
            used += 1
        if used and logs > -math.inf:
            closest = min((len(o) for o in others), key=lambda length: (abs(length - len(text)), length))
            total += math.exp(logs / used + min(0.0, 1 - closest / len(text)))
    return total / len(texts)


@given(st.lists(words, min_size=2, max_size=6))
def test_self_bleu_is_its_definition(texts: list[list[str]]) -> None:
    assert metrics.self_bleu(texts, max_n=3) == pytest.approx(plain_self_bleu(texts, max_n=3))
