"""Drafts: the tokens that a sequence will probably write, and how to stay in step with them.

A draft is a hint. It decides how many tokens a step verifies and never which tokens a sequence has. Here is its
bookkeeping alone: where the output stands in the draft, and how likely the tokens after that place are. A place is
confirmed by matching tokens and lost with the first that does not match; then the newest tokens are looked up in the
draft, and where they do not occur the lost token is taken to stand for one of the draft's. Where the draft is not to
be trusted, or has nothing, the run's phrases may know better (`Line`).
"""

from collections import defaultdict
from collections.abc import Sequence as Seq
from math import log2
from typing import NamedTuple

from vila2.engine.phrases import MAX_CONTEXT, SHARES, Phrases
from vila2.model.tokenizer import TokenKind

MAX_MATCH = 4  # tokens before a place that are compared; more say nothing new
# Matching tokens that a doubling of the distance from the expected place is worth: the first word that differs is
# probably one for another; the longer nothing fits, the farther away the draft may go on.
_DOUBTS = (1.0, 0.6, 0.4)
_PRIOR = (
    0.5,
    0.6,
    0.75,
    0.85,
    0.9,
)  # acceptance by the number of tokens matched before, until it is measured
_PRIOR_WEIGHT = 4.0  # tokens
_RUN_MEMORY = 0.998  # a token: half of what is known of a run is forgotten in 350 tokens
_SEQUENCE_MEMORY = 0.97  # a step: a sequence without luck tries one token again after some thirty steps
_SEQUENCE_WEIGHT = 1.0  # tokens


class Grounds(NamedTuple):
    """Why a token is guessed: acceptance is learnt for each of these.

    `matched`: tokens before it that match the draft, None where the draft has no part in the guess. `context`, `share`:
    of the phrase (see `Successor`), 0 where none is known. `agree`: whether the two name the same token.
    """

    matched: int | None
    context: int = 0
    share: int = 0
    agree: bool = False

    @property
    def prior(self) -> float:
        """How likely such a token is right, before it is measured."""
        if self.matched is None:
            return 0.1 + 0.4 * self.share / SHARES
        by_draft = _PRIOR[self.matched]
        if not self.context:
            return by_draft
        return 1 - (1 - by_draft) / 2 if self.agree else 0.8 * by_draft


class Acceptance:
    """How likely a guessed token is right, by the grounds for it: learnt from a whole run."""

    def __init__(self) -> None:
        self._right: dict[Grounds, float] = {}
        self._tried: dict[Grounds, float] = {}

    def __getitem__(self, grounds: Grounds) -> float:
        right = self._right.get(grounds, 0.0) + _PRIOR_WEIGHT * grounds.prior
        return right / (self._tried.get(grounds, 0.0) + _PRIOR_WEIGHT)

    def learn(self, grounds: Grounds, *, right: bool) -> None:
        self._right[grounds] = self._right.get(grounds, 0.0) * _RUN_MEMORY + right
        self._tried[grounds] = self._tried.get(grounds, 0.0) * _RUN_MEMORY + 1


class Draft:
    """One sequence's draft. `next` is the place in `tokens` that the output is believed to come to next.

    `kinds` say what each token of the vocabulary is (see `TokenKind`); without them each is a word.
    """

    def __init__(self, tokens: Seq[int], kinds: bytes = b"") -> None:
        self.tokens = tuple(tokens)
        self._kinds = kinds
        self.next = 0
        self.num_matched = 1  # a caption begins where its draft does: as good as one matched token
        self._num_lost = 0  # tokens since two of the draft were right one after the other
        self._places: dict[int, list[int]] = defaultdict(list)
        for place, token in enumerate(self.tokens):
            self._places[token].append(place)
        self.line: Line | None = None  # the guesses of the newest step
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
                if self.num_matched > 1:
                    self._num_lost = 0
            else:
                self._num_lost += 1
                self._look_up(output, end)

    def _look_up(self, output: Seq[int], end: int) -> None:
        """Find the place after the tokens before `output[end]`: a long match, and near where it is expected."""
        expected = self.after(self.next, output[end - 1])
        doubt = _DOUBTS[min(self._num_lost, len(_DOUBTS)) - 1]
        best = (0.0, 0, expected)
        for place in self._places.get(output[end - 1], ()):
            length = 1
            most = min(MAX_MATCH, place + 1, end)
            while length < most and self.tokens[place - length] == output[end - 1 - length]:
                length += 1
            distance = abs(place + 1 - expected)
            best = max(best, (length - doubt * log2(1 + distance), length, place + 1))
        _, self.num_matched, self.next = best

    def after(self, place: int, token: int) -> int:
        """Where the output goes on if `token` stands for what the draft has at `place`, or in between: one word for
        another, with what hangs on it.
        """
        if place == len(self.tokens):
            return place
        kind, here = self.kind(token), self.kind(self.tokens[place])
        if kind is TokenKind.INSIDE:
            if here is not TokenKind.INSIDE:
                return place  # the output's word is longer than the draft's
            return self._skip(place, (TokenKind.INSIDE,))
        if kind is TokenKind.WORD:
            return self._skip(place, (TokenKind.INSIDE, TokenKind.MARK))
        return place if here is TokenKind.WORD else place + 1

    def _skip(self, place: int, kinds: tuple[TokenKind, ...]) -> int:
        """The next place after `place` with a token of none of `kinds`."""
        place += 1
        while place < len(self.tokens) and self.kind(self.tokens[place]) in kinds:
            place += 1
        return place

    def kind(self, token: int) -> TokenKind:
        """What a token is."""
        return TokenKind(self._kinds[token]) if token < len(self._kinds) else TokenKind.WORD

    def learn(self, acceptance: Acceptance, num_tried: int, num_right: int) -> None:
        """Note what became of a step: of `num_tried` tokens `num_right` were right. Call it before `follow`."""
        self._right *= _SEQUENCE_MEMORY
        self._expected *= _SEQUENCE_MEMORY
        # Tokens after the first wrong one say nothing.
        for ahead in range(min(num_tried, num_right + 1)):
            right = ahead < num_right
            grounds = (
                self.line.grounds[ahead] if self.line else Grounds(min(self.num_matched + ahead, MAX_MATCH))
            )
            self._right += right
            self._expected += acceptance[grounds]
            acceptance.learn(grounds, right=right)
        self.line = None


class Line:
    """The likeliest tokens after `tail`, by a draft and the run's phrases, made one by one as they are wanted.

    At each place the two are asked, and the likelier one has it. A phrase's token stands for the draft's from there on.
    """

    def __init__(self, draft: Draft, tail: Seq[int], phrases: Phrases | None, acceptance: Acceptance) -> None:
        self._draft, self._phrases, self._acceptance = draft, phrases, acceptance
        self._tail = list(tail[-MAX_CONTEXT:])
        self._place, self._matched = draft.next, draft.num_matched
        self.tokens: list[int] = []
        self.grounds: list[Grounds] = []
        self.chances: list[float] = []  # that each is right if those before it are

    def reach(self, count: int) -> bool:
        """Make `count` guesses; False if there are not so many."""
        while len(self.tokens) < count:
            guesses = self._guesses()
            if not guesses:
                return False
            chance, token, grounds = max(guesses)
            self.tokens.append(token)
            self.grounds.append(grounds)
            self.chances.append(chance)
            self._go_on(token)
        return True

    def _guesses(self) -> list[tuple[float, int, Grounds]]:
        written = self._draft.tokens[self._place] if self._place < len(self._draft.tokens) else None
        known = self._phrases.after(self._tail) if self._phrases else None
        matched = min(self._matched, MAX_MATCH)
        if known is None:
            found = [] if written is None else [(written, Grounds(matched))]
        elif known.token == written:
            found = [(written, Grounds(matched, known.context, known.share, True))]
        else:
            found = [(known.token, Grounds(None, known.context, known.share))]
            if written is not None:
                found.append((written, Grounds(matched, known.context, known.share)))
        return [(self._acceptance[grounds], token, grounds) for token, grounds in found]

    def _go_on(self, token: int) -> None:
        self._tail = [*self._tail[-MAX_CONTEXT + 1 :], token]
        tokens = self._draft.tokens
        if self._place < len(tokens) and tokens[self._place] == token:
            self._place += 1
            self._matched += 1
        else:
            self._place, self._matched = self._draft.after(self._place, token), 0
