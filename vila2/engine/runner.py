"""Runs what the scheduler chose: builds the batch's tensors, calls the model, owns the KV cache's memory."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila2.engine.blocks import BlockCopy
from vila2.engine.gpu_memory import out_of_memory
from vila2.engine.sampler import best_tokens
from vila2.engine.scheduler import Chunk
from vila2.engine.vision_stream import VisionStream
from vila2.errors import UsageError
from vila2.model.images import PreparedImage
from vila2.model.vlm import VisionLanguageModel
from vila2.ops.attention import SharedPrefixes, paged_attention, rope_store


@dataclass(slots=True)
class PagedAttend:
    """The decoder's `attend` over the paged cache for one batch (see vila2.model.decoder)."""

    cache: Tensor  # (layers, 2, blocks, kv_heads, block_size, head_dim)
    positions: Tensor  # (tokens,) int64
    slots: Tensor  # (tokens,) int64
    block_tables: Tensor  # (sequences, blocks) int32
    query_starts: Tensor  # (sequences + 1,) int32
    context_lens: Tensor  # (sequences,) int32
    cos: Tensor
    sin: Tensor
    scale: float
    longest: int | None = None  # the most rows of one sequence, where the host knows it
    shared: SharedPrefixes | None = None  # in a step of decoding: who reads the same blocks

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache[layer].unbind(0)
        q = rope_store(q, k, v, self.positions, self.slots, self.cos, self.sin, keys, values)
        return paged_attention(
            q,
            keys,
            values,
            self.block_tables,
            self.query_starts,
            self.context_lens,
            self.scale,
            self.longest,
            self.shared,
        )


class ModelRunner:
    """A model with `num_blocks` blocks of KV cache in `kv_dtype` beside it."""

    def __init__(
        self, model: VisionLanguageModel, num_blocks: int, block_size: int, kv_dtype: torch.dtype
    ) -> None:
        config = model.config.decoder
        self.model = model
        self.block_size = block_size
        self.scale = config.head_dim**-0.5
        self.device = model.decoder.cos.device
        self.vision = VisionStream(self.device)
        shape = (config.num_layers, 2, num_blocks, config.num_kv_heads, block_size, config.head_dim)
        # zeros: pages that no sequence has touched cost no memory on Linux, and a gather never meets a NaN.
        self.cache = torch.zeros(shape, dtype=kv_dtype, device=self.device)

    @torch.inference_mode()
    def encode(self, images: list[PreparedImage]) -> list[Tensor]:
        """Visual tokens (num_tokens, hidden) of each image, in one batch."""
        return self.vision.run(lambda: self.model.encode_images(images))

    def copy(self, copies: list[BlockCopy]) -> None:
        """Carry out block copies, in order."""
        for copy in copies:
            self.cache[:, :, copy.target, :, : copy.num_tokens] = self.cache[
                :, :, copy.source, :, : copy.num_tokens
            ]

    @torch.inference_mode()
    def run(
        self, chunks: list[Chunk], embeddings: list[list[Tensor]], newest: Tensor | None = None
    ) -> Tensor:
        """Compute the chunks. `embeddings[i]` holds the visual tokens of each image of chunk i.

        With `newest`, a decoding sequence's newest token is read there on the device, at the sequence's slot, and the
        host waits for nothing. Returns the final hidden states (n, hidden) of the last
        `num_logits` rows of each chunk.
        """
        hidden = self._embed(chunks, embeddings, newest)
        hidden = self.model.decoder(hidden, self._attend(chunks))
        ends = np.cumsum([chunk.num_rows for chunk in chunks]).tolist()
        rows = [
            row for end, chunk in zip(ends, chunks, strict=True) for row in range(end - chunk.num_logits, end)
        ]
        return hidden if len(rows) == len(hidden) else hidden[self.upload(np.array(rows, dtype=np.int64))]

    def upload(self, array: NDArray[Any]) -> Tensor:
        """The array on the device, for launches from here on; the host does not wait for the copy."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()  # torch keeps such memory until the copy is through
        return tensor.to(self.device, non_blocking=True)

    @torch.inference_mode()
    def probe(self, rows: int, block: int, context: int, length: int = 1) -> None:
        """Compute the last `length` of the `context` tokens of each of `rows` sequences, and wait for the next ones.

        Overwrites `block` alone: all sequences lie there, one over the other.
        """
        hidden = self.model.decoder.embed(torch.zeros(rows * length, dtype=torch.int64, device=self.device))
        lines = np.arange(rows * length, dtype=np.int64)
        starts = np.arange(rows + 1, dtype=np.int32) * length
        attend = self._paged(
            positions=context - length + lines % length,
            slots=block * self.block_size + lines % self.block_size,
            tables=np.full((rows, -(-context // self.block_size)), block, dtype=np.int32),
            starts=starts,
            contexts=np.full(rows, context, dtype=np.int32),
        )
        hidden = self.model.decoder(hidden, attend)
        if length > 1:
            hidden = hidden[self.upload(starts[1:].astype(np.int64) - 1)]
        best_tokens(self.model.decoder, hidden)

    def clear_memory(self) -> None:
        """Give back what torch keeps for later."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def out_of_memory(self, doing: str) -> UsageError:
        """What to tell the user when the device's memory ends while `doing` something that cannot be made smaller."""
        free, total = torch.cuda.mem_get_info()
        return out_of_memory(doing, free=free, total=total)

    def _embed(self, chunks: list[Chunk], embeddings: list[list[Tensor]], newest: Tensor | None) -> Tensor:
        self.vision.join()
        ids: list[int] = []
        late: list[int] = []
        slots: list[int] = []
        for chunk in chunks:
            if newest is not None and chunk.sequence.is_decoding:
                late.append(len(ids))
                slots.append(chunk.sequence.slot)
                ids.append(0)
                continue
            start = chunk.sequence.num_computed
            ids += chunk.sequence.tokens[start : start + chunk.num_tokens]
            ids += chunk.draft
        token_ids = self.upload(np.array(ids, dtype=np.int64))
        if newest is not None and late:
            at, of = self.upload(np.array([late, slots], dtype=np.int64))
            token_ids[at] = newest[of]
        hidden = self.model.decoder.embed(token_ids.clamp_min(0))
        row = 0
        for chunk, visual in zip(chunks, embeddings, strict=True):
            begin = chunk.sequence.num_computed
            end = begin + chunk.num_tokens
            for span in chunk.sequence.request.spans:
                first, last = max(begin, span.start), min(end, span.start + span.length)
                if first < last:
                    source = visual[span.image][span.offset + first - span.start :][: last - first]
                    hidden[row + first - begin : row + last - begin] = source
            row += chunk.num_rows
        return hidden

    def _attend(self, chunks: list[Chunk]) -> PagedAttend:
        counts = [chunk.num_rows for chunk in chunks]
        starts = np.zeros(len(chunks) + 1, dtype=np.int32)
        np.cumsum(counts, out=starts[1:])
        tables = np.zeros((len(chunks), max(len(chunk.sequence.blocks) for chunk in chunks)), dtype=np.int32)
        positions = np.empty(starts[-1], dtype=np.int64)
        slots = np.empty(starts[-1], dtype=np.int64)
        contexts = np.empty(len(chunks), dtype=np.int32)
        for i, chunk in enumerate(chunks):
            blocks, begin = chunk.sequence.blocks, chunk.sequence.num_computed
            tables[i, : len(blocks)] = blocks
            contexts[i] = begin + chunk.num_rows
            here = np.arange(begin, contexts[i])
            positions[starts[i] : starts[i + 1]] = here
            slots[starts[i] : starts[i + 1]] = (
                tables[i, here // self.block_size].astype(np.int64) * self.block_size + here % self.block_size
            )
        return self._paged(positions, slots, tables, starts, contexts)

    def _paged(
        self,
        positions: NDArray[Any],
        slots: NDArray[Any],
        tables: NDArray[Any],
        starts: NDArray[Any],
        contexts: NDArray[Any],
    ) -> PagedAttend:
        return PagedAttend(
            self.cache,
            self.upload(positions),
            self.upload(slots),
            self.upload(tables),
            self.upload(starts),
            self.upload(contexts),
            self.model.decoder.cos,
            self.model.decoder.sin,
            self.scale,
            longest=int(np.diff(starts).max(initial=0)),
        )
