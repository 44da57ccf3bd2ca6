"""Captions that are true: what each of the named prompts asks for, from what is known of the scene.

One prompt asks for questions with their answers (`spatial_questions`); like the others it gets one text.
"""

from collections.abc import Callable
from itertools import pairwise

from vila2.errors import UsageError
from vila2.world.chance import Chance
from vila2.world.lexicon import NUMBERS, join_words, read_lexicon, with_article
from vila2.world.scene import OPPOSITE, Box, Object, Relation, Scene, digits, place_of

# The wordings of vila2/recaption/prompts.toml, so that a model trained here knows the questions of `recaption`.
CAPTION_PROMPTS: dict[str, tuple[str, ...]] = {
    "detailed": (
        "Write a detailed description of this picture, covering the main subjects, their appearance, and the setting.",
        "Tell someone who cannot see this picture what it shows: what is there, what is going on, and how it all "
        "looks.",
        "Describe only what can be clearly seen in this picture, thoroughly and in plain sentences, without lists, "
        "guesses or opinions about its beauty.",
    ),
    "brief": ("Sum up what this picture shows in one short sentence.",),
    "spatial": (
        "Describe this picture in detail, and say how the things in it are placed: what is left or right of, in front "
        "of or behind, above, below, near or far from what.",
        "Give a full account of this picture that makes clear where each thing stands relative to the others and to "
        "the viewer.",
    ),
    "grounding": (
        "Describe this picture and, after each thing you mention, give its box as [xmin,ymin,xmax,ymax] in whole "
        "numbers from 000 to 999.",
    ),
    "ocr": (
        "Read the writing in this picture: quote each legible piece of text and say briefly where it appears. If there "
        "is none, say so.",
    ),
}
# Not among those: the tokenizers of the models that exist were learnt from captions alone.
QUESTION_PROMPTS: dict[str, tuple[str, ...]] = {
    "spatial_questions": (
        "Ask up to six questions about where the things in this picture are, and answer each. Begin each question with "
        "Q: and, on the next line, its answer with A:.",
    ),
}
PROMPTS = CAPTION_PROMPTS | QUESTION_PROMPTS
PHRASES = {
    "top left": "at the top left",
    "top": "at the top",
    "top right": "at the top right",
    "left": "on the left",
    "center": "in the center",
    "right": "on the right",
    "bottom left": "at the bottom left",
    "bottom": "at the bottom",
    "bottom right": "at the bottom right",
}
RELATIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
MORE = {"left": "further left", "right": "further right", "above": "higher", "below": "lower"}

# Which relations a caption says: any of them, in any order and direction; or those of things that it names one after
# the other, in that order, every other one turned round. A small model that writes what is likeliest cannot draw lots:
# from captions of the first kind it learns to relate a thing to itself.
RELATED = ("any", "neighbours")

_OPENINGS = ("The picture shows {}.", "There {be} {}.", "This is a picture of {}.", "We see {}.")
_SIGNS = ('A {color} sign {place} reads "{word}".', 'A {color} sign {place} says "{word}".')
_BACKGROUNDS = ("Behind this is {}.", "The setting is {}.")
_WORDS = 45  # what a detailed caption tries not to exceed: it costs tokens


def caption_for(scene: Scene, kind: str, related: str = "any") -> str:
    """The answer to PROMPTS[kind]; `related` is one of RELATED."""
    if kind not in _MAKERS:
        raise UsageError(f"no caption of kind {kind!r}; there are {', '.join(_MAKERS)}")
    return _MAKERS[kind](scene, related)


def detailed_caption(scene: Scene, related: str = "any") -> str:
    """Every object with its count and place, most with colour, and the sign; then relations and the background while
    there is room in 45 words."""
    chance = Chance("detailed", scene.key)
    groups = grouped(scene)
    colored = 0.8 if len(groups) < 4 else 0.5
    things = [_thing(group, color=chance.below(colored)) + " " + _places(group) for group in groups]
    text = _opening(chance, groups, things)
    if scene.sign is not None:
        text += " " + _sign_sentence(scene, chance)
    more = [_relation_sentence(relation) for relation in _said(scene, chance, related)[:3]]
    more.insert(chance.integer(2), _background_sentence(scene, chance))
    for sentence in more:
        if len(text.split()) + len(sentence.split()) <= _WORDS:
            text += " " + sentence
    return text


def brief_caption(scene: Scene) -> str:
    chance = Chance("brief", scene.key)
    things = [_thing(group, color=False) for group in grouped(scene)]
    if scene.sign is not None:
        things.append(f'a sign that reads "{scene.sign.word}"')
    text = join_words(things) + (f" on {scene.background}" if chance.below(0.5) else "")
    return text[0].upper() + text[1:] + "."


def spatial_caption(scene: Scene, related: str = "any") -> str:
    chance = Chance("spatial", scene.key)
    groups = grouped(scene)
    things = [_thing(group, color=False) + " " + _places(group) for group in groups]
    sentences = [_opening(chance, groups, things)]
    sentences += [_relation_sentence(relation) for relation in _said(scene, chance, related)[:4]]
    if scene.sign is not None:
        sentences.append(_sign_sentence(scene, chance))
    return " ".join(sentences)


def grounding_caption(scene: Scene) -> str:
    things = [
        f"{_thing([thing], color=True)} {digits(thing.box)}" for group in grouped(scene) for thing in group
    ]
    text = f"There is {join_words(things)}."
    if scene.sign is not None:
        text += f' A sign {digits(scene.sign.box)} reads "{scene.sign.word}".'
    return text


def ocr_caption(scene: Scene) -> str:
    if scene.sign is None:
        return "There is no text in this picture."
    return f'The sign {PHRASES[place_of(scene.sign.box)]} reads "{scene.sign.word}".'


def spatial_questions(scene: Scene) -> str:
    """Where a thing is, then the relations of neighbours, asked in three ways in turn; how many there are of what comes
    more than once, if nothing else can be asked.

    All follows from the scene, as with `neighbours`, and no way of asking comes more than twice: who learns to write it
    neither has to draw lots nor repeats itself.
    """
    groups = grouped(scene)
    single = [group[0] for group in groups if len(group) == 1]
    told = [
        (f"In which part of the picture is the {thing.name}?", place_of(thing.box)) for thing in single[:1]
    ]
    pairs = neighbours(scene)
    told += [_asked_of(pairs[number % len(pairs)], number) for number in range(min(5, 3 * len(pairs)))]
    if not told:
        group = groups[0]
        told = [(f"How many {read_lexicon().plurals[group[0].name]} are there?", NUMBERS[len(group)])]
    return "\n".join(f"Q: {question}\nA: {answer}" for question, answer in told)


def _asked_of(relation: Relation, number: int) -> tuple[str, str]:
    """The question number `number` of a text, with its answer."""
    a, b, predicate = relation.subject, relation.object, relation.predicate
    if number % 3 == 0:
        return f"Where is the {a}, seen from the {b}?", predicate
    horizontal = predicate in ("left", "right")
    asked = ("left" if horizontal else "above", "right" if horizontal else "below")[number // 3]
    if number % 3 == 1:
        return f"Is the {a} {RELATIONS[asked]} the {b}?", "yes" if asked == predicate else "no"
    return f"Which is {MORE[asked]}, the {a} or the {b}?", a if asked == predicate else b


_MAKERS: dict[str, Callable[[Scene, str], str]] = {
    "detailed": detailed_caption,
    "brief": lambda scene, _: brief_caption(scene),
    "spatial": spatial_caption,
    "grounding": lambda scene, _: grounding_caption(scene),
    "ocr": lambda scene, _: ocr_caption(scene),
    "spatial_questions": lambda scene, _: spatial_questions(scene),
}


def layout(scene: Scene) -> str:
    """The scene as text alone, sorted by place: what a decoder can read before it has seen an image.

    Each thing has its centre, across and down in hundredths, before its box: what lies left of what is then a matter of
    two numbers, and a small decoder finds out sooner.
    """
    entries = []
    for thing in scene.objects:
        color = f" color {thing.color}" if thing.color else ""
        entries.append((reading_order(thing.box), f"{thing.name} {_placed(thing.box)}{color}"))
    if scene.sign is not None:
        sign = scene.sign
        entries.append((reading_order(sign.box), f"sign {sign.word} {_placed(sign.box)} color {sign.color}"))
    return "; ".join(text for _, text in sorted(entries)) + f"; {scene.background}"


def _placed(box: Box) -> str:
    across, down = (int(50 * (low + high)) for low, high in ((box[0], box[2]), (box[1], box[3])))
    return f"{across:02d} {down:02d} at {digits(box)}"


def reading_order(box: tuple[float, float, float, float]) -> tuple[int, float]:
    """Rows of a third of the image, then from left to right."""
    return int((box[1] + box[3]) * 1.5), box[0] + box[2]


def grouped(scene: Scene) -> list[list[Object]]:
    """The objects by name, in reading order."""
    groups: dict[str, list[Object]] = {}
    for thing in sorted(scene.objects, key=lambda thing: reading_order(thing.box)):
        groups.setdefault(thing.name, []).append(thing)
    return list(groups.values())


def one_way(scene: Scene, chance: Chance) -> list[Relation]:
    """Each related pair once, in one of its two directions, shuffled."""
    pairs = [relation for relation in scene.relations() if relation.subject < relation.object]
    return [
        relation
        if chance.below(0.5)
        else Relation(relation.object, OPPOSITE[relation.predicate], relation.subject)
        for relation in chance.shuffled(pairs)
    ]


def neighbours(scene: Scene) -> list[Relation]:
    """The relations of things that are named one after the other, in reading order; every other one turned round."""
    known = {(relation.subject, relation.object): relation for relation in scene.relations()}
    names = [group[0].name for group in grouped(scene) if len(group) == 1]
    pairs = [pair for pair in pairwise(names) if pair in known]
    return [known[pair[::-1] if number % 2 else pair] for number, pair in enumerate(pairs)]


def _said(scene: Scene, chance: Chance, related: str) -> list[Relation]:
    return one_way(scene, chance) if related == "any" else neighbours(scene)


def _opening(chance: Chance, groups: list[list[Object]], things: list[str]) -> str:
    return chance.pick(_OPENINGS).format(join_words(things), be="is" if len(groups[0]) == 1 else "are")


def _thing(group: list[Object], color: bool) -> str:
    """`a brown dog`, `two apples`."""
    first = group[0]
    adjective = f"{first.color} " if color and first.color else ""
    if len(group) == 1:
        return with_article(adjective + first.name)
    return f"{NUMBERS[len(group)]} {adjective}{read_lexicon().plurals[first.name]}"


def _places(group: list[Object]) -> str:
    return join_words(dict.fromkeys(PHRASES[place_of(thing.box)] for thing in group))


def _relation_sentence(relation: Relation) -> str:
    return f"The {relation.subject} is {RELATIONS[relation.predicate]} the {relation.object}."


def _sign_sentence(scene: Scene, chance: Chance) -> str:
    assert scene.sign is not None
    place = PHRASES[place_of(scene.sign.box)]
    return chance.pick(_SIGNS).format(color=scene.sign.color, place=place, word=scene.sign.word)


def _background_sentence(scene: Scene, chance: Chance) -> str:
    return chance.pick(_BACKGROUNDS).format(scene.background)
