"""How many requests a server gets at once, found by trying: more while that gives more answers a second, fewer at once
when the server says that it is too much.

A batching server answers 32 requests hardly later than 8, until it is full; from there on, more in flight only means
that each waits longer. So the limit rises for a round (as many answers as the limit) and stays up if the rate rose
with it (rate = limit / mean latency, Little's law); else it goes back, and is tried again some rounds later.
"""

from math import ceil

SLOW_START = 2.0  # factor a round, until the first set-back
STEP = 1.25  # afterwards
CUT = 0.7
WORTH = 0.2  # the share of a rise that must show in the rate for the rise to stay
REST_ROUNDS = 8  # after a rise that was not worth it
MIN_ROUND = 4  # answers, for a mean that means something


class AdaptiveLimit:
    """One server's limit, in [1, `maximum`]. Call `begin` for each request sent, and one of the others at its end."""

    def __init__(self, maximum: int, start: int = 4) -> None:
        self.maximum = maximum
        self.value = min(start, maximum)
        self._factor = SLOW_START
        self._before: tuple[int, float] | None = None  # the limit and its rate before the rise under trial
        self._rest = 0
        self._round = 0
        self._cut_round = 0
        self._full = False  # was the limit reached in this round?
        self._count, self._sum_s = 0, 0.0  # answers of this round, and their latencies

    def begin(self, in_flight: int) -> int:
        """Note a request sent, the `in_flight`-th at once. Returns the ticket that its end is told with."""
        self._full = self._full or in_flight >= self.value
        return self._round

    def succeeded(self, ticket: int, latency_s: float) -> None:
        """An answer came. Those of earlier rounds say nothing about this one's limit."""
        if ticket < self._round:
            return
        self._count += 1
        self._sum_s += latency_s
        if self._count >= max(self.value, MIN_ROUND):
            if self._full:
                self._decide(self.value / max(self._sum_s / self._count, 1e-9))
            self._new_round()

    def overloaded(self, ticket: int) -> bool:
        """The server refused, failed or stalled. False for one of many that failed together: they are one sign."""
        if ticket < self._cut_round:
            return False
        self.value = max(1, int(self.value * CUT))
        self._factor, self._before, self._rest = STEP, None, REST_ROUNDS
        self._new_round()
        self._cut_round = self._round
        return True

    def _decide(self, rate: float) -> None:
        if self._before is not None:
            value, earlier = self._before
            self._before = None
            if rate < earlier * (1 + WORTH * (self.value / value - 1)):
                self.value = value
                self._factor, self._rest = STEP, REST_ROUNDS
                return
        if self._rest:
            self._rest -= 1
        elif self.value < self.maximum:
            self._before = (self.value, rate)
            self.value = min(self.maximum, max(self.value + 1, ceil(self.value * self._factor)))

    def _new_round(self) -> None:
        self._round += 1
        self._full = False
        self._count, self._sum_s = 0, 0.0
