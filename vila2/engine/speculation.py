"""Speculative decoding from drafts: how many drafted tokens each sequence of a batch verifies in a step.

A verified token costs a row of the batch and saves a step if it is right. Whether that pays depends on what a row
costs beside the rows that are there anyway: next to nothing while a step waits for the weights, as much as a token
once the batch keeps the machine busy. So the cost of a step is measured once, by its rows, and each step takes the
likeliest drafted tokens for as long as they lower the expected time a token. Poor drafts and large batches thereby
end at no drafts at all, sequence by sequence and step by step.
"""

import heapq
import time
from bisect import bisect_right
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from vila2.engine.draft import Acceptance, Line
from vila2.engine.phrases import Phrases
from vila2.engine.scheduler import Chunk
from vila2.engine.sequence import Sequence

MAX_DRAFT = 24  # tokens that one sequence may verify in a step
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_ROWS_AT_LEAST = 16  # measured, so that one disturbed step ends nothing
_REPEATS = 3
_SMALL = 4
_PATIENCE_S = 2.0  # after which a large model's steps are not repeated
_HOPELESS = 0.5  # a row that brings so little of what it costs is not made up for by later ones
_LINEAR = 0.85  # a row more that costs this share of the average row: larger steps cost in proportion


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step by its number of rows: straight lines between measured points, the last one prolonged."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if (
            len(self.rows) != len(self.seconds)
            or len(self.rows) < 2
            or list(self.rows) != sorted({*self.rows})
        ):
            raise ValueError(f"need two or more ascending row counts with their seconds, got {self.rows}")

    def __call__(self, rows: float) -> float:
        at = min(max(bisect_right(self.rows, rows) - 1, 0), len(self.rows) - 2)
        return self.seconds[at] + self._slope(at) * (rows - self.rows[at])

    def of_one_more(self, rows: int) -> float:
        """Seconds that row `rows + 1` adds."""
        return self._slope(min(max(bisect_right(self.rows, rows) - 1, 0), len(self.rows) - 2))

    def _slope(self, at: int) -> float:
        return (self.seconds[at + 1] - self.seconds[at]) / (self.rows[at + 1] - self.rows[at])


def measure_step_cost(run: Callable[[int], object], max_rows: int, *, on_cpu: bool = True) -> StepCost:
    """Time `run(rows)`, which computes a step and waits for it, up to where the cost is in proportion to the rows.

    The least of some runs counts, and a step costs no more than a larger one: what disturbs a measurement on a busy
    machine only ever adds to it. Where the CPU computes, its own seconds count if they are fewer than the clock's,
    because a process that has to wait for a core waits in proportion to its work.
    """

    def timed(rows: int) -> float:
        start, used = time.perf_counter(), time.process_time()
        run(rows)
        wall, own = time.perf_counter() - start, time.process_time() - used
        return min(wall, own) if on_cpu else wall

    begin = time.perf_counter()
    timed(1)  # with what happens only once
    rows: list[int] = []
    seconds: list[float] = []
    for count in _ROWS:
        if count > max(max_rows, 2):
            break
        rows.append(count)
        seconds.append(timed(count))
        if count >= _ROWS_AT_LEAST and _last_slope(rows, seconds) > _LINEAR * seconds[-1] / count:
            break
    for repeat in range(_REPEATS):  # in turns, so that a disturbance does not meet one place alone
        is_late = time.perf_counter() - begin > _PATIENCE_S
        if repeat and is_late:
            break
        for place, count in enumerate(rows):
            # Small steps decide whether a poor draft is worth one row, and take little time.
            for _ in range(1 if is_late or count > _SMALL else _REPEATS):
                seconds[place] = min(seconds[place], timed(count))
    for place in range(len(seconds) - 2, -1, -1):
        seconds[place] = min(seconds[place], seconds[place + 1])
    return StepCost(tuple(rows), tuple(seconds))


def _last_slope(rows: list[int], seconds: list[float]) -> float:
    """Seconds a row between about half of the largest measured step and itself."""
    half = next(place for place, count in enumerate(rows) if 2 * count >= rows[-1])
    return (seconds[-1] - seconds[half]) / (rows[-1] - rows[half])


@dataclass(slots=True)
class Speculator:
    """Decides on draft lengths, and learns from what became of them. `cost` is None until it has been measured.

    `phrases` None: drafts are all there is to guess from.
    """

    cost: StepCost | None = None
    acceptance: Acceptance = field(default_factory=Acceptance)
    phrases: Phrases | None = field(default_factory=Phrases)

    def plan(self, chunks: Seq[Chunk], room: Seq[int], max_rows: int) -> list[int]:
        """How many guesses each chunk verifies: at most `room`, and at most `max_rows` rows in all.

        The guesses are left in the drafts (`Draft.line`).
        """
        assert self.cost is not None
        lengths = [0] * len(chunks)
        rows = sum(chunk.num_tokens for chunk in chunks)
        num_sampled = sum(chunk.wants_logits for chunk in chunks)
        if not num_sampled:
            return lengths
        expected = float(num_sampled)  # tokens that this step brings
        seconds = self.cost(num_sampled)  # what these cost alone: rows of prefill are paid for anyway
        heap: list[tuple[float, int]] = []
        for i, chunk in enumerate(chunks):
            draft = chunk.sequence.draft
            if draft is None or not chunk.wants_logits or room[i] <= 0:
                continue
            draft.line = Line(draft, chunk.sequence.tokens, self.phrases, self.acceptance)
            if draft.line.reach(1):
                heapq.heappush(heap, (-draft.luck * draft.line.chances[0], i))
        best = seconds / expected
        added: list[int] = []
        num_best = 0
        while heap and rows < max_rows:
            chance, i = heapq.heappop(heap)
            price = self.cost.of_one_more(rows)
            if -chance * seconds <= _HOPELESS * price * expected:
                break  # and all others are less likely
            lengths[i] += 1
            added.append(i)
            rows += 1
            seconds += price
            expected -= chance
            if (
                seconds / expected < best
            ):  # not at once: costs rise in steps, and later rows may make up for one
                best, num_best = seconds / expected, len(added)
            draft = chunks[i].sequence.draft
            assert draft is not None
            assert draft.line is not None
            if lengths[i] < room[i] and draft.line.reach(lengths[i] + 1):
                heapq.heappush(heap, (chance * draft.luck * draft.line.chances[lengths[i]], i))
        for i in added[num_best:]:
            lengths[i] -= 1
        return lengths

    def learn(self, sequence: Sequence, num_tried: int, num_right: int, num_new: int) -> None:
        """Note a step of a sequence that has `num_new` tokens more now."""
        if sequence.draft is None:
            return
        sequence.draft.learn(self.acceptance, num_tried, num_right)
        if self.phrases is not None:
            self.phrases.note(sequence.tokens, num_new)
        sequence.draft.follow(sequence.output, num_new)
