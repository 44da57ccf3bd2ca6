"""Drafts: the tokens that a sequence will probably write, and how to stay in step with them.

A draft is a hint. It decides how many tokens a step verifies and never which tokens a sequence has. Here is its
bookkeeping alone: where the output stands in the draft, and how likely the tokens after that place are. A place is
confirmed by matching tokens and lost with the first that does not match; then the newest tokens are looked up in the
draft, and where they do not occur the lost token is taken to stand for one of the draft's.
"""

from collections import defaultdict
from collections.abc import Sequence as Seq
from collections.abc import Set

MAX_MATCH = 4  # tokens before a place that are compared; more say nothing new
# How far from its expected place a match of so many tokens is believed: a lone comma proves little.
_REACH = (0, 8, 32)
_PRIOR = (
    0.5,
    0.6,
    0.75,
    0.85,
    0.9,
)  # acceptance by the number of tokens matched before, until it is measured
_PRIOR_WEIGHT = 8.0  # tokens
_RUN_MEMORY = 0.998  # a token: half of what is known of a run is forgotten in 350 tokens
_SEQUENCE_MEMORY = 0.97  # a step: a sequence without luck tries one token again after some thirty steps
_SEQUENCE_WEIGHT = 1.0  # tokens


class Acceptance:
    """How likely a drafted token is right, by the number of matched tokens before it: learnt from a whole run."""

    def __init__(self) -> None:
        self._right = [prior * _PRIOR_WEIGHT for prior in _PRIOR]
        self._tried = [_PRIOR_WEIGHT] * len(_PRIOR)

    def __getitem__(self, num_matched: int) -> float:
        place = min(num_matched, MAX_MATCH)
        return self._right[place] / self._tried[place]

    def learn(self, num_matched: int, *, right: bool) -> None:
        place = min(num_matched, MAX_MATCH)
        self._right[place] = self._right[place] * _RUN_MEMORY + right
        self._tried[place] = self._tried[place] * _RUN_MEMORY + 1


class Draft:
    """One sequence's draft. `next` is the place in `tokens` that the output is believed to come to next.

    `word_starts` are the tokens that begin a word or stand for themselves; without them each token is a word.
    """

    def __init__(self, tokens: Seq[int], word_starts: Set[int] = frozenset()) -> None:
        self.tokens = tuple(tokens)
        self._word_starts = word_starts
        self.next = 0
        self.num_matched = 1  # a caption begins where its draft does: as good as one matched token
        self._places: dict[int, list[int]] = defaultdict(list)
        for place, token in enumerate(self.tokens):
            self._places[token].append(place)
        self._right = self._expected = 0.0  # accepted tokens, and how many the run's acceptance foretold

    @property
    def luck(self) -> float:
        """The sequence's acceptance against the run's, at most 1."""
        return min(1.0, (self._right + _SEQUENCE_WEIGHT) / (self._expected + _SEQUENCE_WEIGHT))

    def ahead(self, count: int) -> tuple[int, ...]:
        """The next `count` tokens, or what there is of them."""
        return self.tokens[self.next : self.next + count]

    def follow(self, output: Seq[int], count: int) -> None:
        """Take note of the newest `count` tokens of `output`."""
        for end in range(len(output) - count + 1, len(output) + 1):
            if self.next < len(self.tokens) and self.tokens[self.next] == output[end - 1]:
                self.next += 1
                self.num_matched += 1
            else:
                self._look_up(output, end)

    def _look_up(self, output: Seq[int], end: int) -> None:
        """Find the place after the tokens before `output[end]`: the longest match, the nearest among equals."""
        expected = self._after(output[end - 1])
        best = (0, 0, expected)
        for place in self._places.get(output[end - 1], ()):
            length = 1
            most = min(MAX_MATCH, place + 1, end)
            while length < most and self.tokens[place - length] == output[end - 1 - length]:
                length += 1
            distance = abs(place + 1 - expected)
            if length >= len(_REACH) or distance <= _REACH[length]:
                best = max(best, (length, -distance, place + 1))
        self.num_matched, _, self.next = best

    def _after(self, token: int) -> int:
        """Where the output goes on if `token` stands for what the draft has next: one word for another."""
        if not self._is_start(token) and (
            self.next == len(self.tokens) or self._is_start(self.tokens[self.next])
        ):
            return self.next  # the output's word is longer than the draft's
        place = min(self.next + 1, len(self.tokens))
        while place < len(self.tokens) and not self._is_start(self.tokens[place]):
            place += 1
        return place

    def _is_start(self, token: int) -> bool:
        return not self._word_starts or token in self._word_starts

    def learn(self, acceptance: Acceptance, num_tried: int, num_right: int) -> None:
        """Note what became of a step: of `num_tried` tokens `num_right` were right. Call it before `follow`."""
        self._right *= _SEQUENCE_MEMORY
        self._expected *= _SEQUENCE_MEMORY
        # Tokens after the first wrong one say nothing.
        for ahead in range(min(num_tried, num_right + 1)):
            right = ahead < num_right
            self._right += right
            self._expected += acceptance[self.num_matched + ahead]
            acceptance.learn(self.num_matched + ahead, right=right)
