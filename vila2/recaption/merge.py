"""How new captions join the original text, once for all export formats.

- `replace`: the new captions stand alone.
- `concat`: the original, then the new ones, each on its own line (VILA² section 2.1: keeping the human text is
  better than replacing it).
- `qa`: the original stays the caption, and each new one becomes the answer to its prompt (VILA² section 2.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Merge = Literal["replace", "concat", "qa"]


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
        return Merged(original, turns) if turns else None
    answers = [turn.answer for turn in turns]
    if not answers:
        return None
    texts = [original, *answers] if how == "concat" and original else answers
    return Merged("\n".join(texts))


def _defuse(text: str) -> str:
    return text.replace("<image>", "<IMAGE>")
