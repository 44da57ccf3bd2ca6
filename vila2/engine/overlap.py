"""The device runs ahead of the host: what comes next is launched before the tokens of the launch before are read.

The host knows how many tokens a launch will bring, so it can schedule behind it; which tokens they are stays on the
device (see slots.py) until they are read, one launch later. A caption that turns out to have ended is then dropped, and
the tokens that the device made meanwhile are thrown away. The host waits in one place, `Flight.tokens`, for a launch
that another one has followed, so the device is never without work while the host schedules.
"""

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vila2.engine.cuda_graphs import DecodeBursts
from vila2.engine.runner import ModelRunner
from vila2.engine.sampler import device_choice
from vila2.engine.scheduler import Scheduler, Step
from vila2.engine.sequence import Sequence
from vila2.engine.slots import Slots
from vila2.ops.sampling import append_tokens, sample


@dataclass(slots=True)
class Flight:
    """Tokens on their way to the host: `count` for each of `sequences`."""

    sequences: list[Sequence]
    count: int
    arrived: Tensor  # (count, sequences, 2) on the host, complete once `landed` has come
    landed: "torch.cuda.Event | None"

    def tokens(self) -> list[list[tuple[int, int]]]:
        """For each sequence its tokens, each with what repeats at its end; waits for the device."""
        if self.landed is not None:
            self.landed.synchronize()
        pairs: list[list[tuple[int, int]]] = self.arrived.transpose(0, 1).tolist()
        return pairs


class Ahead:
    """Launches steps and bursts, and keeps what is in flight, the oldest first."""

    def __init__(self, runner: ModelRunner, bursts: DecodeBursts, slots: Slots, max_tokens: int) -> None:
        self.runner, self.bursts, self.slots = runner, bursts, slots
        self.max_tokens = max_tokens  # of one sequence
        self.flights: deque[Flight] = deque()

    @torch.inference_mode()
    def launch(self, step: Step, scheduler: Scheduler, embeddings: list[list[Tensor]]) -> int:
        """Launch what was scheduled, as a burst if it only decodes; returns the number of steps that this makes."""
        chunks = step.chunks
        count = self.bursts.length(chunks, scheduler)
        self.runner.copy(step.copies)
        self.slots.take([chunk.sequence for chunk in chunks])
        sequences = [chunk.sequence for chunk in chunks if chunk.wants_logits]
        new: Tensor | None = None
        if count:
            new = self.bursts.launch(sequences, count)
        else:
            hidden = self.runner.run(chunks, embeddings, self.slots.newest)
            if sequences:  # none where a prompt comes in parts
                new = self._sample(self.runner.model.decoder.logits(hidden).float(), sequences)
        self.runner.copy(scheduler.advance(step))
        if new is not None:
            self._take_off(sequences, new)
        return max(count, 1)

    def _sample(self, logits: Tensor, sequences: Seq[Sequence]) -> Tensor:
        """The token after each sequence's chunk, as one step of a burst gives them; nothing waits for the device."""
        upload = self.runner.upload
        choice = {name: upload(value) for name, value in device_choice(sequences, 1).items()}
        chosen = sample(
            logits,
            choice["temperature"],
            choice["top_k"],
            choice["top_p"],
            choice["draws"][0],
            self.bursts.banned,
            choice["is_banned"][0],
        )
        slots = upload(np.array([sequence.slot for sequence in sequences], dtype=np.int64))
        rules = upload(
            np.array([self.slots.rule_of(sequence) for sequence in sequences], dtype=np.int32).reshape(-1, 3)
        )
        table = self.slots
        repeated = append_tokens(chosen, slots, table.history, table.lengths, table.runs, rules)
        return torch.stack((chosen, repeated.long()), -1)[None]

    def _take_off(self, sequences: list[Sequence], new: Tensor) -> None:
        """Leave the newest tokens where the next launch reads them, and send all of them to the host."""
        at = self.runner.upload(np.array([sequence.slot for sequence in sequences], dtype=np.int64))
        self.slots.newest[at] = new[-1, :, 0]
        self.flights.append(self._send(sequences, new))
        for sequence in sequences:
            sequence.num_computed += len(new) - 1
            sequence.num_pending += len(new)
            sequence.is_closing = (
                sequence.num_new_tokens >= sequence.request.sampling.max_new_tokens
                or sequence.num_tokens >= self.max_tokens
            )

    def _send(self, sequences: list[Sequence], new: Tensor) -> Flight:
        if self.runner.device.type != "cuda":
            return Flight(sequences, len(new), new.clone(), None)
        arrived = torch.empty(new.shape, dtype=new.dtype, pin_memory=True)
        arrived.copy_(new, non_blocking=True)
        landed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        landed.record()
        return Flight(sequences, len(new), arrived, landed)
