"""Alt-text as the web writes it: short, of one or two things, and sometimes wrong, vague or about something else."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from vila2.world.chance import Chance
from vila2.world.lexicon import plural_of, with_article
from vila2.world.scene import Scene
from vila2.world.settings import AltNoise
from vila2.world.world import World

Kind = Literal["true", "wrong", "vague", "junk"]

_ONE = ("{a}", "{x}", "photo of {a}", "{x} picture", "my {x}", "{a} clip art", "cute {x}", "{x} stock image")
_TWO = (
    "{a} and {b}",
    "{x} and {y}",
    "{x}, {y}",
    "{x} with {y}",
    "photo of {a} and {b}",
    "picture of {x} and {y}",
)
_VAGUE = (
    "nice picture",
    "some {kinds}",
    "a lot of things",
    "my favorite photo",
    "{kinds}",
    "look at this",
    "a sign",
    "a scene",
)
_JUNK = (
    "click here to buy now",
    "free shipping on all orders",
    "best price of the week",
    "image 0{n}",
    "thumbnail {n}",
    "logo",
    "read more",
    "subscribe to our news",
    "page {n} of 9",
    "banner",
)
_SIGN = ("{text} {word} sign", "{text}, sign {word}", "{text} {word}")


@dataclass(frozen=True, slots=True)
class AltText:
    """`wrong`: at least one thing it names is not in the image."""

    text: str
    kind: Kind


def alt_text(scene: Scene, noise: AltNoise | None = None) -> AltText:
    """The alt-text of a scene: always the same for the same scene and noise."""
    noise = noise or AltNoise()
    chance = Chance("alt", scene.key)
    draw = chance.random()
    if draw < noise.junk:
        return AltText(chance.pick(_JUNK).format(n=1 + chance.integer(9)), "junk")
    lexicon = scene.lexicon
    names = chance.sample(list(scene.counts()), 1 if chance.below(noise.one_name) else 2)
    if draw < noise.junk + noise.vague:
        text = chance.pick(_VAGUE)
        if text == "a sign" and scene.sign is None:
            text = "a picture"
        kind = chance.pick(lexicon.hypernyms[names[0]])
        return AltText(text.format(kinds=kind if kind in _NO_PLURAL else plural_of(kind)), "vague")
    said: list[str] = []
    for name in names:
        said.append(_another(chance, scene, said, name) if chance.below(noise.wrong) else name)
    words = [chance.pick((name, name, *lexicon.synonyms[name][:1])) for name in said]
    if len(words) == 1:
        text = chance.pick(_ONE).format(x=words[0], a=with_article(words[0]))
    else:
        text = chance.pick(_TWO).format(
            x=words[0], y=words[1], a=with_article(words[0]), b=with_article(words[1])
        )
    if scene.sign is not None and chance.below(noise.sign):
        text = chance.pick(_SIGN).format(text=text, word=scene.sign.word)
    return AltText(text, "true" if said == names else "wrong")


_NO_PLURAL = ("clothes", "furniture", "food", "fruit", "nature")


def _another(chance: Chance, scene: Scene, said: list[str], name: str) -> str:
    """A name that is not in the image: often of the same kind, as people err."""
    lexicon = scene.lexicon
    counts = scene.counts()
    if chance.below(0.5):
        near = [e.name for e in lexicon.entries if e.kind == lexicon.by_name[name].kind]
        near = [other for other in near if other not in counts and other not in said]
        if near:
            return chance.pick(near)
    while True:
        other = chance.pick(lexicon.names)
        if other not in counts and other not in said:
            return other


def alt_rates(world: World, split: str, scenes: int) -> dict[str, float]:
    """How often each kind of alt-text came in the first `scenes` scenes, and how many words they had."""
    texts = [alt_text(world.scene(split, index), world.settings.alt) for index in range(scenes)]
    kinds = Counter(text.kind for text in texts)
    rates: dict[str, float] = {kind: kinds[kind] / scenes for kind in ("true", "wrong", "vague", "junk")}
    return {**rates, "words": sum(len(text.text.split()) for text in texts) / scenes}
