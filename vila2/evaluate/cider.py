"""CIDEr-D as pycocoevalcap computes it (Vedantam, Zitnick and Parikh, arXiv:1411.5726), to the last digits.

Two habits of that code are kept, because published figures have them: the length penalty counts bigrams, and with
one image every weight is 0, so the score is 0. Its Java tokenizer is replaced by `tokenize`, which gives the same
tokens for plain sentences; `cider` itself takes tokens.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from vila2.evaluate.parse import plain_quotes

Gram = tuple[str, ...]

MAX_N = 4
SIGMA = 6.0
_TOKEN = re.compile(
    r"(?:[a-z]\.){2,}|(?:mrs?|ms|dr)\.(?=\s)"  # u.s., mr.
    r"|\w+(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b"
    r"|\w+(?:[-./,:]\w+)*|[$%&#@+=*()\[\]{}]"
)
_JOINED = re.compile(r"\b(can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b))")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def tokenize(text: str) -> list[str]:
    """The tokens that the Java tokenizer gives: lower case, no punctuation, contractions apart ("it", "'s")."""
    plain = _JOINED.sub(r"\1 ", plain_quotes(text).lower())
    return [_BRACKETS.get(token, token) for token in _TOKEN.findall(plain)]


def cider(
    captions: Mapping[str, Sequence[str]], references: Mapping[str, Sequence[Sequence[str]]]
) -> dict[str, float]:
    """key -> score (0 to 10) of a tokenised caption against its references; the corpus's score is their mean.

    The document frequencies are those of `references`, whose keys must be those of `captions`, each with at least one.
    """
    if captions.keys() != references.keys():
        raise ValueError("captions and references must have the same keys")
    if not all(references.values()):
        raise ValueError("every key needs at least one reference")
    counted = {key: [_grams(text) for text in texts] for key, texts in references.items()}
    frequency = Counter(gram for texts in counted.values() for gram in set().union(*texts))
    log_size = math.log(len(counted)) if counted else 0.0
    weight = {gram: log_size - math.log(count) for gram, count in frequency.items()}
    scores = {}
    for key, caption in captions.items():
        vector = _Vector(_grams(caption), weight, log_size)
        against = [_similarity(vector, _Vector(grams, weight, log_size)) for grams in counted[key]]
        scores[key] = 10.0 * sum(against) / len(against)
    return scores


class _Vector:
    """The tf-idf weights of one text, its norm for each n, and its length as the penalty sees it."""

    def __init__(self, grams: Counter[Gram], weight: Mapping[Gram, float], unseen: float) -> None:
        self.weights = {gram: count * weight.get(gram, unseen) for gram, count in grams.items()}
        squares = [0.0] * MAX_N
        for gram, value in self.weights.items():
            squares[len(gram) - 1] += value * value
        self.norms = [math.sqrt(square) for square in squares]
        self.length = sum(count for gram, count in grams.items() if len(gram) == 2)


def _similarity(caption: _Vector, reference: _Vector) -> float:
    """The mean over n of the clipped cosine, times the length penalty."""
    dots = [0.0] * MAX_N
    for gram, value in caption.weights.items():
        there = reference.weights.get(gram, 0.0)
        dots[len(gram) - 1] += min(value, there) * there
    cosines = [
        dot / (a * b) if a and b else dot
        for dot, a, b in zip(dots, caption.norms, reference.norms, strict=True)
    ]
    delta = caption.length - reference.length
    return sum(cosines) / MAX_N * math.exp(-(delta**2) / (2 * SIGMA**2))


def _grams(tokens: Sequence[str]) -> Counter[Gram]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(tokens) - n + 1))
