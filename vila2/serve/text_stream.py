"""A caption while it is written: the part of its text that will not change any more."""

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"  # the end of the tokens is the start of a character


class TextStream:
    """Give it the tokens so far, again and again; it returns what is new of the text.

    Joined, the pieces and what `finish` returns are the final text, but for a loop that was cut when a part of it
    had been given out. Space at both ends is left out, and nothing is given out that may turn into a stop string.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: tuple[str, ...] = ()) -> None:
        self._decode, self._stop = decode, stop
        self._start = self._read = (
            0  # tokens from `_start` on are decoded anew, those before `_read` are in `_text`
        )
        self._text = ""
        self._sent = 0

    def push(self, tokens: Sequence[int]) -> str:
        """The text that is certain now and was not before."""
        before = self._decode(tokens[self._start : self._read])
        now = self._decode(tokens[self._start :])
        if len(now) > len(before) and not now.endswith(_INCOMPLETE):
            self._text += now[len(before) :]
            self._start, self._read = self._read, len(tokens)
        text = self._text.lstrip()
        return self._take(text, self._certain(text))

    def finish(self, text: str) -> str:
        """What is left of the whole `text`."""
        given, self._sent = text[self._sent :], len(text)
        return given

    def _certain(self, text: str) -> int:
        """How many characters cannot be taken back."""
        ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            return len(text[: min(ends)].rstrip())
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        return len(text[: len(text) - held].rstrip())

    def _take(self, text: str, end: int) -> str:
        given = text[self._sent : end]
        self._sent = max(self._sent, end)
        return given


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
