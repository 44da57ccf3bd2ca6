"""What the captions of this run say after which tokens: a second opinion for drafts, and the rest of a word.

A draft that has the wrong word says nothing of the right one, of which the first token is known and the others not.
Captions of one data set and one prompt share names, phrases and beginnings, so their own past knows more.
"""

from collections.abc import Sequence as Seq
from typing import NamedTuple

MAX_CONTEXT = 3  # tokens
SHARES = 4  # steps between "seldom" and "always"
_MOST = 1 << 17  # contexts of a generation: some 30 MiB


class Successor(NamedTuple):
    """The token that came most often after `context` tokens, and how often: `share` of SHARES."""

    token: int
    context: int
    share: int


class Phrases:
    """Contexts of one to three tokens with the token after them. Two generations: the older one is forgotten whole."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._young: dict[tuple[int, ...], list[int]] = {}  # context -> [token, times, times another]
        self._old: dict[tuple[int, ...], list[int]] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def note(self, tokens: Seq[int], count: int) -> None:
        """Learn the newest `count` of `tokens`, each with what comes before it."""
        for place in range(max(1, len(tokens) - count), len(tokens)):
            for length in range(1, min(MAX_CONTEXT, place) + 1):
                self._note(tuple(tokens[place - length : place]), tokens[place])

    def _note(self, context: tuple[int, ...], token: int) -> None:
        known = self._young.get(context)
        if known is None:
            if len(self._young) >= self._most:
                self._old, self._young = self._young, {}
            known = self._young[context] = self._old.pop(context, [token, 0, 0])
        if known[0] == token:
            known[1] += 1
        else:
            known[2] += 1
            if known[2] > known[1]:  # it has been another one more often: begin again with the newest
                known[:] = [token, 1, known[1]]

    def after(self, tail: Seq[int]) -> Successor | None:
        """What comes after `tail`, by the longest context that is known."""
        for length in range(min(MAX_CONTEXT, len(tail)), 0, -1):
            context = tuple(tail[len(tail) - length :])
            known = self._young.get(context) or self._old.get(context)
            if known is not None:
                token, times, others = known
                # One time proves less than many.
                return Successor(token, length, SHARES * times // (times + others + 1))
        return None
