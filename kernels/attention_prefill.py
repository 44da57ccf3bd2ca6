"""Causal attention of chunks of any length over the paged cache, in one launch: flash attention with online softmax.

    out[t, h] = sum_j softmax_j(scale * q[t, h] . k[j, h / group]) v[j, h / group],   j up to the place of t

A program takes a few queries of one sequence and all heads that share a KV head, so that keys are read once for the
group. Which sequence is found on the device by bisection, so the host knows only the sum of the lengths: the grid has
tokens / queries + sequences programs, and those beyond a sequence's end do nothing. Decoding rows (a chunk of one) may
be among the sequences. Reference: vila2/ops/attention.py. Tests: tests/kernels/test_attention.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def attend_keys(
    q,
    places,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    kv_head,
    start,
    stop,
    length,
    block_stride,
    dim,
    peak,
    total,
    mixed,
    scale_log2,
    IS_MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One run over keys start..stop - 1 by the online softmax: `(peak, total, mixed)` brought up to date.

    `places` (rows,) are the last keys that each row sees, wanted where IS_MASKED. Exponents are of 2.
    """
    i = tl.arange(0, BLOCK_D)
    for first in range(start, stop, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        there = j < length
        block = tl.load(table_ptr + j // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        at = block * block_stride + (kv_head * BLOCK_SIZE + j % BLOCK_SIZE) * dim
        inside = there[:, None] & (i[None, :] < dim)
        k = tl.load(k_cache_ptr + at[:, None] + i[None, :], mask=inside, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if IS_MASKED:
            scores = tl.where(j[None, :] <= places[:, None], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        # A row that has seen no key yet has peak -inf; minus itself that would be NaN.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(peak - safe)
        weights = tl.exp2(scores - safe[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        v = tl.load(v_cache_ptr + at[:, None] + i[None, :], mask=inside, other=0.0).to(q.dtype)
        mixed = tl.dot(weights.to(q.dtype), v, mixed * shrink[:, None], input_precision=PRECISION)
        peak = higher
    return peak, total, mixed


@triton.jit
def find_owner(starts_ptr, count, tile, ROWS: tl.constexpr):
    """The last s with `starts[s] // ROWS + s <= tile`: whose tile it is, if every owner rounds up to whole tiles."""
    low = 0
    high = count - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(starts_ptr + middle) // ROWS + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _prefill_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    tables_ptr,
    starts_ptr,
    contexts_ptr,
    out_ptr,
    num_sequences,
    heads,
    dim,
    table_stride,
    block_stride,
    scale_log2,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = find_owner(starts_ptr, num_sequences, tile, QUERIES)
    first_row = tl.load(starts_ptr + sequence)
    count = tl.load(starts_ptr + sequence + 1) - first_row
    first = (tile - (first_row // QUERIES + sequence)) * QUERIES  # of this program's queries, in the sequence
    if first >= count:
        return
    length = tl.load(contexts_ptr + sequence)

    row = tl.arange(0, BLOCK_M)  # (query, head of the group)
    query = first + row // GROUP
    i = tl.arange(0, BLOCK_D)
    valid = (row < QUERIES * GROUP) & (query < count)
    inside = valid[:, None] & (i[None, :] < dim)
    offset = (first_row + query).to(tl.int64) * heads * dim + (kv_head * GROUP + row % GROUP) * dim
    q = tl.load(q_ptr + offset[:, None] + i[None, :], mask=inside, other=0.0)

    places = length - count + query
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Keys that every row sees need no mask.
    open_keys = (length - count + first + 1) // BLOCK_N * BLOCK_N
    stop = tl.minimum(length, length - count + first + QUERIES)
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    peak, total, mixed = attend_keys(
        q, places, k_cache_ptr, v_cache_ptr, table, kv_head, 0, open_keys, length, block_stride, dim,
        peak, total, mixed, scale_log2, False, PRECISION, BLOCK_SIZE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    peak, total, mixed = attend_keys(
        q, places, k_cache_ptr, v_cache_ptr, table, kv_head, open_keys, stop, length, block_stride, dim,
        peak, total, mixed, scale_log2, True, PRECISION, BLOCK_SIZE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    out = mixed / total[:, None]
    tl.store(out_ptr + offset[:, None] + i[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


LOG2_E = 1.4426950408889634


def precision_of(q: Tensor) -> str:
    """How products of this type are made: float32 exactly, since the reference's are; bfloat16 as it comes."""
    return "ieee" if q.dtype == torch.float32 else "tf32"


def check_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> tuple[int, int, int]:
    """`(heads a KV head, block size, padded dim)`; ValueError unless caches and queries belong together."""
    heads, dim = q.shape[1:]
    kv_heads, block_size, cache_dim = k_cache.shape[1:]
    if cache_dim != dim or heads % kv_heads or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"q {tuple(q.shape)} and caches {tuple(k_cache.shape)}, {tuple(v_cache.shape)} do not belong together"
        )
    if (
        k_cache.stride() != v_cache.stride()
        or not k_cache[:1].is_contiguous()
        or not v_cache[:1].is_contiguous()
    ):
        raise ValueError("both caches must hold contiguous blocks at one stride")
    return heads // kv_heads, block_size, max(16, triton.next_power_of_2(dim))


def paged_prefill_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of q (T, H, D) to (T, H * D); caches, tables and lengths as in `paged_attention_reference`."""
    group, block_size, block_d = check_cache(q, k_cache, v_cache)
    tokens, heads, dim = q.shape
    q = q.contiguous()
    out = torch.empty(tokens, heads * dim, dtype=q.dtype, device=q.device)
    sequences = len(context_lens)
    if not tokens or not sequences:
        return out
    # Float32 has no matrix unit that is exact, and wide heads have more to keep: smaller tiles stay in registers.
    exact, wide = q.dtype == torch.float32, block_d > 128
    # A program takes at least 16 rows (what the matrix units want), and whole groups of heads.
    block_m = max(16, triton.next_power_of_2(group), 16 if exact else 64 if wide else 128)
    queries = block_m // group
    _prefill_kernel[(tokens // queries + sequences, k_cache.shape[1])](
        q,
        k_cache,
        v_cache,
        block_tables,
        query_starts,
        context_lens,
        out,
        sequences,
        heads,
        dim,
        block_tables.stride(0),
        k_cache.stride(0),
        scale * LOG2_E,
        GROUP=group,
        QUERIES=queries,
        PRECISION=precision_of(q),
        BLOCK_SIZE=block_size,
        BLOCK_M=block_m,
        BLOCK_N=16 if exact else 32 if wide else 64,
        BLOCK_D=block_d,
        num_warps=8,
        num_stages=2 if exact or wide else 3,
    )
    return out
