"""Two results in pairs: by hand, against chance, and where they do not fit each other."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vila2.errors import UsageError
from vila2.evaluate import Evaluation, Record, compare

SETTINGS: dict[str, Any] = {"split": "dev", "style": "fluent", "objects": "1-5", "seed": 0}


def answer(
    scene: int, correct: float, task: str = "count", question: str = "How many?", **scores: float
) -> Record:
    marks = {"asked": 1.0, "correct": float(correct), "parsed": 1.0, **scores}
    return Record(scene, task, question, "two", "two" if correct else "three", marks)


def result(records: Iterable[Record], name: str = "a", **settings: Any) -> Evaluation:
    return Evaluation(name, "digest", "cpu", SETTINGS | settings, {}, tuple(records), 1.0)


def of_answers(correct: Iterable[float], name: str = "a", **more: Any) -> Evaluation:
    return result((answer(scene, value, **more) for scene, value in enumerate(correct)), name)


def test_by_hand() -> None:
    """Ten scenes: both right in 3, only A in 1, only B in 5, none in 1."""
    a, b = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 1, 1, 1, 0]
    found = compare(of_answers(a), of_answers(b, "b"))
    accuracy = found.metrics["count.accuracy"]
    assert (found.a, found.b, found.scenes, found.answers, found.unpaired) == ("a", "b", 10, 10, 0)
    assert (accuracy.a, accuracy.b, accuracy.value) == (0.4, 0.8, pytest.approx(0.4))
    assert accuracy.mcnemar == pytest.approx(2 * (1 + 6) / 2**6)  # of 6 that differ, at most 1 to A
    # Swaps of the 6 scenes that differ: as far apart as 5 to 1 are 5-1, 1-5, 6-0 and 0-6, 14 of 64 ways.
    assert accuracy.p == pytest.approx(14 / 64, abs=0.03)
    assert accuracy.low is not None
    assert accuracy.high is not None
    assert accuracy.low <= 0.0 < 0.4 < accuracy.high


def test_pairing_sees_what_two_intervals_do_not() -> None:
    """A weak model and one that is right on the same scenes and a few more: each varies more than they differ."""
    rng = np.random.default_rng(0)
    easy = rng.random(200) < 0.5
    better = easy | (rng.random(200) < 0.1)
    found = compare(of_answers(easy), of_answers(better, "b")).metrics["count.accuracy"]
    spread = 1.96 * np.sqrt(0.25 / 200)
    assert 0 < found.value < 2 * spread  # intervals of the two overlap
    assert found.low is not None
    assert found.low > 0
    assert found.p < 0.005
    assert found.mcnemar is not None
    assert found.mcnemar < 0.005


def test_swapped_results_give_the_mirror_image() -> None:
    rng = np.random.default_rng(1)
    a, b = of_answers(rng.random(60) < 0.5), of_answers(rng.random(60) < 0.7, "b")
    there, back = (compare(*pair).metrics["count.accuracy"] for pair in ((a, b), (b, a)))
    assert back.value == -there.value
    assert (back.low, back.high) == (pytest.approx(-there.high), pytest.approx(-there.low))  # type: ignore[operator]
    assert (back.p, back.mcnemar) == (there.p, there.mcnemar)


def test_chance_is_seldom_called_a_difference() -> None:
    rng = np.random.default_rng(2)
    ps = []
    for _ in range(60):
        scores = rng.random((2, 40)) < 0.6
        ps.append(compare(of_answers(scores[0]), of_answers(scores[1], "b")).metrics["count.accuracy"].p)
    assert np.mean(np.array(ps) < 0.05) < 0.12
    assert np.mean(ps) > 0.4


def test_questions_of_a_scene_count_together() -> None:
    """The same twenty answers are weaker evidence when they are of two scenes than of twenty."""
    a, b = [0] * 20, [1] * 20
    many = compare(of_answers(a), of_answers(b, "b")).metrics["count.accuracy"]
    asked = [
        [answer(i // 10, value, question=f"{i}?") for i, value in enumerate(values)] for values in (a, b)
    ]
    few = compare(result(asked[0]), result(asked[1], "b")).metrics["count.accuracy"]
    assert many.value == few.value == 1.0
    assert many.p < 0.01
    assert few.p == pytest.approx(0.5, abs=0.05)  # both scenes swapped or none: 2 of 4 ways


def test_order_and_what_only_one_was_asked_do_not_matter() -> None:
    a = [answer(scene, scene % 2) for scene in range(8)]
    b = [answer(scene, 1) for scene in range(8)]
    plain = compare(result(a), result(b, "b"))
    extra = [answer(3, 0, "color", "What color?"), answer(90, 0), answer(2, 0, question="Count the cats.")]
    mixed = compare(result([*extra, *reversed(a)]), result(b, "b"))
    assert mixed.metrics == plain.metrics
    assert (plain.unpaired, mixed.unpaired) == (0, 3)
    assert mixed.answers == plain.answers == 8


def test_a_figure_that_only_one_has_is_left_out() -> None:
    """No yes was said by B: it has no precision, and the two cannot differ in it."""

    def presence(says_yes: Mapping[int, float]) -> list[Record]:
        return [
            answer(s, 1, "presence_random", "Is there?", is_yes=1, says_yes=yes, hits=yes)
            for s, yes in says_yes.items()
        ]

    found = compare(result(presence({0: 1, 1: 1})), result(presence({0: 0, 1: 0}), "b"))
    assert "pope.precision" not in found.metrics
    assert found.metrics["pope.recall"].value == -1.0
    assert found.metrics["pope.yes_ratio"].better == ""


@pytest.mark.parametrize("name", ["split", "style", "objects", "seed"])
def test_other_scenes_are_refused(name: str) -> None:
    a = of_answers([1, 0])
    b = replace(a, settings=SETTINGS | {name: "other"})
    with pytest.raises(
        UsageError, match=rf"of different scenes \({name} is {SETTINGS[name]!r} and 'other'\)"
    ):
        compare(a, b)


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(UsageError, match="no question in common"):
        compare(of_answers([1, 0]), of_answers([1, 0], task="color"))
    with pytest.raises(UsageError, match="no question in common"):
        compare(of_answers([1, 0]), result([]))
