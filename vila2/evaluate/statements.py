"""What a caption states about a world scene: which objects it mentions, which relations, and what it reads on signs.

Works on any model's English. Finding names is the lexicon's business; here a caption is cut so that names found in a
piece mean something. What is said in another form ("a cat with a dog to its left") is not counted, for or against.
"""

import re
from collections.abc import Callable, Iterator, Mapping

from vila2.evaluate.parse import normal_sign, plain_quotes, quoted

Find = Callable[[str], Mapping[str, int]]  # text -> name -> claimed count, in order of first mention
Stated = tuple[str, str, str]  # subject, left | right | above | below, object

_PHRASES = (
    ("left", r"(?:(?:to|on|at) the )?left(?:[- ]hand)?(?: side)? of"),
    ("right", r"(?:(?:to|on|at) the )?right(?:[- ]hand)?(?: side)? of"),
    ("above", r"above|on top of|over|higher than"),
    ("below", r"below|beneath|underneath|under|lower than"),
)
_PHRASE = re.compile("|".join(rf"(?P<{name}>\b(?:{pattern})\b)" for name, pattern in _PHRASES), re.IGNORECASE)
_FRAME = re.compile(
    r"\s*(?:the |this |an? )?(?:image|picture|scene|photo|photograph|frame|background)\b", re.IGNORECASE
)
_SAME_SUBJECT = re.compile(r"(?:,|\band\b|\bbut\b)\s*(?:it\b\s*)?(?:(?:is|are|also)\b\s*)*$", re.IGNORECASE)
_SENTENCE = re.compile(r"[.;!?\n]+")
_CAPITALS = re.compile(r"\b[A-Z]{2,}\b")


def without_signs(text: str) -> str:
    """The text without what it quotes and without words in capitals: a sign that says PIZZA is no pizza."""
    text = re.sub(r"\"[^\"]*\"", " ", plain_quotes(text))
    return _CAPITALS.sub(" ", text) if re.search("[a-z]", text) else text


def mentions(text: str, find: Find) -> list[str]:
    """The names that a caption mentions, in order; one that several sentences mention stands once for each."""
    return [name for sentence in _SENTENCE.split(without_signs(text)) for name in find(sentence)]


def relations(text: str, find: Find) -> list[Stated]:
    """The relations that a caption states between names, in order.

    "The cat is left of the dog and above the apple" states two of the cat; "left of the image" none.
    """
    stated: list[Stated] = []
    subject = ""
    for sentence in _SENTENCE.split(without_signs(text)):
        start_subject = subject if re.match(r"\s*it\b", sentence, re.IGNORECASE) else ""
        for relation in _of_sentence(sentence, find, start_subject):
            stated.append(relation)
            subject = relation[0]
    return stated


def _of_sentence(sentence: str, find: Find, subject: str) -> Iterator[Stated]:
    phrases = list(_PHRASE.finditer(sentence))
    for i, phrase in enumerate(phrases):
        before = sentence[phrases[i - 1].end() if i else 0 : phrase.start()]
        after = sentence[phrase.end() : phrases[i + 1].start() if i + 1 < len(phrases) else len(sentence)]
        if _FRAME.match(after):
            continue
        names_before, names_after = list(find(before)), list(find(after))
        inverted = not names_before and not subject and len(names_after) > 1  # "left of the dog is a cat"
        if inverted:
            subject = names_after[1]
        elif names_before and not (i and len(names_before) == 1 and _SAME_SUBJECT.search(before)):
            subject = names_before[-1]
        if subject and names_after and subject != names_after[0]:
            yield subject, str(phrase.lastgroup), names_after[0]


def signs(text: str) -> list[str]:
    """What a caption says that signs say: its quotations, or else its words in capitals."""
    found = [normal_sign(part) for part in quoted(text)]
    if not found and re.search("[a-z]", text):
        found = _CAPITALS.findall(text)
    return [part for part in found if part]
