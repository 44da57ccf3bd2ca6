"""How new captions join the original text, once for all export formats.

- `replace`: the new captions stand alone.
- `concat`: the original, then the new ones, each on its own line (VILA² section 2.1: keeping the human text is
  better than replacing it).
- `qa`: the original stays the caption, and each new one becomes the answer to its prompt (VILA² section 2.2). One that
  is questions and answers itself, as a prompt may ask for (ALLaVA, arXiv 2402.11684), becomes those.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Merge = Literal["replace", "concat", "qa"]
# "Q: ", "**Question 2:** ", "3. A: ": what a line of a conversation begins with.
_MARK = re.compile(r"[\s*#>-]*(?:\d{1,3}[.)]\s*)?(?P<kind>Q|A|Question|Answer)[\s\d*]*:[\s*]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Turn:
    """One question about the image and its answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Merged:
    """What a trainer reads of one sample: its caption, and with `qa` the turns that follow it."""

    text: str
    turns: tuple[Turn, ...] = ()


def merge(original: str, new: Sequence[Turn], how: Merge) -> Merged | None:
    """Join the original with what was captioned anew. None when nothing of the kind is there.

    An `<image>` inside a text would be taken for an image by a trainer, so it becomes `<IMAGE>`.
    """
    original = _defuse(original.strip())
    turns = tuple(Turn(_defuse(turn.question), _defuse(turn.answer.strip())) for turn in new)
    if how == "qa":
        turns = tuple(part for turn in turns for part in _parts(turn))
        return Merged(original, turns) if turns else None
    answers = [turn.answer for turn in turns]
    if not answers:
        return None
    texts = [original, *answers] if how == "concat" and original else answers
    return Merged("\n".join(texts))


def conversation(text: str) -> tuple[Turn, ...] | None:
    """The questions and answers of a text in lines that begin with Q: and A:, and lines that go on from them.

    None if it is no such text. A question without an answer, which a cut text ends with, is left out, and so is what
    introduces the first in one line with a colon.
    """
    said: list[tuple[bool, list[str]]] = []  # is it a question, and its lines
    before: list[str] = []
    for line in filter(str.strip, text.splitlines()):
        mark = _MARK.match(line)
        if mark is not None:
            said.append((mark["kind"][0] in "Qq", [line[mark.end() :]]))
        else:
            (said[-1][1] if said else before).append(line)
    introduction = " ".join(before).strip()
    if not said or not said[0][0] or (introduction and (len(before) > 1 or not introduction.endswith(":"))):
        return None
    parts = [(is_question, " ".join(" ".join(lines).split())) for is_question, lines in said]
    return tuple(
        Turn(question, answer)
        for (asks, question), (asks_again, answer) in pairwise(parts)
        if asks and not asks_again and question and answer
    )


def _parts(turn: Turn) -> tuple[Turn, ...]:
    found = conversation(turn.answer)
    return (turn,) if found is None else found


def _defuse(text: str) -> str:
    return text.replace("<image>", "<IMAGE>")
