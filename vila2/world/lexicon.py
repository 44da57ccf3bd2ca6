"""The world's words: names, what else they are called, what they are kinds of; and which of them a text mentions.

`names.tsv` is the table of objects. Nothing here depends on pictures, so captions of any origin can be judged by it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")
NUMBERS = ("no", "one", "two", "three", "four", "five")
# Three to six letters; none is a name, so that a caption which quotes a sign mentions no object by it.
# fmt: off
SIGN_WORDS = (
    "STOP", "EXIT", "OPEN", "SALE", "CAFE", "HOTEL", "PARK", "BANK", "FOOD", "SHOP", "SLOW", "PUSH", "PULL",
    "FREE", "WARM", "COLD", "HOT", "ICE", "BAR", "GYM", "ZOO", "TOUR", "MUSIC", "FRESH", "LUNCH", "MENU",
    "KEEP", "LEFT", "RIGHT", "NORTH", "SOUTH", "EAST", "WEST", "DANGER", "CLOSED", "HELP", "QUIET", "BEACH",
    "FARM", "MARKET", "TOYS", "CINEMA", "POLICE", "SCHOOL", "STAGE", "TICKET", "WATER", "WIFI", "YIELD",
    "ZONE", "AHEAD", "QUEUE", "JUICE", "VIP", "LOST", "FOUND", "HELLO", "DRIVE", "GARAGE", "MUSEUM",
)
# fmt: on
_GROUPS = {"animal": ("bird", "insect"), "food": ("fruit", "vegetable", "drink")}
_IRREGULAR_KINDS = {
    "clothes": "clothes",
    "furniture": "furniture",
    "food": "food",
    "fruit": "fruit",
    "nature": "nature",
}
_MODIFIERS = frozenset((*COLORS, "small", "big", "large", "little", "grey"))


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of names.tsv."""

    name: str
    icon: str
    kind: str
    theme: str
    synonyms: tuple[str, ...]
    plural: str


@dataclass(frozen=True)
class Lexicon:
    """Names in the order of the table; everything else follows from the table."""

    entries: tuple[Entry, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.entries)

    @cached_property
    def by_name(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.entries}

    @cached_property
    def synonyms(self) -> dict[str, tuple[str, ...]]:
        return {entry.name: entry.synonyms for entry in self.entries}

    @cached_property
    def plurals(self) -> dict[str, str]:
        return {entry.name: entry.plural for entry in self.entries}

    @cached_property
    def hypernyms(self) -> dict[str, tuple[str, ...]]:
        """`owl` -> (`bird`, `animal`), the nearest first."""
        wider = {narrow: wide for wide, group in _GROUPS.items() for narrow in group}
        return {e.name: (e.kind, wider[e.kind]) if e.kind in wider else (e.kind,) for e in self.entries}

    @cached_property
    def themes(self) -> dict[str, tuple[str, ...]]:
        """What tends to be seen together: theme -> names."""
        themes: dict[str, list[str]] = {}
        for entry in self.entries:
            themes.setdefault(entry.theme, []).append(entry.name)
        return {theme: tuple(names) for theme, names in themes.items()}

    @cached_property
    def _forms(self) -> dict[str, tuple[str, bool]]:
        """Every written form, in lower case -> its name, and whether it is a plural."""
        forms: dict[str, tuple[str, bool]] = {}
        for entry in self.entries:
            for synonym in entry.synonyms:
                forms[synonym] = (entry.name, False)
                forms[plural_of(synonym)] = (entry.name, True)
        for entry in self.entries:  # a name goes before another's synonym
            forms[entry.plural] = (entry.name, True)
        for entry in self.entries:
            forms[entry.name] = (entry.name, False)
        return forms

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        ordered = sorted(self._forms, key=len, reverse=True)  # "hot dog" before "dog"
        return re.compile(r"(?<![\w-])(?:" + "|".join(map(re.escape, ordered)) + r")(?![\w-])")

    def find(self, text: str) -> dict[str, int]:
        """The names that `text` mentions, in order of first mention, each with the count that it claims.

        The longest form wins ("hot dog" is no dog). "three apples" claims three, "an apple" one, "apples" two. Within
        a sentence such claims add up ("a dog on the left and a dog on the right"); from sentence to sentence the
        largest counts, since a text may come back to a thing. "the dog" and a bare "dog" claim no further one.
        """
        found: dict[str, int] = {}
        for sentence in re.split(r"[.!?;\n]", text.lower()):
            for name, count in self._claims(sentence).items():
                found[name] = max(found.get(name, 0), count)
        return {name: count for name, count in found.items() if count > 0}

    def _claims(self, sentence: str) -> dict[str, int]:
        stated: dict[str, int] = {}  # by number words
        implied: dict[str, int] = {}  # by a bare noun
        for match in self._pattern.finditer(sentence):
            name, plural = self._forms[match[0]]
            count = _number_before(sentence[: match.start()])
            if count is None:
                implied[name] = max(implied.get(name, 0), 2 if plural else 1)
            else:
                stated[name] = stated.get(name, 0) + count
                implied.setdefault(name, 0)
        return {name: stated.get(name, count) for name, count in implied.items()}

    def plural(self, name: str, count: int) -> str:
        """`name` as it follows a number."""
        return name if count == 1 else self.plurals[name]


def _number_before(text: str) -> int | None:
    """The number word that governs what comes next, looking over colours and sizes: "two red ..." -> 2."""
    for word in reversed(re.findall(r"[\w-]+|[.,;:()\[\]]", text[-60:])[-4:]):
        if word in NUMBERS:
            return NUMBERS.index(word)
        if word in ("a", "an"):
            return 1
        if word.isdigit() and len(word) < 3:
            return int(word)
        if word not in _MODIFIERS:
            return None
    return None


def plural_of(noun: str) -> str:
    """The regular plural."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def with_article(noun: str) -> str:
    """`an owl`, `a unicorn`."""
    vowel = noun[0] in "aeio" or noun.startswith(("umbrella", "hourglass"))
    return f"{'an' if vowel else 'a'} {noun}"


def join_words(parts: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *head, last = parts
    return f"{', '.join(head)} and {last}" if head else last


def kind_plural(kind: str) -> str:
    return _IRREGULAR_KINDS.get(kind) or plural_of(kind)


@lru_cache(maxsize=32)
def read_lexicon(themes: tuple[str, ...] = ()) -> Lexicon:
    """The table that is part of the package, or the part of it that is of these themes."""
    if themes:
        return Lexicon(tuple(entry for entry in read_lexicon().entries if entry.theme in themes))
    text = (files("vila2.world") / "assets" / "names.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines() if not line.startswith("#"))
    return Lexicon(
        tuple(
            Entry(
                name,
                icon,
                kind,
                theme,
                tuple(s.strip() for s in also.split(",") if s.strip()),
                plural or plural_of(name),
            )
            for name, icon, kind, theme, also, plural in rows
        )
    )
