"""The stream of training: step after step, the micro-batches of one rank, from any position on.

Every rank plans the same examples (their tokens) and shares them out by the same rule, so that ranks agree without
talking and all have the same number of micro-batches a step; each then loads the images of its own share alone.
"""

import heapq
import queue
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from vila2.train.encode import ExampleEncoder, Plan
from vila2.train.examples import EncodedExample, SkippedDocument
from vila2.train.mixture import Mixture
from vila2.train.packing import NO_LABEL, PackedBatch, pack

__all__ = ["NO_LABEL", "BatchStream", "PackedBatch", "Position"]

Step = tuple[list[PackedBatch], "Position"]
_Made = tuple[list[PackedBatch], "Position", Counter[str]]


@dataclass(frozen=True, slots=True)
class Position:
    """A place between two steps: `step` steps are done, made of `examples` examples, `consumed` of each source."""

    step: int = 0
    examples: int = 0
    consumed: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step, "examples": self.examples, "consumed": dict(self.consumed)}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Position":
        return cls(int(stored["step"]), int(stored["examples"]), dict(stored["consumed"]))


@dataclass(frozen=True, slots=True)
class _Lost:
    """A planned example whose image cannot be used."""

    key: str
    reason: str


class BatchStream:
    """Steps of `batch_examples` documents, in micro-batches of at most `max_tokens` rows.

    A document with more rows is divided among micro-batches, its images encoded in each; only a single text that is
    longer makes a larger one. Where a step has fewer examples than micro-batches, some of these have no rows.
    `prefetch`: steps that a thread works ahead, 0 for none; `workers`: threads that load and cut images.
    """

    def __init__(
        self,
        mixture: Mixture,
        encoder: ExampleEncoder,
        *,
        batch_examples: int,
        max_tokens: int,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
        workers: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size), got rank {rank} of {world_size}")
        if batch_examples < 1 or max_tokens < 1:
            raise ValueError(f"a step needs examples and tokens, got {batch_examples} and {max_tokens}")
        self.mixture, self.encoder = mixture, encoder
        self.batch_examples, self.max_tokens = batch_examples, max_tokens
        self.rank, self.world_size = rank, world_size
        self.prefetch, self.workers = prefetch, workers
        self.statistics: Counter[str] = Counter()
        """Of the steps taken so far, by this rank: `documents`, `rows`, `labels`, `images`; branches `cut` to the token
        limit and `dropped` because no loss was left; `skipped_<reason>` documents."""

    def steps(self, start: Position | None = None) -> Iterator[Step]:
        """The steps after `start`, without end: this rank's micro-batches of each, and the position after it.

        Close the iterator to stop its threads.
        """
        steps = self._make_steps(start or Position())
        made = steps if self.prefetch < 1 else _ahead(steps, self.prefetch)
        try:
            for batches, position, counts in made:
                self.statistics.update(counts)
                yield batches, position
        finally:
            made.close()

    def _make_steps(self, start: Position) -> Generator[_Made, None, None]:
        position = start
        with ThreadPoolExecutor(max(1, self.workers), "vila2-images") as pool:
            load = pool.map if self.workers > 1 else map
            while True:
                after = position.examples + self.batch_examples
                counts: Counter[str] = Counter()
                batches = self._step(range(position.examples, after), load, counts)
                position = Position(position.step + 1, after, self.mixture.consumed(after))
                yield batches, position, counts

    def _step(
        self, numbers: Iterable[int], load: Callable[..., Iterable[Any]], counts: Counter[str]
    ) -> list[PackedBatch]:
        plans = [part for n in numbers for plan in self._plans(n, counts) for part in self._divided(plan)]
        sizes = [plan.example.num_rows for plan in plans]
        costs = [self.encoder.cost(plan.example) for plan in plans]
        shares = share_out(sizes, costs, self.world_size, self.max_tokens)[self.rank]
        chosen = [plans[i] for share in shares for i in share]
        finished = iter(list(load(self._finished, chosen)))
        batches, skipped = [], {}
        for share in shares:
            examples = []
            for _ in share:
                example = next(finished)
                if isinstance(example, _Lost):
                    skipped[example.key] = example.reason
                else:
                    examples.append(example)
            batches.append(pack(examples))
        counts.update(f"skipped_{reason}" for reason in skipped.values())
        for batch in batches:
            counts.update(rows=batch.num_rows, labels=batch.num_labels, images=len(batch.images))
        return batches

    def _plans(self, n: int, counts: Counter[str]) -> list[Plan]:
        try:
            plans = self.encoder.plan(self.mixture.document(n))
        except SkippedDocument as skipped:
            counts[f"skipped_{skipped.reason}"] += 1
            return []
        counts["documents"] += 1
        counts.update(cut=sum(p.num_cut for p in plans), dropped=sum(p.num_dropped for p in plans))
        return plans

    def _divided(self, plan: Plan) -> Iterator[Plan]:
        """The plan, or, where it has more rows than a micro-batch, plans of some of its branches each."""
        example = plan.example
        if example.num_rows <= self.max_tokens or len(example.branches) < 2:
            yield plan
            return
        room = self.max_tokens - len(example.prefix)
        part = [example.branches[0]]
        for branch in example.branches[1:]:
            if sum(map(len, part)) + len(branch) > room:
                yield replace(plan, example=replace(example, branches=tuple(part)))
                part = []
            part.append(branch)
        yield replace(plan, example=replace(example, branches=tuple(part)))

    def _finished(self, plan: Plan) -> EncodedExample | _Lost:
        try:
            return self.encoder.finish(plan)
        except SkippedDocument as skipped:
            return _Lost(plan.example.key, skipped.reason)


def share_out(
    sizes: Sequence[int], costs: Sequence[float], world_size: int, max_rows: int
) -> list[list[list[int]]]:
    """Which examples go into which micro-batch of which rank: [rank][micro-batch] -> numbers, ascending.

    Every rank gets the same number of micro-batches, as few as hold at most `max_rows` rows each (or one example).
    The costliest examples are placed first, each into the micro-batch with the least cost so far; a rank's costliest
    micro-batch comes first, so that memory shows at once whether it is enough.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-costs[i], i))
    limit = max([max_rows, *sizes])
    count = max(1, -(-sum(sizes) // (world_size * limit)))
    while True:
        bins: list[list[int]] = [[] for _ in range(world_size * count)]
        least = [(0.0, number) for number in range(len(bins))]
        for i in order:
            cost, number = least[0]
            bins[number].append(i)
            heapq.heapreplace(least, (cost + costs[i], number))
        if max(sum(sizes[i] for i in chosen) for chosen in bins) <= limit:
            break
        count += 1
    dearest = sorted(bins, key=lambda chosen: (-sum(costs[i] for i in chosen), chosen))
    return [[sorted(chosen) for chosen in dearest[rank::world_size]] for rank in range(world_size)]


def _ahead(steps: Generator[_Made, None, None], depth: int) -> Generator[_Made, None, None]:
    """The same items in the same order, made by a thread that is at most `depth` ahead."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: Any) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in steps:
                if not put(item):
                    return
        except BaseException as error:  # raised again where the items are taken
            put(error)
        finally:
            steps.close()

    thread = threading.Thread(target=work, name="vila2-batches", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
