"""The tasks of the world: what is asked of a scene, what an answer scores, and what scores add up to (`METRICS`).

The right answer is read by the same parser as the model's, so nothing here depends on how the world words it.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

from vila2.errors import UsageError
from vila2.evaluate import metrics, parse, statements
from vila2.evaluate.evaluation import Metric
from vila2.world.lexicon import COLORS

CAPTIONS = "captions"
PRESENCE = ("presence_random", "presence_popular", "presence_adversarial")
QUESTIONS = (*PRESENCE, "relation", "count", "position", "color", "reading", "grounding")
TASKS = (CAPTIONS, *QUESTIONS)
GROUPS: dict[str, tuple[str, ...]] = {"all": TASKS, "presence": PRESENCE}
IOU_THRESHOLD = 0.5

Scores = dict[str, float]


class Sign(Protocol):
    @property
    def word(self) -> str: ...


class Scene(Protocol):
    """What is asked of `vila2.world.Scene` here."""

    @property
    def sign(self) -> Sign | None: ...
    def counts(self) -> dict[str, int]: ...
    def holds(self, subject: str, predicate: str, other: str) -> bool | None: ...


class Question(Protocol):
    """What is asked of `vila2.world.texts.Question` here. `form` says how an answer is to be read."""

    @property
    def task(self) -> str: ...
    @property
    def form(self) -> str: ...
    @property
    def answer(self) -> str: ...


def expand_tasks(names: Iterable[str]) -> tuple[str, ...]:
    """Task and group names to tasks, in the order of TASKS. UsageError for one that is neither."""
    wanted: set[str] = set()
    for name in names:
        if name not in GROUPS and name not in TASKS:
            raise UsageError(f"no task {name!r}; there are {', '.join((*GROUPS, *TASKS))}")
        wanted.update(GROUPS.get(name, (name,)))
    if not wanted:
        raise UsageError(f"no task given; there are {', '.join((*GROUPS, *TASKS))}")
    return tuple(task for task in TASKS if task in wanted)


def score_caption(text: str, scene: Scene, find: statements.Find) -> Scores:
    """What a detailed caption gets right and wrong about its scene."""
    present = scene.counts()
    counts = metrics.object_counts(statements.mentions(text, find), present)
    claimed = find(statements.without_signs(text))
    stated = statements.relations(text, find)
    decided = [v for v in (_verdict(scene, relation) for relation in stated) if v is not None]
    scores: Scores = {
        "captions": 1,
        "hits": counts.hits,
        "named": counts.named,
        "present": counts.present,
        "mentions": counts.mentions,
        "hallucinated": counts.hallucinated,
        "hallucinates": counts.hallucinated > 0,
        "precision": counts.hits / counts.named if counts.named else float(not present),
        "recall": counts.hits / counts.present if counts.present else 1.0,
        "f1": metrics.f1(counts.hits, counts.named, counts.present),
        "counts_right": sum(claimed.get(name) == count for name, count in present.items()),
        "relations_stated": len(stated),
        "relations_decided": len(decided),
        "relations_true": sum(decided),
        "words": len(parse.words(text)),
    }
    return {name: float(value) for name, value in (scores | _score_signs(text, scene.sign)).items()}


def _verdict(scene: Scene, relation: statements.Stated) -> bool | None:
    """Whether a stated relation holds; one with what is not there does not. None where it cannot be said."""
    subject, predicate, other = relation
    present = scene.counts()
    return scene.holds(subject, predicate, other) if subject in present and other in present else False


def _score_signs(text: str, sign: Sign | None) -> Scores:
    said = statements.signs(text)
    if sign is None:
        return {"without_sign": 1, "sign_invented": bool(said)}
    word = parse.normal_sign(sign.word)
    edits = min((metrics.edit_distance(part, word) for part in said), default=len(word))
    return {
        "with_sign": 1,
        "sign_exact": word in said,
        "sign_mentioned": bool(said),
        "sign_edits": min(edits, len(word)),
        "sign_characters": len(word),
    }


def score_answer(question: Question, reply: str, find: statements.Find) -> tuple[Scores, str]:
    """The scores of a reply, and the right answer as the parser of its form reads it.

    ValueError if the right answer cannot be read: then the question, not the model, is at fault.
    """
    read: Callable[[str], Any] = READERS.get(question.form) or partial(_name, find=find)
    expected, said = read(question.answer), read(reply)
    if expected is None:
        raise ValueError(
            f"{question.task}: cannot read the right answer {question.answer!r} as {question.form}"
        )
    scores: Scores = {"asked": 1, "correct": said == expected, "parsed": said is not None}
    if question.form == "yes_no":
        scores |= {"is_yes": expected == "yes", "says_yes": said == "yes"}
        scores["hits"] = scores["is_yes"] and scores["says_yes"]
    elif question.form == "box":
        overlap = metrics.iou(said, expected) if said else 0.0
        scores |= {"iou": overlap, "correct": overlap >= IOU_THRESHOLD}
    elif question.form == "word":
        edits = metrics.edit_distance(said or "", expected)
        scores |= {"edits": min(edits, len(expected)), "characters": len(expected)}
    if question.task == "relation":
        scores |= {f"asked_{question.form}": 1, f"correct_{question.form}": scores["correct"]}
    shown = question.answer if question.form == "box" else str(expected)
    return {name: float(value) for name, value in scores.items()}, shown


def task_of(question: Question) -> str:
    """The task that an answer counts for: to name what is in a box is no grounding."""
    return "naming" if question.task == "grounding" and question.form == "name" else question.task


def _name(text: str, find: statements.Find) -> str | None:
    return next(iter(find(text)), None)


def _yes_no(text: str) -> str | None:
    said = parse.yes_no(text)
    return None if said is None else "yes" if said else "no"


def _predicate(text: str) -> str | None:
    return parse.first_of(text, ("left", "right", "above", "below"), {"under": "below", "over": "above"})


def _color(text: str) -> str | None:
    return parse.first_of(text, COLORS, {"grey": "gray", "violet": "purple"})


def _word(text: str) -> str | None:
    return parse.normal_sign(parse.reading(text)) or None


READERS: Mapping[str, Callable[[str], Any]] = {
    "yes_no": _yes_no,
    "number": parse.number,
    "place": parse.place,
    "word": _word,
    "box": parse.box,
    "color": _color,
    "predicate": _predicate,
}


def _presence_metrics(name: str, tasks: tuple[str, ...]) -> tuple[Metric, ...]:
    return (
        Metric(f"{name}.accuracy", tasks, ("correct",), ("asked",)),
        Metric(f"{name}.precision", tasks, ("hits",), ("says_yes",)),
        Metric(f"{name}.recall", tasks, ("hits",), ("is_yes",)),
        Metric(f"{name}.f1", tasks, ("hits", "hits"), ("says_yes", "is_yes")),
        Metric(f"{name}.yes_ratio", tasks, ("says_yes",), ("asked",), better=""),
    )


_C = (CAPTIONS,)
METRICS: tuple[Metric, ...] = (
    Metric("objects.precision", _C, ("hits",), ("named",)),
    Metric("objects.recall", _C, ("hits",), ("present",)),
    Metric("objects.f1", _C, ("hits", "hits"), ("named", "present")),
    Metric("objects.f1_per_image", _C, ("f1",), ("captions",)),
    Metric("objects.precision_per_image", _C, ("precision",), ("captions",)),
    Metric("objects.recall_per_image", _C, ("recall",), ("captions",)),
    Metric("chair.i", _C, ("hallucinated",), ("mentions",), better="lower"),
    Metric("chair.s", _C, ("hallucinates",), ("captions",), better="lower"),
    Metric("captions.counts_right", _C, ("counts_right",), ("present",)),
    Metric("captions.relations_true", _C, ("relations_true",), ("relations_decided",)),
    Metric("captions.relations", _C, ("relations_stated",), ("captions",), better="", is_share=False),
    Metric("captions.sign_exact", _C, ("sign_exact",), ("with_sign",)),
    Metric("captions.sign_cer", _C, ("sign_edits",), ("sign_characters",), better="lower"),
    Metric("captions.sign_mentioned", _C, ("sign_mentioned",), ("with_sign",)),
    Metric("captions.sign_invented", _C, ("sign_invented",), ("without_sign",), better="lower"),
    Metric("captions.cut", _C, ("cut",), ("ended",), better="lower"),
    Metric("captions.words", _C, ("words",), ("captions",), better="", is_share=False),
    *_presence_metrics("pope", PRESENCE),
    *(
        metric
        for task in PRESENCE
        for metric in _presence_metrics(task.replace("presence_", "pope."), (task,))
    ),
    Metric("relation.accuracy", ("relation",), ("correct",), ("asked",)),
    Metric("relation.yes_no", ("relation",), ("correct_yes_no",), ("asked_yes_no",)),
    Metric("relation.which", ("relation",), ("correct_name",), ("asked_name",)),
    Metric("relation.direction", ("relation",), ("correct_predicate",), ("asked_predicate",)),
    Metric("count.accuracy", ("count",), ("correct",), ("asked",)),
    Metric("position.accuracy", ("position",), ("correct",), ("asked",)),
    Metric("color.accuracy", ("color",), ("correct",), ("asked",)),
    Metric("reading.exact", ("reading",), ("correct",), ("asked",)),
    Metric("reading.cer", ("reading",), ("edits",), ("characters",), better="lower"),
    Metric("grounding.accuracy", ("grounding",), ("correct",), ("asked",)),
    Metric("grounding.mean_iou", ("grounding",), ("iou",), ("asked",)),
    Metric("naming.accuracy", ("naming",), ("correct",), ("asked",)),
    Metric("answers.readable", (*QUESTIONS, "naming"), ("parsed",), ("asked",)),
)

# The figures that come first, by what was asked, each in a few words; diversity is that of the captions as a whole.
HEADLINES: Mapping[str, Mapping[str, str]] = {
    "detailed captions": {
        "objects.f1": "names said, against names there",
        "objects.precision": "names said that are there",
        "objects.recall": "names there that are said",
        "chair.i": "mentions of what is not there",
        "chair.s": "captions with such a mention",
        "captions.counts_right": "names there, said in the right number",
        "captions.relations_true": "stated relations (left of, ...) that hold",
        "captions.sign_exact": "signs, quoted to the letter",
        "captions.words": "words in a caption",
        "diversity.unique": "captions that differ",
        "diversity.distinct_2": "pairs of words that differ",
        "cider": "CIDEr; 1 is the 100 of papers",
    },
    "questions": {
        "pope.accuracy": "is there a ...? (half there, half not)",
        "pope.yes_ratio": "of these, answered yes",
        "pope.random.accuracy": "not there: any name",
        "pope.popular.accuracy": "not there: frequent names",
        "pope.adversarial.accuracy": "not there: names that go with the scene",
        "relation.accuracy": "left, right, above, below",
        "count.accuracy": "how many ...?",
        "position.accuracy": "where in the picture?",
        "color.accuracy": "what color?",
        "reading.exact": "signs, read to the letter",
        "reading.cer": "wrong letters of signs",
        "grounding.accuracy": "boxes with an IoU of 0.5 or more",
        "naming.accuracy": "what is in a box?",
        "answers.readable": "answers of the asked form (others are wrong)",
    },
}
