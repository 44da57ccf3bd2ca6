"""Attention over a paged KV cache.

A cache is (num_blocks, kv_heads, block_size, head_dim), float32 or bfloat16; slot `b * block_size + i` is row i
of block b. In `_C`, a row of the output depends only on its own query and its own context: never on the batch, on
how a prompt was cut into chunks, or on the number of threads.
"""

import torch
from torch import Tensor

from vila2.ops.native import is_native, native
from vila2.ops.rope import apply_rope_reference
from vila2.ops.triton import is_triton

MAX_HEAD_DIM = 256  # what the kernels of `_C` have room for

# Which decoding sequences begin with the same blocks: `(lens, group_starts, members)`, int32 on the device. Sequence s
# shares its first lens[s] keys (whole blocks; 0: none) with group g = members[group_starts[g]:group_starts[g + 1]].
SharedPrefixes = tuple[Tensor, Tensor, Tensor]


def rope_store_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """Rotate q (T, H, D) and k (T, KVH, D) to `positions` (T,), write k and v at `slots` (T,); returns q rotated.

    What has slot -1 is not written: rows that only pad a batch.
    """
    written = slots >= 0
    blocks = slots[written] // k_cache.shape[2]
    offsets = slots[written] % k_cache.shape[2]
    k_cache[blocks, :, offsets] = apply_rope_reference(k, positions, cos, sin)[written].to(k_cache.dtype)
    v_cache[blocks, :, offsets] = v[written].to(v_cache.dtype)
    return apply_rope_reference(q, positions, cos, sin)


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention in float32: q (T, H, D) to (T, H * D).

    Sequence s owns the query rows `query_starts[s]:query_starts[s + 1]`: the last rows of a context of
    `context_lens[s]` tokens that lie in the blocks `block_tables[s]`. Query head h reads KV head
    h // (H / KVH).
    """
    tokens, heads, dim = q.shape
    kv_heads, block_size = k_cache.shape[1:3]
    out = torch.empty(tokens, heads * dim, dtype=q.dtype, device=q.device)
    starts, lengths = query_starts.tolist(), context_lens.tolist()
    for s, length in enumerate(lengths):
        rows = slice(starts[s], starts[s + 1])
        count = rows.stop - rows.start
        if count == 0:
            continue
        blocks = block_tables[s, : (length + block_size - 1) // block_size].long()
        keys, values = (
            cache[blocks].transpose(1, 2).reshape(-1, kv_heads, dim)[:length].float()
            for cache in (k_cache, v_cache)
        )  # (length, KVH, D)
        queries = q[rows].float().view(count, kv_heads, heads // kv_heads, dim)
        scores = torch.einsum("tgrd,lgd->grtl", queries, keys) * scale
        last = torch.arange(length - count, length, device=q.device)
        scores.masked_fill_(torch.arange(length, device=q.device) > last[:, None], -torch.inf)
        attended = torch.einsum("grtl,lgd->tgrd", scores.softmax(-1), values)
        out[rows] = attended.reshape(count, heads * dim).to(q.dtype)
    return out


def rope_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """Rotate q and k, store k and v; returns q rotated, (T, H, D). q, k and v may be slices of one tensor.

    Shapes as in `rope_store_reference`. Raises ValueError for a position or a slot out of range, and for heads
    that do not lie side by side; on CUDA positions and slots are not checked.
    """
    if is_native(q, k, v) and is_native(k_cache, v_cache):
        rotated = q.new_empty(q.shape)
        native.rope_store(q, k, v, positions, slots, cos, sin, k_cache, v_cache, rotated)
        return rotated
    if is_triton(q, k_cache):
        from vila2.kernels.rope_store import rope_store_triton

        return rope_store_triton(q, k, v, positions, slots, cos, sin, k_cache, v_cache)
    return rope_store_reference(q, k, v, positions, slots, cos, sin, k_cache, v_cache)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    longest: int | None = None,
    shared: SharedPrefixes | None = None,
) -> Tensor:
    """Causal attention of chunks and single tokens alike; shapes as in `paged_attention_reference`.

    What only speeds CUDA up, where lengths lie on the device: `longest`, the most rows that a sequence owns, if the
    caller knows (1: a step of decoding), and then `shared`. Raises ValueError for a block or a length out of range
    (on the CPU).
    """
    if is_native(q) and is_native(k_cache, v_cache) and q.shape[-1] <= MAX_HEAD_DIM:
        tokens, heads, dim = q.shape
        out = q.new_empty(tokens, heads * dim)
        native.paged_attention(q, k_cache, v_cache, block_tables, query_starts, context_lens, scale, out)
        return out
    if is_triton(q, k_cache):
        if longest == 1 and len(q) == len(context_lens):
            from vila2.kernels.attention_decode import paged_decode_triton

            return paged_decode_triton(q, k_cache, v_cache, block_tables, context_lens, scale, shared)
        from vila2.kernels.attention_prefill import paged_prefill_triton

        return paged_prefill_triton(q, k_cache, v_cache, block_tables, query_starts, context_lens, scale)
    return paged_attention_reference(q, k_cache, v_cache, block_tables, query_starts, context_lens, scale)
