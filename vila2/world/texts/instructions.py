"""Text-only questions and answers about words: what is a kind of what, plurals, spelling, letters, lists."""

from collections.abc import Callable

from vila2.world.chance import Chance
from vila2.world.lexicon import (
    COLORS,
    NUMBERS,
    SIGN_WORDS,
    join_words,
    read_lexicon,
    with_article,
)

Turn = tuple[str, str]


def instruction(split: str, index: int, seed: int = 0) -> list[Turn]:
    """One to three turns of text, always the same for the same arguments."""
    chance = Chance("instruction", seed, split, index)
    return [chance.pick(_MAKERS)(chance) for _ in range(1 + chance.integer(3))]


def _which_kind(chance: Chance) -> Turn:
    lexicon = read_lexicon()
    name = chance.pick(lexicon.names)
    kind = lexicon.hypernyms[name][-1]
    other = chance.pick([n for n in lexicon.names if kind not in lexicon.hypernyms[n]])
    first, second = chance.shuffled((name, other))
    return f"Which is {_kind(kind)}: {first} or {second}?", name


def _is_kind(chance: Chance) -> Turn:
    lexicon = read_lexicon()
    name = chance.pick(lexicon.names)
    kinds = lexicon.hypernyms[name]
    true = chance.below(0.5)
    kind = chance.pick(kinds if true else [k for k in _all_kinds() if k not in kinds])
    return f"Is {with_article(name)} {_kind(kind)}?", "yes" if true else "no"


def _what_kind(chance: Chance) -> Turn:
    lexicon = read_lexicon()
    name = chance.pick(lexicon.names)
    return f"What is {with_article(name)}?", _kind(lexicon.hypernyms[name][0])


def _spell(chance: Chance) -> Turn:
    word = chance.pick(SIGN_WORDS)
    return f"Spell {word}.", " ".join(word)


def _join(chance: Chance) -> Turn:
    word = chance.pick(SIGN_WORDS)
    return f"Which word is {' '.join(word)}?", word


def _letters(chance: Chance) -> Turn:
    word = chance.pick([word for word in SIGN_WORDS if len(word) <= 5])
    return f"How many letters has {word}?", NUMBERS[len(word)]


def _plural(chance: Chance) -> Turn:
    lexicon = read_lexicon()
    name = chance.pick(lexicon.names)
    return f"What is the plural of {name}?", lexicon.plurals[name]


def _repeat(chance: Chance) -> Turn:
    names = chance.sample(read_lexicon().names, 2 + chance.integer(2))
    return f"Repeat: {', '.join(names)}.", ", ".join(names)


def _count_list(chance: Chance) -> Turn:
    lexicon = read_lexicon()
    name, other = chance.sample(lexicon.names, 2)
    copies, others = 1 + chance.integer(3), 1 + chance.integer(2)
    listed = chance.shuffled([name] * copies + [other] * others)
    return f"{', '.join(listed)}: how many {lexicon.plurals[name]}?", NUMBERS[copies]


def _in_list(chance: Chance) -> Turn:
    names = chance.sample(read_lexicon().names, 4)
    asked = chance.pick(names)
    listed = names[:3] if chance.below(0.5) else names[1:]
    return f"Is {asked} in this list: {', '.join(listed)}?", "yes" if asked in listed else "no"


def _other_name(chance: Chance) -> Turn:
    lexicon = read_lexicon()
    synonym, name = chance.pick([(s, e.name) for e in lexicon.entries for s in e.synonyms])
    return f"What is another name for {with_article(synonym)}?", with_article(name)


def _sentence(chance: Chance) -> Turn:
    a, b = chance.sample(read_lexicon().names, 2)
    color = chance.pick(COLORS)
    things = (with_article(f"{color} {a}"), with_article(b))
    return f"Write a sentence about {join_words(things)}.", f"There is {join_words(things)}."


def _all_kinds() -> list[str]:
    return sorted({kind for kinds in read_lexicon().hypernyms.values() for kind in kinds})


def _kind(kind: str) -> str:
    """`an animal`; some kinds have no article."""
    bare = {"clothes": "clothing", "furniture": "furniture", "food": "food", "nature": "part of nature"}
    return bare.get(kind) or with_article(kind)


_MAKERS: tuple[Callable[[Chance], Turn], ...] = (
    _which_kind,
    _is_kind,
    _what_kind,
    _spell,
    _join,
    _letters,
    _plural,
    _repeat,
    _count_list,
    _in_list,
    _other_name,
    _sentence,
)
