"""What to make of a caption: keep it, trim it, ask again with other sampling, or say why it is not good.

The rules, in the order they are asked:

- the captioner failed (`finish_reason` error): an error row;
- empty: ask again; empty to the end of the ladder is an error row, so that no trainer ever meets it as a caption;
- a loop (`finish_reason` repetition): ask again; after the ladder it is kept, marked `repetitive`;
- cut by the length limit: trimmed back to the end of a sentence where at least half the text remains (then `ok`),
  else `truncated`. With `ignore_eos` the full length is what was asked for, so it is `ok` as it stands.
"""

import re

from vila2.config import Truncation
from vila2.types import Caption, ErrorKind, FinishReason, SampleError, Status, Verdict

_CLOSERS = "\"'\u201d\u2019)]\u00bb"  # quotes and brackets that close after a sentence
_OPENERS = "\"'\u201c\u2018([\u00ab"
_WIDE = "\u3002\uff01\uff1f"  # the Chinese and Japanese full stop, exclamation and question mark
_END = re.compile(rf"[.!?\u2026{_WIDE}]+[{re.escape(_CLOSERS)}]*(?=\s|$)|[{_WIDE}]+")
# Words before a full stop that ends no sentence.
_ABBREVIATIONS = frozenset(
    {"mr", "mrs", "ms", "dr", "st", "no", "vs", "etc", "e.g", "i.e", "fig", "jr", "sr", "prof", "approx"}
)


def judge(
    caption: Caption, *, attempts_left: int, truncation: Truncation = "trim", ignore_eos: bool = False
) -> Verdict:
    """The verdict on one caption; `retry` is set only while attempts are left."""
    text = caption.text.strip()
    if caption.finish_reason is FinishReason.ERROR:
        return Verdict(Status.ERROR, "")
    if not text:
        return Verdict(Status.ERROR, "", retry=attempts_left > 0)
    if caption.finish_reason is FinishReason.REPETITION:
        return Verdict(Status.REPETITIVE, text, retry=attempts_left > 0)
    if caption.finish_reason is FinishReason.LENGTH and not ignore_eos:
        trimmed = trim_to_sentence(text) if truncation == "trim" else None
        if trimmed is None:
            return Verdict(Status.TRUNCATED, text)
        return Verdict(Status.OK, trimmed, trimmed=trimmed != text)
    return Verdict(Status.OK, text)


def error_of(caption: Caption) -> SampleError:
    """Why a caption that ended as an error row has no text."""
    if caption.error is not None:
        return caption.error
    if caption.finish_reason is FinishReason.ERROR:
        return SampleError(ErrorKind.ENGINE_ERROR, "the captioner failed without saying why")
    return SampleError(ErrorKind.EMPTY_CAPTION, "the model wrote nothing, in every attempt")


def trim_to_sentence(text: str) -> str | None:
    """`text` up to its last sentence end, or None when less than half of it would remain."""
    for match in reversed(list(_END.finditer(text))):
        if match.end() * 2 < len(text):
            return None
        if _ends_sentence(text, match):
            return text[: match.end()]
    return None


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    """A lone full stop may also belong to an abbreviation, an initial, a list number or a cut decimal."""
    if match.group().rstrip(_CLOSERS) != ".":
        return True
    words = text[: match.start()].split()
    word = words[-1].lstrip(_OPENERS).lower() if words else ""
    if not word or word in _ABBREVIATIONS or (len(word) == 1 and word.isalpha()):
        return False
    at_line_start = text[: match.start()].rpartition("\n")[2].strip() == word
    at_end = match.end() == len(text)
    return not (word.isdigit() and (at_line_start or at_end))
