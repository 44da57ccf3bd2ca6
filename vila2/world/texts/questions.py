"""Questions with short answers, from the truth. Presence is asked as POPE asks it (arXiv 2305.10355).

Yes and no come equally often in each task of a scene, so far as there are names for both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from vila2.errors import UsageError
from vila2.world.chance import Chance
from vila2.world.lexicon import NUMBERS, read_lexicon, with_article
from vila2.world.scene import OPPOSITE, Box, Scene, digits, place_margin, place_of
from vila2.world.texts.captions import MORE, RELATIONS, one_way

PRESENCE_PAIRS = 3  # POPE: three that are there, three that are not
Themes = tuple[str, ...]  # of the scene's world: what is not there is asked of that world's names

_POPULAR = 24  # how many of the most frequent names "popular" negatives come from
_NEAR = 8  # how many of the likeliest companions "adversarial" negatives come from
_COUNT_ONE = 0.25
_PLACE_MARGIN = 0.04  # a centre this close to a line between ninths has no clear place

_PRESENCE = ("Is there {a} in the picture?", "Can you see {a}?", "Does the picture show {a}?")
_COUNT = ("How many {plural} are there?", "Count the {plural}.")
_POSITION = ("Where is the {name}?", "In which part of the picture is the {name}?")
_READING = ("What does the sign say?", "Read the sign.")
_BOX = ("Give the box of the {name}.", "Where exactly is the {name}? Give its box.")
_AT = ("What is at {box}?",)
_COLOR = ("What color is the {name}?",)


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its one right answer; `form` is how the answer is to be read.

    form: yes_no | number | name | place | word | box | color | predicate. `names` are the things it is about,
    `box` is the true box where one is asked for, `predicate` the relation.
    """

    task: str
    question: str
    answer: str
    form: str
    names: tuple[str, ...] = ()
    predicate: str | None = None
    box: Box | None = None


def questions(scene: Scene, tasks: Sequence[str] | None = None, limit: int | None = None) -> list[Question]:
    """All questions about a scene, or those of `tasks`; with `limit`, that many of them, drawn at random."""
    chosen = tuple(TASKS) if tasks is None else tuple(tasks)
    unknown = [task for task in chosen if task not in TASKS]
    if unknown:
        raise UsageError(f"no task {unknown[0]!r}; there are {', '.join(TASKS)}")
    asked = [q for task in chosen for q in TASKS[task](scene, task, Chance("questions", task, scene.key))]
    return asked if limit is None else Chance("limit", scene.key).sample(asked, limit)


def _presence(scene: Scene, task: str, chance: Chance) -> list[Question]:
    counts = scene.counts()
    yes = chance.sample(list(counts), PRESENCE_PAIRS)
    no = _ABSENT[task](chance, counts, scene.themes)[: len(yes)]
    asked = []
    for name in chance.shuffled(yes + no):
        text = chance.pick(_PRESENCE).format(a=with_article(name))
        asked.append(Question(task, text, "yes" if name in counts else "no", "yes_no", (name,)))
    return asked


def _random_absent(chance: Chance, counts: dict[str, int], themes: Themes) -> list[str]:
    return chance.sample([name for name in read_lexicon(themes).names if name not in counts], PRESENCE_PAIRS)


def _popular_absent(chance: Chance, counts: dict[str, int], themes: Themes) -> list[str]:
    popular = [name for name in _most_popular(themes) if name not in counts]
    return chance.sample(popular[:_POPULAR], PRESENCE_PAIRS)


def _adversarial_absent(chance: Chance, counts: dict[str, int], themes: Themes) -> list[str]:
    """Names that go with those in the image: of the same theme, or of the same kind, which look alike."""
    nearness: dict[str, int] = {}
    for name in counts:
        for other, near in _companions(themes)[name]:
            if other not in counts:
                nearness[other] = nearness.get(other, 0) + near
    likely = sorted(nearness, key=lambda name: (-nearness[name], name))[:_NEAR]
    return chance.sample(likely, PRESENCE_PAIRS)


_ABSENT: dict[str, Callable[[Chance, dict[str, int], Themes], list[str]]] = {
    "presence_random": _random_absent,
    "presence_popular": _popular_absent,
    "presence_adversarial": _adversarial_absent,
}


@lru_cache(maxsize=32)
def _most_popular(themes: Themes) -> list[str]:
    """Names by how often they are drawn: early in a large theme comes first."""
    groups = read_lexicon(themes).themes.values()
    rank = {name: position / len(names) for names in groups for position, name in enumerate(names)}
    return sorted(rank, key=lambda name: (rank[name], name))


@lru_cache(maxsize=32)
def _companions(themes: Themes) -> dict[str, list[tuple[str, int]]]:
    entries = read_lexicon(themes).entries
    return {
        a.name: [
            (b.name, 2 * (a.theme == b.theme) + (a.kind == b.kind))
            for b in entries
            if a is not b and (a.theme == b.theme or a.kind == b.kind)
        ]
        for a in entries
    }


def _count(scene: Scene, task: str, chance: Chance) -> list[Question]:
    """Every repeated name, and so few of the others that "one" is the answer about half the time."""
    plurals = read_lexicon().plurals
    counts = scene.counts()
    asked = [name for name in counts if counts[name] > 1]
    if chance.below(_COUNT_ONE):
        asked += chance.sample([name for name in counts if counts[name] == 1], 1)
    return [
        Question(
            task, chance.pick(_COUNT).format(plural=plurals[name]), NUMBERS[counts[name]], "number", (name,)
        )
        for name in asked
    ]


def _relation(scene: Scene, task: str, chance: Chance) -> list[Question]:
    """For each related pair a yes/no question, and in turn which of two, or in which direction."""
    asked = []
    for relation in one_way(scene, chance):
        a, b, predicate = relation.subject, relation.object, relation.predicate
        true = chance.below(0.5)
        said = predicate if true else OPPOSITE[predicate]
        text = f"Is the {a} {RELATIONS[said]} the {b}?"
        asked.append(Question(task, text, "yes" if true else "no", "yes_no", (a, b), said))
        if chance.below(0.5):
            first, second = chance.shuffled((a, b))
            text = f"Which is {MORE[predicate]}, the {first} or the {second}?"
            asked.append(Question(task, text, a, "name", (a, b), predicate))
        else:
            text = f"Where is the {a}, seen from the {b}?"
            asked.append(Question(task, text, predicate, "predicate", (a, b), predicate))
    return asked


def _position(scene: Scene, task: str, chance: Chance) -> list[Question]:
    counts = scene.counts()
    return [
        Question(
            task, chance.pick(_POSITION).format(name=thing.name), place_of(thing.box), "place", (thing.name,)
        )
        for thing in scene.objects
        if counts[thing.name] == 1 and place_margin(thing.box) >= _PLACE_MARGIN
    ]


def _reading(scene: Scene, task: str, chance: Chance) -> list[Question]:
    if scene.sign is None:
        return []
    return [Question(task, chance.pick(_READING), scene.sign.word, "word", ("sign",))]


def _grounding(scene: Scene, task: str, chance: Chance) -> list[Question]:
    counts = scene.counts()
    asked = []
    for thing in scene.objects:
        if counts[thing.name] == 1:
            text = chance.pick(_BOX).format(name=thing.name)
            asked.append(Question(task, text, digits(thing.box), "box", (thing.name,), box=thing.box))
        if chance.below(0.5):
            text = chance.pick(_AT).format(box=digits(thing.box))
            asked.append(Question(task, text, thing.name, "name", (thing.name,), box=thing.box))
    return asked


def _color(scene: Scene, task: str, chance: Chance) -> list[Question]:
    counts = scene.counts()
    return [
        Question(task, chance.pick(_COLOR).format(name=thing.name), thing.color, "color", (thing.name,))
        for thing in scene.objects
        if counts[thing.name] == 1 and thing.color
    ]


TASKS: dict[str, Callable[[Scene, str, Chance], list[Question]]] = {
    "presence_random": _presence,
    "presence_popular": _presence,
    "presence_adversarial": _presence,
    "count": _count,
    "relation": _relation,
    "position": _position,
    "reading": _reading,
    "grounding": _grounding,
    "color": _color,
}
