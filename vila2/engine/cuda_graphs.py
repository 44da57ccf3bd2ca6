"""Decoding without the host: a burst of steps for a padded batch, on CUDA each step the replay of one graph.

A burst uploads what decides the next tokens of its sequences (block tables, places, random numbers), and runs its steps
one after another on the device, where each reads the tokens that the one before sampled; the first reads those of the
launch before, which nobody needs to have read (see vila2.engine.overlap). Rows that pad a batch read one of its
sequences and write nothing: outside that sequence's group they sum in another order, and so may choose another token.
On the CPU the same steps run without graphs, which is how they are tested.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila2.engine.gpu_memory import is_out_of_memory
from vila2.engine.grouping import group_by_prefix, max_groups
from vila2.engine.runner import ModelRunner, PagedAttend
from vila2.engine.sampler import device_choice
from vila2.engine.scheduler import Chunk, Scheduler
from vila2.engine.sequence import Sequence
from vila2.engine.slots import Slots
from vila2.ops.sampling import append_tokens, sample


def padded_sizes(most: int) -> list[int]:
    """Batch sizes that get a graph: 1, 2, 4, then steps of 8, 16 and 32, so that few rows are computed in vain."""
    sizes = {1, 2, 4, *range(8, 33, 8), *range(48, 129, 16), *range(160, most + 32, 32)}
    return sorted({min(size, most) for size in sizes})


@dataclass(slots=True)
class DecodeBursts:
    """Bursts of up to `steps` tokens for up to `max_num_seqs` sequences on a runner's model and cache."""

    runner: ModelRunner
    slots: Slots
    max_num_seqs: int
    max_tokens: int  # of one sequence, prompt included
    eos_ids: frozenset[int]
    steps: int = 8
    groups_prefixes: bool = False  # whether sequences are told to read shared blocks together
    _inputs: dict[str, Tensor] = field(init=False)  # fixed places that the graphs read; see `_values`
    _output: Tensor = field(init=False)  # (steps, rows, 2) int64: token, and what repeats at its end
    _step: Tensor = field(init=False)
    _starts: Tensor = field(init=False)
    banned: Tensor = field(init=False)  # the ends of sequence, (n,) int32
    _graphs: dict[tuple[int, bool], Callable[[], None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device, rows, steps = self.runner.device, self.max_num_seqs, self.steps
        blocks = -(-self.max_tokens // self.runner.block_size)

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        whole, wide, real = torch.int32, torch.int64, torch.float32
        self._inputs = {
            "tokens": zeros(wide, rows),  # the newest token of each sequence, replaced by every step
            "positions": zeros(wide, rows),
            "slots": zeros(wide, rows).fill_(-1),
            "tables": zeros(whole, rows, blocks),
            "temperature": zeros(real, rows),
            "top_k": zeros(whole, rows),
            "top_p": zeros(real, rows).fill_(1),
            "rules": zeros(whole, rows, 3),
            "draws": zeros(real, steps, rows),
            "is_banned": zeros(torch.int8, steps, rows),  # the ends of sequence must not come yet
            "lens": zeros(whole, rows),
            "group_starts": zeros(whole, max_groups(rows) + 1),
            "members": zeros(whole, rows),
        }
        self._output = zeros(wide, steps, rows, 2)
        self._step = zeros(wide, 1)
        self._starts = torch.arange(rows + 1, dtype=whole, device=device)
        self.banned = torch.tensor(sorted(self.eos_ids), dtype=whole, device=device)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture every graph now, the largest first, so that later ones fit into its memory."""
        if self.runner.device.type != "cuda":
            return
        pool: Any = None
        for size in reversed(padded_sizes(self.max_num_seqs)):
            for grouped in (False, True) if self.groups_prefixes else (False,):
                # Each capture runs a step: at place 0 of block 0, which nobody holds yet, and of no slot.
                self._step.zero_()
                self._inputs["positions"].zero_()
                self._graphs[size, grouped], pool = _capture(partial(self._advance, size, grouped), pool)

    def length(self, chunks: Seq[Chunk], scheduler: Scheduler) -> int:
        """How many steps these chunks can take on the device, blocks included; 0 if they are no step of decoding."""
        if not chunks or not all(_is_plain(chunk) for chunk in chunks):
            return 0
        # Where somebody waits for images or blocks, not for a place, the host looks again after every step.
        is_full = len(scheduler.running) >= scheduler.max_num_seqs
        count = self.steps if is_full or not scheduler.waiting else 1
        sequences = [chunk.sequence for chunk in chunks]
        left = min(seq.request.sampling.max_new_tokens - seq.num_new_tokens for seq in sequences)
        # A burst may run beyond the end of a caption, whose tokens are then thrown away: it is not cut to pieces by
        # captions that end one after the other. It never runs beyond the room for tokens.
        room = min(self.max_tokens - seq.num_tokens for seq in sequences)
        count = min(count, max(left, self.steps // 2), room)
        return count if self._reserve(chunks, scheduler, count) else 1

    def _reserve(self, chunks: Seq[Chunk], scheduler: Scheduler, count: int) -> bool:
        pool = scheduler.pool
        needed = [
            max(0, pool.blocks_for(chunk.sequence.num_computed + count) - len(chunk.sequence.blocks))
            for chunk in chunks
        ]
        if sum(needed) > pool.num_free:
            return False
        for chunk, more in zip(chunks, needed, strict=True):
            chunk.sequence.blocks += pool.allocate(more)
        return True

    @torch.inference_mode()
    def launch(self, sequences: Seq[Sequence], count: int) -> Tensor:
        """Start the next `count` tokens of each sequence, whose blocks have room for them. The cache is written.

        Returns, on the device, (count, sequences, 2): each token, and how many tokens at the end it makes a loop of.
        """
        size = next(size for size in padded_sizes(self.max_num_seqs) if size >= len(sequences))
        grouped = self._upload(sequences, size, count)
        advance = self._graphs.get((size, grouped)) or partial(self._advance, size, grouped)
        for _ in range(count):
            advance()
        return self._output[:count, : len(sequences)]

    def _upload(self, sequences: Seq[Sequence], size: int, count: int) -> bool:
        """Put the inputs in their places; padding repeats the sequence with the shortest context."""
        shortest = min(sequences, key=lambda sequence: sequence.num_computed)
        padded = [*sequences, *[shortest] * (size - len(sequences))]
        values = self._values(padded, count)
        values["slots"][len(sequences) :] = -1
        groups = (
            group_by_prefix(padded, len(sequences), self.runner.block_size) if self.groups_prefixes else None
        )
        if groups is not None:
            values.update(zip(("lens", "group_starts", "members"), groups, strict=True))
        for name, value in values.items():
            place = self._inputs[name][tuple(slice(length) for length in value.shape)]
            place.copy_(self.runner.upload(value))
        sources = self.runner.upload(np.array([sequence.slot for sequence in padded], dtype=np.int64))
        self._inputs["tokens"][:size] = self.slots.newest[sources]
        self._step.zero_()
        return groups is not None

    def _values(self, sequences: Seq[Sequence], count: int) -> dict[str, NDArray[Any]]:
        choice = device_choice(sequences, count)
        tables = np.zeros((len(sequences), self._inputs["tables"].shape[1]), dtype=np.int32)
        for row, sequence in enumerate(sequences):
            tables[row, : len(sequence.blocks)] = sequence.blocks
        return {
            "positions": np.array([sequence.num_computed for sequence in sequences], dtype=np.int64),
            "slots": np.array([sequence.slot for sequence in sequences], dtype=np.int64),
            "tables": tables,
            "rules": np.array([self.slots.rule_of(sequence) for sequence in sequences], dtype=np.int32),
            **choice,
        }

    def _advance(self, size: int, grouped: bool) -> None:
        """One step of `size` rows: nothing here reads a value on the host."""
        inputs = {name: value[:size] for name, value in self._inputs.items() if name != "group_starts"}
        runner, step = self.runner, self._step
        decoder, block_size = runner.model.decoder, runner.block_size
        tokens, positions, tables, slots = (
            inputs[name] for name in ("tokens", "positions", "tables", "slots")
        )
        blocks = tables.gather(1, (positions // block_size)[:, None])[:, 0]
        starts = self._inputs["group_starts"][: max_groups(size) + 1]
        attend = PagedAttend(
            runner.cache,
            positions,
            torch.where(slots < 0, -1, blocks.long() * block_size + positions % block_size),
            tables,
            self._starts[: size + 1],
            (positions + 1).int(),
            decoder.cos,
            decoder.sin,
            runner.scale,
            longest=1,
            shared=(inputs["lens"], starts, inputs["members"]) if grouped else None,
        )
        logits = decoder.logits(decoder(decoder.embed(tokens), attend))
        chosen = sample(
            logits,
            inputs["temperature"],
            inputs["top_k"],
            inputs["top_p"],
            self._inputs["draws"].index_select(0, step)[0, :size],
            self.banned,
            self._inputs["is_banned"].index_select(0, step)[0, :size],
        )
        table = self.slots
        repeated = append_tokens(chosen, slots, table.history, table.lengths, table.runs, inputs["rules"])
        tokens.copy_(chosen)
        positions += 1
        self._output[:, :size].index_copy_(0, step, torch.stack((chosen, repeated.long()), -1)[None])
        step += 1


def _is_plain(chunk: Chunk) -> bool:
    return chunk.sequence.is_decoding and chunk.num_tokens == 1 and not chunk.draft


def _capture(advance: Callable[[], None], pool: Any) -> tuple[Callable[[], None], Any]:
    """A graph of `advance` and the pool of its memory. It runs once before: kernels compile and libraries wake up."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        advance()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            advance()
    except RuntimeError as error:
        # A capture that memory ends cannot be closed either: say what came first.
        first = error.__context__
        if first is not None and is_out_of_memory(first):
            raise first from None
        raise
    return graph.replay, graph.pool()
