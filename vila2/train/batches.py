"""The stream of training: step after step, the micro-batches of one rank, from any position on.

Every rank walks the same examples and shares them out by the same rule, so ranks agree without talking. All ranks get
the same number of micro-batches a step.
"""

import queue
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vila2.train.encode import ExampleEncoder
from vila2.train.examples import EncodedExample, SkippedDocument
from vila2.train.mixture import Mixture
from vila2.train.packing import NO_LABEL, PackedBatch, pack

__all__ = ["NO_LABEL", "BatchStream", "PackedBatch", "Position"]


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


class BatchStream:
    """Steps of `batch_examples` examples, in micro-batches of at most `max_tokens` rows where single examples allow it.

    `statistics` counts what was met so far: examples, rows, and documents skipped by reason.
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
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size), got rank {rank} of {world_size}")
        self.mixture, self.encoder = mixture, encoder
        self.batch_examples, self.max_tokens = batch_examples, max_tokens
        self.rank, self.world_size, self.prefetch = rank, world_size, prefetch
        self.statistics: Counter[str] = Counter()

    def steps(self, start: Position = Position()) -> Iterator[tuple[list[PackedBatch], Position]]:
        """The steps after `start`, without end: this rank's micro-batches of each and the position after it.

        With `prefetch` a thread works that many steps ahead.
        """
        steps = self._make_steps(start)
        return steps if self.prefetch < 1 else _ahead(steps, self.prefetch)

    def _make_steps(self, start: Position) -> Iterator[tuple[list[PackedBatch], Position]]:
        position = start
        while True:
            first = position.examples
            examples = [e for n in range(first, first + self.batch_examples) for e in self._encoded(n)]
            shares = share_out(examples, self.world_size, self.max_tokens)
            batches = [pack(micro) for micro in shares[self.rank]]
            after = first + self.batch_examples
            position = Position(position.step + 1, after, self.mixture.consumed(after))
            yield batches, position

    def _encoded(self, n: int) -> list[EncodedExample]:
        try:
            examples = self.encoder.encode_all(self.mixture.document(n))
        except SkippedDocument as skipped:
            self.statistics[f"skipped_{skipped.reason}"] += 1
            return []
        self.statistics["documents"] += 1
        return examples


def share_out(
    examples: list[EncodedExample], world_size: int, max_tokens: int
) -> list[list[list[EncodedExample]]]:
    """The micro-batches of each rank: the same number for all, evenly filled, as few as `max_tokens` allows.

    The largest examples are placed first, each into the emptiest micro-batch.
    """
    order = sorted(range(len(examples)), key=lambda i: (-examples[i].num_rows, i))
    rows = sum(example.num_rows for example in examples)
    count = max(1, -(-rows // (world_size * max_tokens)))
    while True:
        bins: list[list[int]] = [[] for _ in range(world_size * count)]
        filled = [0] * len(bins)
        for i in order:
            emptiest = min(range(len(bins)), key=filled.__getitem__)
            bins[emptiest].append(i)
            filled[emptiest] += examples[i].num_rows
        if max(filled) <= max_tokens or count * world_size >= len(examples):
            break
        count += 1
    return [
        [[examples[i] for i in sorted(bins[rank + world_size * k])] for k in range(count)]
        for rank in range(world_size)
    ]


def _ahead(
    steps: Iterator[tuple[list[PackedBatch], Position]], depth: int
) -> Iterator[tuple[list[PackedBatch], Position]]:
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
