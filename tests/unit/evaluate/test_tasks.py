"""What answers score, by hand and for every question that the world asks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vila2.errors import UsageError
from vila2.evaluate.given import REFERENCE_METRICS
from vila2.evaluate.tasks import (
    HEADLINES,
    METRICS,
    PRESENCE,
    TASKS,
    expand_tasks,
    score_answer,
    score_caption,
    task_of,
)
from vila2.world import Background, Object, Scene, Sign, World, read_lexicon, texts
from vila2.world.texts import Question

find = read_lexicon().find


def make_scene(sign: str | None = "STOP") -> Scene:
    """Two cats at the top and a dog below an owl."""
    things = (
        Object("cat", (0.1, 0.1, 0.2, 0.2), None),
        Object("cat", (0.7, 0.1, 0.8, 0.2), None),
        Object("owl", (0.4, 0.3, 0.6, 0.5), "brown"),
        Object("dog", (0.4, 0.7, 0.6, 0.9), "red"),
    )
    panel = Sign(sign, (0.1, 0.9, 0.3, 0.98), "red") if sign else None
    return Scene(0, "dev", 0, "fluent", things, panel, Background("plain", "blue"))


def test_caption_by_hand() -> None:
    text = (
        "There are two cats, a horse and an owl. The owl is above the dog. The owl is left of the horse. "
        'A sign says "SHOP".'
    )
    scores = score_caption(text, make_scene(), find)
    assert {name: scores[name] for name in ("named", "hits", "present", "mentions", "hallucinated")} == {
        "named": 4,  # cat horse owl dog
        "hits": 3,
        "present": 3,
        "mentions": 7,  # cat horse owl | owl dog | owl horse
        "hallucinated": 2,
    }
    assert (scores["hallucinates"], scores["precision"], scores["recall"]) == (1, 0.75, 1)
    assert scores["f1"] == pytest.approx(6 / 7)
    assert scores["counts_right"] == 3
    assert (scores["relations_stated"], scores["relations_decided"], scores["relations_true"]) == (2, 2, 1)
    assert (
        scores["sign_exact"],
        scores["sign_mentioned"],
        scores["sign_edits"],
        scores["sign_characters"],
    ) == (0, 1, 1, 4)


def test_relations_with_repeated_names_are_not_decided() -> None:
    scores = score_caption("A cat is left of an owl. The dog is below the owl.", make_scene(), find)
    assert (scores["relations_stated"], scores["relations_decided"], scores["relations_true"]) == (2, 1, 1)
    assert scores["counts_right"] == 2  # one cat is said, two are there


def test_silent_caption() -> None:
    scores = score_caption("", make_scene(), find)
    assert (scores["named"], scores["precision"], scores["recall"], scores["f1"], scores["hallucinates"]) == (
        0,
    ) * 5
    assert (scores["sign_edits"], scores["sign_characters"]) == (4, 4)


def test_invented_sign() -> None:
    scores = score_caption('A cat. A sign says "GO".', make_scene(sign=None), find)
    assert scores["sign_invented"] == 1
    assert "sign_exact" not in scores


@pytest.mark.parametrize(
    ("form", "answer", "reply", "correct"),
    [
        ("yes_no", "yes", "Yes, there is.", 1),
        ("yes_no", "no", "Yes", 0),
        ("yes_no", "no", "purple", 0),
        ("number", "two", "2", 1),
        ("number", "two", "There are three", 0),
        ("name", "hot dog", "The hot dog.", 1),
        ("name", "hot dog", "the dog", 0),
        ("place", "top left", "in the upper left corner", 1),
        ("place", "top", "top left", 0),
        ("word", "STOP", 'It says "stop".', 1),
        ("word", "STOP", "SHOP", 0),
        ("color", "gray", "It is grey.", 1),
        ("predicate", "above", "The owl is above the dog", 1),
        ("predicate", "left", "right", 0),
        ("box", "[100,100,300,300]", "[100,100,300,280]", 1),
        ("box", "[100,100,300,300]", "[200,200,400,400]", 0),
    ],
)
def test_answers(form: str, answer: str, reply: str, correct: int) -> None:
    scores, _ = score_answer(Question("count", "?", answer, form), reply, find)
    assert (scores["asked"], scores["correct"]) == (1, correct)


def test_presence_counts_what_pope_needs() -> None:
    asked = [("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"), ("no", "maybe")]
    scored = [
        score_answer(Question("presence_random", "?", right, "yes_no"), reply, find)[0]
        for right, reply in asked
    ]
    totals = {name: sum(scores[name] for scores in scored) for name in scored[0]}
    assert totals == {"asked": 5, "correct": 2, "parsed": 4, "is_yes": 2, "says_yes": 2, "hits": 1}


def test_reading_counts_characters() -> None:
    question = Question("reading", "?", "STOP", "word")
    assert score_answer(question, "SHOP", find)[0]["edits"] == 1
    long_winded = score_answer(question, "no idea what it could be", find)[0]
    assert (long_winded["edits"], long_winded["characters"]) == (4, 4)  # never worse than to say nothing


def test_grounding_scores_its_overlap() -> None:
    scores, shown = score_answer(
        Question("grounding", "?", "[000,000,400,400]", "box"), "[200,200,600,600]", find
    )
    assert scores["iou"] == pytest.approx(1 / 7)
    assert shown == "[000,000,400,400]"
    assert (
        score_answer(Question("grounding", "?", "[000,000,400,400]", "box"), "left", find)[0]["parsed"] == 0
    )


def test_naming_a_box_is_a_task_of_its_own() -> None:
    assert task_of(Question("grounding", "What is at [..]?", "cat", "name")) == "naming"
    assert task_of(Question("relation", "Which is higher?", "cat", "name")) == "relation"


@given(st.sampled_from(["pretrain", "heldout"]), st.integers(0, 300))
def test_the_truth_scores_full_marks(split: str, index: int) -> None:
    scene = World().scene(split, index)
    scores = score_caption(texts.detailed_caption(scene), scene, find)
    assert scores["f1"] == 1.0
    assert scores["hallucinated"] == 0
    assert scores["counts_right"] == scores["present"]
    assert scores["relations_true"] == scores["relations_stated"] == scores["relations_decided"]
    assert scores.get("sign_exact", 1.0) == 1.0
    assert scores.get("sign_invented", 0.0) == 0.0
    for question in texts.questions(scene):
        marks, _ = score_answer(question, question.answer, find)
        assert marks["correct"] == marks["parsed"] == 1.0, question


def test_every_task_of_the_world_is_asked_and_has_a_metric() -> None:
    assert set(texts.TASKS) == set(TASKS) - {"captions"}
    assert {task for metric in METRICS for task in metric.tasks} == {*TASKS, "naming"}
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_headlines_are_figures_that_exist() -> None:
    of_a_set = {f"diversity.{name}" for name in ("unique", "distinct_1", "distinct_2", "self_bleu")}
    known = {metric.name for metric in (*METRICS, *REFERENCE_METRICS)} | of_a_set
    named = [name for group in HEADLINES.values() for name in group]
    assert set(named) <= known
    assert len(named) == len(set(named))
    accuracies = {name for name in known if name.count(".") == 1 and name.endswith((".accuracy", ".exact"))}
    assert accuracies <= set(named)  # no task is left out


def test_task_names() -> None:
    assert expand_tasks(["all"]) == TASKS
    assert expand_tasks(["count", "presence", "captions"]) == ("captions", *PRESENCE, "count")
    with pytest.raises(UsageError, match="no task 'counting'; there are all, presence, captions"):
        expand_tasks(["counting"])
    with pytest.raises(UsageError, match="no task given"):
        expand_tasks([])


def test_a_question_that_cannot_be_read_is_the_worlds_fault() -> None:
    with pytest.raises(ValueError, match="count: cannot read the right answer 'lots' as number"):
        score_answer(Question("count", "?", "lots", "number"), "two", find)
