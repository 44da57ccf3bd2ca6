"""Which of two captions is better, by a judge: every pair in both orders, and everything counted that is no verdict.

A caption wins a pair if the judge prefers it in both orders; one win and one tie is a win too; a judge that changes its
mind with the order has said nothing, which counts as a tie and as `inconsistent`. A pair of which an order was
refused or could not be read is not judged.
"""

import base64
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vila2.errors import UsageError
from vila2.evaluate.bootstrap import intervals, mcnemar_p
from vila2.evaluate.chat import ChatClient, Reply
from vila2.evaluate.parse import plain_quotes

Said = Literal["first", "second", "tie", "refused", "unreadable"]
Outcome = Literal["a", "b", "tie", "inconsistent", "refused", "unreadable"]

SYSTEM = (
    "You compare two captions of one image. Judge which describes the image better: what it says must be right first "
    "of all, then it should be complete, then clear. Length alone is no merit, and the order in which the captions "
    "stand must not matter. Think briefly, then end with exactly one line: [[1]] if the first caption is better, "
    "[[2]] if the second is, [[TIE]] if neither is."
)
_VERDICT = re.compile(r"\[\[\s*(1|2|tie|a|b|c)\s*\]\]", re.IGNORECASE)
_BARE = re.compile(
    r"\W*(?:(?:the|my|final|caption|answer|verdict|winner|better|is|it|one|a)\b\W*)*"
    r"(1|2|first|second|tie)\W*(?:(?:one|caption)\W*)?",
    re.IGNORECASE,
)
_SAID: dict[str, Said] = {
    "1": "first", "a": "first", "first": "first", "2": "second", "b": "second", "second": "second",
    "tie": "tie", "c": "tie",
}  # fmt: skip
_REFUSAL = re.compile(
    r"^\W*(?:sorry|unfortunately,? i|i(?:'m| am)? (?:very |so )?(?:sorry|unable|can ?not|can't|won't|must decline))\b",
    re.IGNORECASE,
)
_MEDIA = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp", ".gif": "gif"}


@dataclass(frozen=True, slots=True)
class Pair:
    """Two captions of one image. The judge sees the image, a description known to be true, or neither."""

    key: str
    a: str
    b: str
    truth: str = ""
    image: Path | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """One pair and what was said with `a` first, then with `b` first."""

    key: str
    outcome: Outcome
    said: tuple[Said, Said]
    replies: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Judgement:
    """Counts of all pairs. `win_rate` is of b against a over the judged pairs, a tie as half; `p` tests wins against
    losses (exact, two-sided); `first_share` is how often the caption shown first was preferred: 0.5 is unbiased."""

    model: str
    pairs: int
    wins_a: int
    wins_b: int
    ties: int
    inconsistent: int
    refused: int
    unreadable: int
    win_rate: float | None
    low: float | None
    high: float | None
    p: float
    first_share: float | None
    retries: int
    judged: tuple[Judged, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_pairs(
    a: Mapping[str, str],
    b: Mapping[str, str],
    truths: Mapping[str, Sequence[str]] | None = None,
    images: Path | None = None,
) -> list[Pair]:
    """The keys that both have, sorted, with their truth and their image (`images`/KEY, with or without a suffix).

    UsageError when there are none, or when an image is missing.
    """
    keys = sorted(a.keys() & b.keys())
    if not keys:
        raise UsageError("the two files of captions have no key in common")
    return [
        Pair(key, a[key], b[key], "\n".join((truths or {}).get(key, ())), _image_of(images, key))
        for key in keys
    ]


def judge(
    pairs: Sequence[Pair],
    client: ChatClient,
    *,
    workers: int = 8,
    seed: int = 0,
    observe: Callable[[int, int], None] | None = None,
) -> Judgement:
    """Ask about every pair, in both orders. VilaError if the endpoint fails for good; nothing is kept then."""
    if not pairs:
        raise UsageError("there is no pair to judge")
    judged: list[Judged] = []
    with ThreadPoolExecutor(max_workers=workers) as pool:
        try:
            for done in pool.map(lambda pair: judge_pair(pair, client), pairs):
                judged.append(done)
                if observe:
                    observe(len(judged), len(pairs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return tally(judged, client.settings.model, client.num_retries, seed)


def judge_pair(pair: Pair, client: ChatClient) -> Judged:
    replies = tuple(
        client.ask(question(pair, first, second), SYSTEM)
        for first, second in ((pair.a, pair.b), (pair.b, pair.a))
    )
    said = (read_verdict(replies[0]), read_verdict(replies[1]))
    return Judged(pair.key, outcome_of(said), said, (replies[0].text, replies[1].text))


def question(pair: Pair, first: str, second: str) -> Any:
    """The user turn: text, or parts where there is an image."""
    truth = f"What is known to be true of the image:\n{pair.truth}\n\n" if pair.truth else ""
    text = f"{truth}Caption 1:\n{first.strip()}\n\nCaption 2:\n{second.strip()}\n\nWhich caption is better?"
    if pair.image is None:
        return text
    media = _MEDIA[pair.image.suffix.lower()]
    data = base64.b64encode(pair.image.read_bytes()).decode()
    return [
        {"type": "image_url", "image_url": {"url": f"data:image/{media};base64,{data}"}},
        {"type": "text", "text": text},
    ]


def read_verdict(reply: Reply) -> Said:
    """The last verdict that stands in the reply; without one, whether it refuses."""
    if reply.refused:
        return "refused"
    found = _VERDICT.findall(reply.text)
    if found:
        return _SAID[found[-1].lower()]
    last = reply.text.strip().splitlines()[-1] if reply.text.strip() else ""
    bare = _BARE.fullmatch(last.strip())
    if bare:
        return _SAID[bare[1].lower()]
    return "refused" if _REFUSAL.match(plain_quotes(reply.text)) else "unreadable"


def outcome_of(said: tuple[Said, Said]) -> Outcome:
    """`said` is with a first, then with b first."""
    if "refused" in said:
        return "refused"
    if "unreadable" in said:
        return "unreadable"
    points = {"first": 1, "tie": 0, "second": -1}
    one, other = points[said[0]], -points[said[1]]  # in favour of a
    if one + other:
        return "a" if one + other > 0 else "b"
    return "tie" if one == 0 else "inconsistent"


def tally(judged: Sequence[Judged], model: str, retries: int, seed: int) -> Judgement:
    counts = Counter(one.outcome for one in judged)
    scores = [{"a": 0.0, "b": 1.0}.get(one.outcome, 0.5) for one in judged if one.outcome not in _UNJUDGED]
    low = high = None
    if scores:
        column = np.array(scores)[:, None]
        low, high = (float(bound) for bound in intervals(column, np.ones_like(column), seed)[0])
    said = Counter(word for one in judged for word in one.said)
    preferred = said["first"] + said["second"]
    return Judgement(
        model=model,
        pairs=len(judged),
        wins_a=counts["a"],
        wins_b=counts["b"],
        ties=counts["tie"] + counts["inconsistent"],
        inconsistent=counts["inconsistent"],
        refused=counts["refused"],
        unreadable=counts["unreadable"],
        win_rate=sum(scores) / len(scores) if scores else None,
        low=low,
        high=high,
        p=mcnemar_p(counts["a"], counts["b"]),
        first_share=said["first"] / preferred if preferred else None,
        retries=retries,
        judged=tuple(judged),
    )


_UNJUDGED = ("refused", "unreadable")


def _image_of(folder: Path | None, key: str) -> Path | None:
    if folder is None:
        return None
    for candidate in (folder / key, *(folder / f"{key}{suffix}" for suffix in _MEDIA)):
        if candidate.suffix.lower() in _MEDIA and candidate.is_file():
            return candidate
    raise UsageError(f"{folder} has no image for {key!r} ({', '.join(_MEDIA)})")
