"""Decoding without the host: a burst of steps for a padded batch, on CUDA each step the replay of one graph.

A burst uploads what decides the next tokens of its sequences (block tables, places, random numbers), runs its steps one
after another on the device, where each reads the tokens that the one before sampled, and brings all tokens back in one
copy. Rows that pad a batch repeat one of its sequences: they compute and write the very same values, so no kernel needs
to know of them. On the CPU the same steps run without graphs, which is how they are tested.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vila2.engine.runner import ModelRunner, PagedAttend
from vila2.engine.sampler import uniform
from vila2.engine.scheduler import Chunk, Scheduler
from vila2.engine.sequence import Sequence
from vila2.ops.sampling import sample

_BELOW_ONE = np.float32(1 - 2**-24)  # the largest float32 below 1: a draw must not round to 1


def padded_sizes(most: int) -> list[int]:
    """Batch sizes that get a graph: 1, 2, 4, then steps of 8, 16 and 32, so that few rows are computed in vain."""
    sizes = {1, 2, 4, *range(8, 33, 8), *range(48, 129, 16), *range(160, most + 32, 32)}
    return sorted({min(size, most) for size in sizes})


@dataclass(slots=True)
class _Inputs:
    """What one burst reads and writes, on the device; `steps` rows where a value differs from step to step."""

    tokens: Tensor  # (rows,) int64: the newest token of each sequence, replaced by every step
    positions: Tensor  # (rows,) int64
    tables: Tensor  # (rows, blocks) int32
    temperature: Tensor  # (rows,) float32
    top_k: Tensor  # (rows,) int32
    top_p: Tensor  # (rows,) float32
    draws: Tensor  # (steps, rows) float32
    is_banned: Tensor  # (steps, rows) int8: the ends of sequence must not come yet


@dataclass(slots=True)
class DecodeBursts:
    """Bursts of up to `steps` tokens for up to `max_num_seqs` sequences on a runner's model and cache."""

    runner: ModelRunner
    max_num_seqs: int
    max_tokens: int  # of one sequence, prompt included
    eos_ids: frozenset[int]
    steps: int = 8
    _device: _Inputs = field(init=False)
    _host: _Inputs = field(init=False)
    _output: Tensor = field(init=False)
    _arrived: Tensor = field(init=False)
    _step: Tensor = field(init=False)
    _starts: Tensor = field(init=False)
    _banned: Tensor = field(init=False)
    _graphs: dict[int, Callable[[], None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device, rows = self.runner.device, self.max_num_seqs
        blocks = -(-self.max_tokens // self.runner.block_size)
        self._device = _inputs(rows, self.steps, blocks, device, pinned=False)
        self._host = _inputs(rows, self.steps, blocks, torch.device("cpu"), pinned=device.type == "cuda")
        self._output = torch.zeros(self.steps, rows, dtype=torch.int64, device=device)
        self._arrived = torch.zeros(self.steps, rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._banned = torch.tensor(sorted(self.eos_ids), dtype=torch.int32, device=device)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture every graph now, the largest first, so that later ones fit into its memory."""
        if self.runner.device.type != "cuda":
            return
        pool: Any = None
        for size in reversed(padded_sizes(self.max_num_seqs)):
            # Each capture runs a step: at place 0 of block 0, which nobody holds yet.
            self._step.zero_()
            self._device.positions.zero_()
            self._graphs[size], pool = _capture(partial(self._advance, size), pool)

    def length(self, chunks: Seq[Chunk], scheduler: Scheduler) -> int:
        """How many steps these chunks can take on the device, blocks included; 0 if they are no step of decoding."""
        if not chunks or not all(_is_plain(chunk) for chunk in chunks):
            return 0
        # Where somebody waits for images or blocks, not for a place, the host looks again after every step.
        is_full = len(scheduler.running) >= scheduler.max_num_seqs
        count = self.steps if is_full or not scheduler.waiting else 1
        for chunk in chunks:
            sequence = chunk.sequence
            sampling = sequence.request.sampling
            left = sampling.max_new_tokens - sequence.num_new_tokens
            # A burst may run beyond an end of sequence or a stop, never beyond the room for tokens.
            count = min(count, left, self.max_tokens - len(sequence.tokens))
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
    def run(self, sequences: Seq[Sequence], count: int) -> list[list[int]]:
        """The next `count` tokens of each sequence, whose blocks have room for them. The cache is written."""
        size = next(size for size in padded_sizes(self.max_num_seqs) if size >= len(sequences))
        self._fill(sequences, size, count)
        for part in fields(_Inputs):
            getattr(self._device, part.name).copy_(getattr(self._host, part.name), non_blocking=True)
        self._step.zero_()
        advance = self._graphs.get(size)
        for _ in range(count):
            if advance is None:
                self._advance(size)
            else:
                advance()
        self._arrived.copy_(self._output, non_blocking=True)
        if self.runner.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return self._arrived[:count, : len(sequences)].t().tolist()

    def _fill(self, sequences: Seq[Sequence], size: int, count: int) -> None:
        """Write the host's copy of the inputs; padding repeats the sequence with the shortest context."""
        shortest = min(sequences, key=lambda sequence: sequence.num_computed)
        padded = [*sequences, *[shortest] * (size - len(sequences))]
        samplings = [sequence.request.sampling for sequence in padded]
        host, rows = self._host, slice(0, size)
        host.tokens.numpy()[rows] = [sequence.tokens[-1] for sequence in padded]
        host.positions.numpy()[rows] = [sequence.num_computed for sequence in padded]
        host.temperature.numpy()[rows] = [sampling.temperature for sampling in samplings]
        host.top_k.numpy()[rows] = [sampling.top_k for sampling in samplings]
        host.top_p.numpy()[rows] = [sampling.top_p for sampling in samplings]
        tables, draws = host.tables.numpy(), host.draws.numpy()
        tables[rows] = 0
        for row, sequence in enumerate(padded):
            tables[row, : len(sequence.blocks)] = sequence.blocks
            if samplings[row].temperature > 0:
                key, first = sequence.request.rng_key, sequence.num_new_tokens
                numbers = np.array([uniform(key, first + step) for step in range(count)], dtype=np.float32)
                draws[:count, row] = np.minimum(numbers, _BELOW_ONE)
        places = np.arange(count)[:, None] + np.array([sequence.num_new_tokens for sequence in padded])
        early = places < np.array([sampling.min_new_tokens for sampling in samplings])
        ignored = np.array([sampling.ignore_eos for sampling in samplings])
        host.is_banned.numpy()[:count, rows] = early | ignored

    def _advance(self, size: int) -> None:
        """One step of `size` rows: nothing here reads a value on the host."""
        inputs, runner = self._device, self.runner
        decoder, block_size = runner.model.decoder, runner.block_size
        tokens, positions, tables = (part[:size] for part in (inputs.tokens, inputs.positions, inputs.tables))
        blocks = tables.gather(1, (positions // block_size)[:, None])[:, 0]
        attend = PagedAttend(
            runner.cache,
            positions,
            blocks.long() * block_size + positions % block_size,
            tables,
            self._starts[: size + 1],
            (positions + 1).int(),
            decoder.cos,
            decoder.sin,
            runner.scale,
            longest=1,
        )
        logits = decoder.logits(decoder(decoder.embed(tokens), attend))
        chosen = sample(
            logits,
            inputs.temperature[:size],
            inputs.top_k[:size],
            inputs.top_p[:size],
            inputs.draws.index_select(0, self._step)[0, :size],
            self._banned,
            inputs.is_banned.index_select(0, self._step)[0, :size],
        )
        tokens.copy_(chosen)
        positions += 1
        self._output[:, :size].index_copy_(0, self._step, chosen[None])
        self._step += 1


def _inputs(rows: int, steps: int, blocks: int, device: torch.device, *, pinned: bool) -> _Inputs:
    def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device, pin_memory=pinned)

    return _Inputs(
        zeros(torch.int64, rows),
        zeros(torch.int64, rows),
        zeros(torch.int32, rows, blocks),
        zeros(torch.float32, rows),
        zeros(torch.int32, rows),
        zeros(torch.float32, rows).fill_(1),
        zeros(torch.float32, steps, rows),
        zeros(torch.int8, steps, rows),
    )


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
    with torch.cuda.graph(graph, pool=pool):
        advance()
    return graph.replay, graph.pool()
