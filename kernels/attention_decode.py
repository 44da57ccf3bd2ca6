"""Attention of one new token a sequence over the paged cache: split along the sequence, shared prefixes read once.

    out[s, h] = sum_j softmax_j(scale * q[s, h] . k[j, h / group]) v[j, h / group],   j below context_lens[s]

Bytes bound it: each key and value is read once and used for one row. So a program takes one sequence, one KV head
(all heads that share it) and one span of the keys; where sequences are few, spans are many, to fill the device.
Sequences that begin with the same blocks (a prompt's header, an image under several questions) attend to those in
tiles of sequences, so that the blocks are read once a tile and not once a sequence. Each part leaves its weighted
values and the log of its weights' sum; the last kernel joins the parts:

    out = sum_p 2^(lse_p - max lse) out_p / sum_p 2^(lse_p - max lse)

Reference: vila2/ops/attention.py. Tests: tests/kernels/test_attention.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila2.kernels.attention_prefill import LOG2_E, attend_keys, check_cache, find_owner, precision_of
from vila2.kernels.device import num_processors

_BLOCK_N = 64
_ROWS = 16  # the fewest that the matrix units take


@triton.jit
def _span_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    tables_ptr,
    contexts_ptr,
    shared_ptr,
    parts_ptr,
    lse_ptr,
    out_ptr,
    heads,
    dim,
    table_stride,
    block_stride,
    num_parts,
    scale_log2,
    SPANS: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    span = tl.program_id(2)
    length = tl.load(contexts_ptr + sequence)
    begin = 0
    if HAS_SHARED:
        begin = tl.load(shared_ptr + sequence)
    # Spans of whole tiles, so that only the last one is masked.
    step = tl.cdiv(tl.cdiv(length - begin, SPANS), BLOCK_N) * BLOCK_N
    start = begin + span * step
    stop = tl.minimum(length, start + step)

    row = tl.arange(0, BLOCK_M)
    i = tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + row
    inside = (row < GROUP)[:, None] & (i[None, :] < dim)
    q = tl.load(q_ptr + (sequence * heads + head)[:, None] * dim + i[None, :], mask=inside, other=0.0)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    table = tables_ptr + sequence * table_stride
    places = tl.zeros((BLOCK_M,), tl.int32) + (stop - 1)
    whole = start + tl.maximum(stop - start, 0) // BLOCK_N * BLOCK_N
    peak, total, mixed = attend_keys(
        q, places, k_cache_ptr, v_cache_ptr, table, kv_head, start, whole, length, block_stride, dim,
        peak, total, mixed, scale_log2, False, PRECISION, BLOCK_SIZE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    peak, total, mixed = attend_keys(
        q, places, k_cache_ptr, v_cache_ptr, table, kv_head, whole, stop, length, block_stride, dim,
        peak, total, mixed, scale_log2, True, PRECISION, BLOCK_SIZE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    if IS_WHOLE:
        at = (sequence * heads + head)[:, None] * dim + i[None, :]
        tl.store(out_ptr + at, mixed.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        part = (sequence * heads + head) * num_parts + span
        tl.store(parts_ptr + part[:, None] * dim + i[None, :], mixed, mask=inside)
        lse = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(lse_ptr + part, lse, mask=row < GROUP)


@triton.jit
def _prefix_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    tables_ptr,
    shared_ptr,
    group_starts_ptr,
    members_ptr,
    parts_ptr,
    lse_ptr,
    num_groups,
    heads,
    dim,
    table_stride,
    block_stride,
    num_parts,
    scale_log2,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    group = find_owner(group_starts_ptr, num_groups, tile, MEMBERS)
    first_member = tl.load(group_starts_ptr + group)
    count = tl.load(group_starts_ptr + group + 1) - first_member
    first = (tile - (first_member // MEMBERS + group)) * MEMBERS
    if first >= count:
        return
    row = tl.arange(0, BLOCK_M)  # (member, head of the KV group)
    member = first + row // GROUP
    valid = (row < MEMBERS * GROUP) & (member < count)
    sequence = tl.load(members_ptr + first_member + member, mask=valid, other=0).to(tl.int64)
    leader = tl.load(members_ptr + first_member).to(tl.int64)
    length = tl.load(shared_ptr + leader)
    head = kv_head * GROUP + row % GROUP
    i = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (i[None, :] < dim)
    q = tl.load(q_ptr + (sequence * heads + head)[:, None] * dim + i[None, :], mask=inside, other=0.0)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    table = tables_ptr + leader * table_stride
    places = tl.zeros((BLOCK_M,), tl.int32) + (length - 1)
    peak, total, mixed = attend_keys(
        q, places, k_cache_ptr, v_cache_ptr, table, kv_head, 0, length, length, block_stride, dim,
        peak, total, mixed, scale_log2, True, PRECISION, BLOCK_SIZE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    part = (sequence * heads + head) * num_parts + num_parts - 1
    tl.store(parts_ptr + part[:, None] * dim + i[None, :], mixed, mask=inside)
    lse = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(lse_ptr + part, lse, mask=valid)


@triton.jit
def _join_kernel(
    parts_ptr,
    lse_ptr,
    shared_ptr,
    out_ptr,
    heads,
    dim,
    num_parts,
    HAS_SHARED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # (sequence, head)
    part = tl.arange(0, BLOCK_P)
    i = tl.arange(0, BLOCK_D)
    there = part < num_parts
    if HAS_SHARED:
        # A sequence outside every group left the last part unwritten.
        there = there & ((part < num_parts - 1) | (tl.load(shared_ptr + row // heads) > 0))
    lse = tl.load(lse_ptr + row * num_parts + part, mask=there, other=float("-inf"))
    weights = tl.exp2(lse - tl.max(lse, axis=0))
    weights = weights / tl.sum(weights, axis=0)
    inside = there[:, None] & (i[None, :] < dim)
    mixed = tl.load(parts_ptr + (row * num_parts + part)[:, None] * dim + i[None, :], mask=inside, other=0.0)
    out = tl.sum(mixed * weights[:, None], axis=0)
    tl.store(out_ptr + row * dim + i, out.to(out_ptr.dtype.element_ty), mask=i < dim)


def num_spans(sequences: int, kv_heads: int, longest: int, processors: int) -> int:
    """Spans a sequence: four programs a multiprocessor where there is work for them, no span below four tiles."""
    wanted = -(-4 * processors // max(1, sequences * kv_heads))
    return max(1, min(wanted, 32, longest // (4 * _BLOCK_N)))


def paged_decode_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    shared: tuple[Tensor, Tensor, Tensor] | None = None,
    spans: int | None = None,
) -> Tensor:
    """q (S, H, D), one row a sequence, to (S, H * D). `context_lens` (S,) int32, 1 or more.

    `shared`: `(lens, group_starts, members)`, all int32 on the device. Sequence s shares its first `lens[s]` keys,
    whole blocks and fewer than its context, with its group, 0 outside groups; group g is
    `members[group_starts[g]:group_starts[g + 1]]`. `spans`: into how many spans keys are cut (default: by the device
    and the batch).
    """
    group, block_size, block_d = check_cache(q, k_cache, v_cache)
    sequences, heads, dim = q.shape
    kv_heads = k_cache.shape[1]
    q = q.contiguous()
    out = torch.empty(sequences, heads * dim, dtype=q.dtype, device=q.device)
    if not sequences:
        return out
    if spans is None:
        longest = block_tables.shape[1] * block_size
        spans = num_spans(sequences, kv_heads, longest, num_processors(q.device))
    num_parts = spans + (shared is not None)
    is_whole = num_parts == 1
    parts = torch.empty(
        0 if is_whole else sequences * heads * num_parts * dim, dtype=torch.float32, device=q.device
    )
    lse = torch.empty(0 if is_whole else sequences * heads * num_parts, dtype=torch.float32, device=q.device)
    lens, group_starts, members = (context_lens,) * 3 if shared is None else shared
    block_n = _BLOCK_N if q.element_size() <= 2 and block_d <= 128 else _BLOCK_N // 2
    # Exact products keep their operands in registers: eight warps share them out, of tiles with few rows.
    is_exact = q.dtype == torch.float32
    _span_kernel[(sequences, kv_heads, spans)](
        q,
        k_cache,
        v_cache,
        block_tables,
        context_lens,
        lens,
        out if is_whole else parts,
        out if is_whole else lse,
        out,
        heads,
        dim,
        block_tables.stride(0),
        k_cache.stride(0),
        num_parts,
        scale * LOG2_E,
        SPANS=spans,
        HAS_SHARED=shared is not None,
        IS_WHOLE=is_whole,
        GROUP=group,
        PRECISION=precision_of(q),
        BLOCK_SIZE=block_size,
        BLOCK_M=max(_ROWS, triton.next_power_of_2(group)),
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=8 if is_exact else 4,
        num_stages=3,
    )
    if is_whole:
        return out
    if shared is not None:
        block_m = max(_ROWS if is_exact else 64, triton.next_power_of_2(group))
        per_tile = block_m // group
        _prefix_kernel[(len(members) // per_tile + len(group_starts) - 1, kv_heads)](
            q,
            k_cache,
            v_cache,
            block_tables,
            lens,
            group_starts,
            members,
            parts,
            lse,
            len(group_starts) - 1,
            heads,
            dim,
            block_tables.stride(0),
            k_cache.stride(0),
            num_parts,
            scale * LOG2_E,
            GROUP=group,
            MEMBERS=per_tile,
            PRECISION=precision_of(q),
            BLOCK_SIZE=block_size,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            # With four warps groups that are no power of two and wide heads spill, with three stages some on 8.9.
            num_warps=8,
            num_stages=2,
        )
    _join_kernel[(sequences * heads,)](
        parts,
        lse,
        lens,
        out,
        heads,
        dim,
        num_parts,
        HAS_SHARED=shared is not None,
        BLOCK_P=triton.next_power_of_2(num_parts),
        BLOCK_D=block_d,
        num_warps=1,
    )
    return out
