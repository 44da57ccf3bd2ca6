"""The arithmetic of the evaluation: pure functions of counts, sets, strings and boxes, each testable by hand.

Sources: CHAIR is Rohrbach et al., "Object Hallucination in Image Captioning" (2018): CHAIR_i is the share of the
mentions that are hallucinated, CHAIR_s the share of the captions with at least one. Self-BLEU and distinct-n are
Zhu et al. (2018) and Li et al. (2016).
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from vila2.evaluate.parse import Box


@dataclass(frozen=True, slots=True)
class ObjectCounts:
    """What one caption says about the objects of its image."""

    hits: int  # distinct names mentioned that are there
    named: int  # distinct names mentioned
    present: int  # distinct names that are there
    mentions: int  # mentions, repeats included
    hallucinated: int  # mentions of what is not there


def object_counts(mentions: Sequence[Hashable], present: Iterable[Hashable]) -> ObjectCounts:
    """Compare the names that a caption mentions (in order, repeats included) with those that are there."""
    there = set(present)
    named = set(mentions)
    return ObjectCounts(
        hits=len(named & there),
        named=len(named),
        present=len(there),
        mentions=len(mentions),
        hallucinated=sum(name not in there for name in mentions),
    )


def f1(hits: float, predicted: float, actual: float) -> float:
    """The harmonic mean of hits / predicted and hits / actual: 1 when there is nothing to find and nothing was said."""
    return 2 * hits / (predicted + actual) if predicted + actual else 1.0


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (xmin, ymin, xmax, ymax); 0 where both are empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = area(a) + area(b) - shared
    return shared / union if union > 0 else 0.0


def area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def edit_distance(a: str, b: str) -> int:
    """The least number of inserted, deleted and replaced characters that turn `a` into `b` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def distinct_n(texts: Iterable[Sequence[str]], n: int) -> float:
    """Different n-grams over all n-grams of the tokenised texts; 0 where there are none."""
    grams = Counter(gram for text in texts for gram in ngrams(text, n))
    total = sum(grams.values())
    return len(grams) / total if total else 0.0


def self_bleu(texts: Sequence[Sequence[str]], max_n: int = 4) -> float:
    """Mean BLEU of each tokenised text against all the others, without smoothing: 1 when all are alike, near 0
    when they share nothing. 0 for fewer than two texts.

    The clipped counts need only the largest and second-largest count of a gram over the texts, so the whole is
    linear in the number of texts.
    """
    if len(texts) < 2:
        return 0.0
    counts = [[Counter(ngrams(text, n)) for text in texts] for n in range(1, max_n + 1)]
    best = [_two_largest(of_n) for of_n in counts]
    lengths = Counter(len(text) for text in texts)
    return sum(_bleu_against_others(i, texts, counts, best, lengths) for i in range(len(texts))) / len(texts)


def _two_largest(of_n: list[Counter[tuple[str, ...]]]) -> dict[tuple[str, ...], tuple[int, int, int]]:
    """gram -> (largest count in a text, that text, second-largest count)."""
    best: dict[tuple[str, ...], tuple[int, int, int]] = {}
    for owner, counter in enumerate(of_n):
        for gram, count in counter.items():
            top, who, second = best.get(gram, (0, -1, 0))
            best[gram] = (count, owner, top) if count > top else (top, who, max(second, count))
    return best


def _bleu_against_others(
    i: int,
    texts: Sequence[Sequence[str]],
    counts: list[list[Counter[tuple[str, ...]]]],
    best: list[dict[tuple[str, ...], tuple[int, int, int]]],
    lengths: Counter[int],
) -> float:
    logs = 0.0
    used = 0
    for of_n, best_n in zip(counts, best, strict=True):
        total = sum(of_n[i].values())
        if not total:
            break  # shorter than n words
        matched = 0
        for gram, count in of_n[i].items():
            top, who, second = best_n[gram]
            matched += min(count, second if who == i else top)
        if not matched:
            return 0.0
        logs += math.log(matched / total)
        used += 1
    if not used:
        return 0.0
    length = len(texts[i])
    others = [other for other in lengths if other != length or lengths[other] > 1]
    closest = min(others, key=lambda other: (abs(other - length), other))
    return math.exp(logs / used + min(0.0, 1 - closest / length))


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n tokens."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
