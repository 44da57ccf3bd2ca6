"""What only the device knows while it runs ahead of the host: each running sequence's newest token, and its loops.

A sequence takes a slot at its first launch and loses it when it ends or is preempted. Everything that reads or writes
a slot is launched in order on one stream, so a slot may be given away while its last owner's work is still under way.
"""

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from vila2.engine.repetition import new_runs, update_runs
from vila2.engine.runner import ModelRunner
from vila2.engine.sequence import Sequence
from vila2.types import RepetitionRule


class Slots:
    """Tables of `count` slots on the runner's device, with room for `room` new tokens each."""

    def __init__(self, runner: ModelRunner, count: int, room: int, max_period: int) -> None:
        self._runner = runner
        self._max_period = max_period
        self._owners: list[Sequence | None] = [None] * count

        def table(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=runner.device)

        self.newest = table(count, dtype=torch.int64)
        self.history = table(count, room)  # new tokens: of an earlier part of them, only what loops need
        self.lengths = table(count)
        self.runs = table(count, max_period)

    def take(self, sequences: Seq[Sequence]) -> None:
        """Give a slot to each sequence that has none."""
        new = [sequence for sequence in sequences if sequence.slot < 0]
        if not new:
            return
        free = [
            slot
            for slot, owner in enumerate(self._owners)
            if owner is None or owner.is_done or owner.slot != slot
        ]
        for sequence, slot in zip(new, free, strict=False):
            sequence.slot = slot
            self._owners[slot] = sequence
        slots = self._runner.upload(np.array([sequence.slot for sequence in new], dtype=np.int64))
        self.lengths.index_fill_(0, slots, 0)
        self.runs.index_fill_(0, slots, 0)
        for sequence in new:
            if sequence.output:
                self._restore(sequence)

    def leaves_loops(self, sequence: Sequence) -> bool:
        """Whether the sequence's rule is beyond the device's tables, so that the host must look for its loops."""
        rule = sequence.request.sampling.repetition
        return rule is not None and rule.max_period > self._max_period

    def rule_of(self, sequence: Sequence) -> tuple[int, int, int]:
        """A row of the rules that `append_tokens` takes; no rule where the host looks for loops itself."""
        rule = sequence.request.sampling.repetition
        if rule is None or self.leaves_loops(sequence):
            return 0, 0, 0
        return rule.min_repeats, rule.min_tokens, rule.max_period

    def _restore(self, sequence: Sequence) -> None:
        """A sequence that was preempted: what it had written counts for loops."""
        output = sequence.output
        runs = new_runs(RepetitionRule(self._max_period, 2, 1))
        for end in range(1, len(output) + 1):
            update_runs(runs, output[max(0, end - self._max_period - 1) : end])
        tail = np.array(output[-self._max_period :], dtype=np.int32)
        self.history[sequence.slot, : len(tail)] = self._runner.upload(tail)
        self.runs[sequence.slot] = self._runner.upload(runs)
        self.lengths[sequence.slot] = len(tail)
