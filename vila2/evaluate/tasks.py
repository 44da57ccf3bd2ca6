"""The tasks of the world: what is asked of a scene, what an answer scores, and what scores add up to (`METRICS`).

The right answer is read by the same parser as the model's, so nothing here depends on how the world words it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from vila2.errors import UsageError
from vila2.evaluate import metrics, parse, statements
from vila2.evaluate.evaluation import Metric

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


def score_answer(task: str, reply: str, right: str) -> tuple[Scores, str]:
    """The scores of a reply whose right answer is worded `right`, and that answer as the parser reads it.

    ValueError if the right answer cannot be read: then the question, not the model, is at fault.
    """
    if task in PRESENCE:
        return _score_presence(reply, right)
    if task == "grounding":
        return _score_grounding(reply, right)
    if task == "reading":
        return _score_reading(reply, right)
    read = READERS[task]
    expected, said = read(right), read(reply)
    if expected is None:
        raise ValueError(f"{task}: cannot read the right answer {right!r}")
    return _asked(said == expected, said is not None), str(expected)


def _asked(correct: bool, parsed: bool) -> Scores:
    return {"asked": 1.0, "correct": float(correct), "parsed": float(parsed)}


def _score_presence(reply: str, right: str) -> tuple[Scores, str]:
    expected, said = parse.yes_no(right), parse.yes_no(reply)
    if expected is None:
        raise ValueError(f"presence: cannot read the right answer {right!r}")
    scores = _asked(said is expected, said is not None)
    scores |= {
        "is_yes": float(expected),
        "says_yes": float(said is True),
        "hits": float(expected and said is True),
    }
    return scores, "yes" if expected else "no"


def _score_grounding(reply: str, right: str) -> tuple[Scores, str]:
    expected, said = parse.box(right), parse.box(reply)
    if expected is None:
        raise ValueError(f"grounding: cannot read the right answer {right!r}")
    overlap = metrics.iou(said, expected) if said else 0.0
    return _asked(overlap >= IOU_THRESHOLD, said is not None) | {"iou": overlap}, right


def _score_reading(reply: str, right: str) -> tuple[Scores, str]:
    expected, said = parse.normal_sign(parse.reading(right)), parse.normal_sign(parse.reading(reply))
    if not expected:
        raise ValueError(f"reading: cannot read the right answer {right!r}")
    edits = min(metrics.edit_distance(said, expected), len(expected))
    return _asked(said == expected, bool(said)) | {
        "edits": float(edits),
        "characters": float(len(expected)),
    }, expected


def _relation(text: str) -> str | None:
    said = parse.yes_no(text)
    if said is not None:
        return "yes" if said else "no"
    return parse.first_of(text, ("left", "right", "above", "below"), {"under": "below", "over": "above"})


def _color(text: str) -> str | None:
    names = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")
    return parse.first_of(text, names, {"grey": "gray", "violet": "purple"})


READERS: Mapping[str, Callable[[str], object]] = {
    "relation": _relation,
    "count": parse.number,
    "position": parse.place,
    "color": _color,
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
    Metric("captions.cut", _C, ("cut",), ("captions",), better="lower"),
    Metric("captions.words", _C, ("words",), ("captions",), better="", is_share=False),
    *_presence_metrics("pope", PRESENCE),
    *(
        metric
        for task in PRESENCE
        for metric in _presence_metrics(task.replace("presence_", "pope."), (task,))
    ),
    Metric("relation.accuracy", ("relation",), ("correct",), ("asked",)),
    Metric("count.accuracy", ("count",), ("correct",), ("asked",)),
    Metric("position.accuracy", ("position",), ("correct",), ("asked",)),
    Metric("color.accuracy", ("color",), ("correct",), ("asked",)),
    Metric("reading.exact", ("reading",), ("correct",), ("asked",)),
    Metric("reading.cer", ("reading",), ("edits",), ("characters",), better="lower"),
    Metric("grounding.accuracy", ("grounding",), ("correct",), ("asked",)),
    Metric("grounding.mean_iou", ("grounding",), ("iou",), ("asked",)),
    Metric("answers.readable", QUESTIONS, ("parsed",), ("asked",)),
)
