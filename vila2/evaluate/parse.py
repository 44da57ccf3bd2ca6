"""What a model's free text says: yes or no, a number, a box, a quoted word. None when it does not say.

The rules are for answers of any model, not for our own wording: "No, there isn't.", "I count two", "[ 12, 34,50,60 ]".
"""

import re
from collections.abc import Iterable, Mapping

Box = tuple[float, float, float, float]  # xmin, ymin, xmax, ymax as shares of the image, 0 to 1

NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
BOX_SCALE = 1000  # a box is written in thousandths of the image, 000 to 999

_YES = {"yes", "yeah", "yep", "yup", "true", "correct", "indeed", "certainly", "definitely"}
_NO = {"no", "nope", "not", "false", "incorrect", "none", "never", "cannot", "without", "neither", "nor"}
_NUMBERS = {word: value for value, word in enumerate(NUMBER_WORDS)}
_STRAIGHT = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
_WORD = re.compile(r"[a-z]+(?:'t)?|\d+")
_AFFIRMED = re.compile(r"\b(?:there (?:is|are)|it is|it does|i (?:can )?see)\b")
_ONE = re.compile(r"\b(?:is|see|just|only) (?:an?|a single)\b")
_BOX = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]")
_QUOTED = re.compile(r"\"([^\"]+)\"|(?<!\w)'([^']+)'(?!\w)")
_SAYS = re.compile(r"\b(?:says|say|reads|read|is|states|shows|displays)\b:?\s+", re.IGNORECASE)


def plain_quotes(text: str) -> str:
    """The text with straight quotation marks and apostrophes."""
    return text.translate(_STRAIGHT)


def words(text: str) -> list[str]:
    """Lower-case words and numbers; "isn't" is one word."""
    return _WORD.findall(plain_quotes(text).lower())


def yes_no(text: str) -> bool | None:
    """Yes or no: the first word if it says so, else what the first sentence affirms or denies."""
    sentence = re.split(r"[.!?\n]", text.strip().lower(), maxsplit=1)[0]
    found = words(sentence)
    if not found:
        return None
    if found[0] in _YES:
        return True
    if found[0] in _NO:
        return False
    if any(word in _NO or word.endswith("'t") for word in found):
        return False
    if any(word in _YES for word in found) or _AFFIRMED.search(sentence):
        return True
    return None


def number(text: str) -> int | None:
    """The first number, in digits or as a word up to twenty; "none" and "no" mean 0 where no number stands."""
    found = words(text)
    for word in found:
        if word.isdigit():
            return int(word[:9])
        if word in _NUMBERS:
            return _NUMBERS[word]
    if any(word in ("none", "no") or word.endswith("'t") for word in found):
        return 0
    if found and (found[0] in ("a", "an", "single", "once") or _ONE.search(text.lower())):
        return 1
    return None


def box(text: str) -> Box | None:
    """The first [xmin,ymin,xmax,ymax] in integers 0 to 999, as shares of the image. None if it is no box:
    a coordinate above 999, or an empty or reversed side."""
    match = _BOX.search(text)
    if match is None:
        return None
    if any(len(part) > 4 for part in match.groups()):
        return None
    xmin, ymin, xmax, ymax = (int(part) for part in match.groups())
    if max(xmin, ymin, xmax, ymax) >= BOX_SCALE or xmin >= xmax or ymin >= ymax:
        return None
    return xmin / BOX_SCALE, ymin / BOX_SCALE, xmax / BOX_SCALE, ymax / BOX_SCALE


def quoted(text: str) -> list[str]:
    """What stands in quotation marks, in order. An apostrophe within a word is none."""
    return [(double or single).strip() for double, single in _QUOTED.findall(plain_quotes(text))]


def reading(text: str) -> str:
    """What an answer says that a sign says: the first quotation, else what follows "says", else all of it."""
    found = quoted(text)
    if found:
        return found[0]
    after = _SAYS.split(text.strip(), maxsplit=1)
    return normal_sign(after[-1])


def normal_sign(text: str) -> str:
    """A sign's text for comparison: upper case, single spaces, no punctuation at its ends."""
    return re.sub(r"^\W+|\W+$", "", " ".join(text.upper().split()))


def place(text: str) -> str | None:
    """One of the nine places ("top left", "top", ..., "center"); "upper", "lower", "middle" and "centre" will do."""
    found = set(words(text))
    row = (
        "top"
        if found & {"top", "upper", "above"}
        else "bottom"
        if found & {"bottom", "lower", "below"}
        else ""
    )
    column = "left" if "left" in found else "right" if "right" in found else ""
    if row or column:
        return f"{row} {column}".strip()
    return "center" if found & {"center", "centre", "middle", "central"} else None


def first_of(text: str, options: Iterable[str], spelled: Mapping[str, str] | None = None) -> str | None:
    """The first word of `text` that is one of the options; `spelled` maps other spellings to them."""
    known = {option: option for option in options} | dict(spelled or {})
    return next((known[word] for word in words(text) if word in known), None)
