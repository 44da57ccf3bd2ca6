"""Attention over packed rows: causal inside a segment, and open to one shared prefix. For training.

`segments` (S, 4) int64 on the CPU holds `start, end, prefix_start, prefix_end`: the rows `start..end - 1` see each
other causally and every row of `prefix_start..prefix_end - 1`. A prefix is itself a segment whose own prefix is
empty. Own rows of different segments do not overlap; rows in no segment come out as zeros.

Where `_C` is not the one to do it, torch's attention takes the segments in padded batches. What it needs of indices and
masks is the same for every layer, so a caller may make it once (`pad_segments`): on CUDA the layers then neither copy
anything there nor wait.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from vila2.ops.native import is_native_training, native
from vila2.ops.rope import apply_rope, apply_rope_reference

MAX_HEAD_DIM = 256  # what the kernels of `_C` have room for


def segment_attention_reference(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float) -> Tensor:
    """One segment after another: q (T, H, D), k and v (T, KVH, D) to (T, H * D). Differentiable.

    Query head h reads KV head h // (H / KVH). Softmax in float32 at least.
    """
    check_segments(q, k, v, segments)
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    exact = torch.promote_types(q.dtype, torch.float32)
    pieces, rows = [], []
    for start, end, prefix_start, prefix_end in segments.tolist():
        if start == end:
            continue
        count, seen = end - start, prefix_end - prefix_start
        keys, values = (
            torch.cat((x[prefix_start:prefix_end], x[start:end])).to(exact) for x in (k, v)
        )  # (seen + count, KVH, D)
        queries = q[start:end].to(exact).view(count, kv_heads, heads // kv_heads, dim)
        scores = torch.einsum("tgrd,lgd->grtl", queries, keys) * scale
        last = torch.arange(count, device=q.device)[:, None] + seen
        hidden = torch.arange(seen + count, device=q.device) > last
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        pieces.append(torch.einsum("grtl,lgd->tgrd", weights, values).reshape(count, heads * dim))
        rows.append(torch.arange(start, end, device=q.device))
    out = q.new_zeros(tokens, heads * dim)
    if not pieces:
        return out
    return out.index_copy(0, torch.cat(rows), torch.cat(pieces).to(q.dtype))


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float, padded: "PaddedSegments | None" = None
) -> Tensor:
    """Attention of packed segments: q (T, H, D), k and v (T, KVH, D) to (T, H * D). Differentiable.

    `segments` (S, 4) as the module says, on the CPU; `padded`, if the caller has it, is `pad_segments` of them on the
    device of q. Raises ValueError for rows out of range or owned twice.
    """
    if padded is None:
        check_segments(q, k, v, segments)
        if _is_fast(q, k, v):
            return _SegmentAttention.apply(q, k, v, None, None, None, segments, scale)  # type: ignore[no-untyped-call]
        padded = pad_segments(segments, len(q), q.device)
    return _padded_attention(q, k, v, padded, scale)


def rotary_segment_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    segments: Tensor,
    scale: float,
) -> Tensor:
    """`segment_attention_reference` of q and k rotated to `positions` (T,) as `apply_rope_reference` does it."""
    q, k = (apply_rope_reference(x, positions, cos, sin) for x in (q, k))
    return segment_attention_reference(q, k, v, segments, scale)


def rotary_segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    segments: Tensor,
    scale: float,
    padded: "PaddedSegments | None" = None,
) -> Tensor:
    """Rotary positions and packed attention in one; shapes as in `segment_attention`, tables as in `rope_tables`.

    Raises ValueError for positions out of range (on the CPU), and for rows out of range or owned twice.
    """
    if padded is None and _is_fast(q, k, v) and q.shape[-1] % 2 == 0:
        check_segments(q, k, v, segments)
        return _SegmentAttention.apply(q, k, v, positions, cos, sin, segments, scale)  # type: ignore[no-untyped-call]
    q, k = (apply_rope(x, positions, cos, sin) for x in (q, k))
    return segment_attention(q, k, v, segments, scale, padded)


def _is_fast(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return is_native_training(q, k, v) and 0 < q.shape[-1] <= MAX_HEAD_DIM


class _SegmentAttention(torch.autograd.Function):
    """In `_C`. Keeps rotated float32 copies of q, k and v, head by head, and each row's log of summed weights."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        segments: Tensor,
        scale: float,
    ) -> Tensor:
        tokens, heads, dim = q.shape
        q, k, v = (_dense_heads(x) for x in (q, k, v))
        segments = segments.contiguous()
        packed = q.new_empty(heads + 2 * k.shape[1], tokens, dim, dtype=torch.float32)
        log_sums = q.new_empty(heads, tokens, dtype=torch.float32)
        out = q.new_empty(tokens, heads * dim)
        native.segment_attention(q, k, v, positions, cos, sin, segments, scale, packed, log_sums, out)
        ctx.save_for_backward(packed, log_sums, out, positions, cos, sin, segments)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        packed, log_sums, out, positions, cos, sin, segments = ctx.saved_tensors
        tokens, dim = packed.shape[1:]
        heads = out.shape[1] // dim
        kv_heads = (len(packed) - heads) // 2
        sums = packed.new_empty(2 * kv_heads, tokens, dim)
        # Views of one tensor, as q, k and v mostly are.
        q_grad, k_grad, v_grad = torch.split(
            out.new_empty(tokens, len(packed), dim), [heads, kv_heads, kv_heads], 1
        )
        native.segment_attention_grad(
            out_grad.contiguous(),
            positions,
            cos,
            sin,
            segments,
            ctx.scale,
            packed,
            log_sums,
            out,
            sums,
            q_grad,
            k_grad,
            v_grad,
        )
        return q_grad, k_grad, v_grad, None, None, None, None, None


def _dense_heads(x: Tensor) -> Tensor:
    """x, or a copy of it if the heads of a row do not lie side by side."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def check_segments(q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> None:
    """ValueError unless the shapes fit, every segment lies in the rows of q, and none owns another's rows."""
    tokens, heads, dim = q.shape
    if k.shape != v.shape or k.shape[0] != tokens or k.shape[2] != dim or heads % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not belong together: expected "
            "(T, H, D), and twice (T, KVH, D) with KVH a divisor of H"
        )
    _check_rows(segments, tokens)


def _check_rows(segments: Tensor, tokens: int) -> None:
    if segments.device.type != "cpu" or segments.dtype != torch.int64 or segments.shape[1:] != (4,):
        raise ValueError(
            f"segments must be int64 (S, 4) on the CPU, got {segments.dtype} {tuple(segments.shape)}"
        )
    starts, ends = segments[:, 0::2], segments[:, 1::2]
    if bool(((starts < 0) | (starts > ends) | (ends > tokens)).any()):
        raise ValueError(f"segments must lie in the {tokens} rows, each start at or before its end")
    own = segments[segments[:, 0] < segments[:, 1], :2]
    own = own[own[:, 0].argsort()]
    if bool((own[1:, 0] < own[:-1, 1]).any()):
        raise ValueError("own rows of segments must not overlap")


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Segments of like lengths as one batch: the rows that each place holds, and what a query sees of the keys."""

    q_rows: Tensor  # (segments, queries) int64
    k_rows: Tensor  # (segments, keys) int64
    visible: (
        Tensor | None
    )  # (segments, 1, queries, keys); None: keys are the queries' rows, and each sees those before


@dataclass(frozen=True, slots=True)
class PaddedSegments:
    """Segments as batches on one device. Made by `pad_segments`."""

    buckets: list[_Bucket]
    source: (
        Tensor  # (T,) int64: the place of each row among all buckets' queries, and after them one of zeros
    )


def pad_segments(
    segments: Tensor, tokens: int, device: torch.device, *, skips_masks: bool | None = None
) -> PaddedSegments:
    """Segments (S, 4) of `tokens` rows, padded to batches whose lengths are alike.

    `skips_masks`: batches without a prefix have no mask, which torch's fast kernels do not take; by default on CUDA.
    Raises ValueError for rows out of range or owned twice. The host waits for nothing.
    """
    _check_rows(segments, tokens)
    if skips_masks is None:
        skips_masks = device.type == "cuda"
    buckets, source, place = [], torch.full((tokens,), -1, dtype=torch.int64), 0
    for bounds in _buckets(segments):
        starts, lengths, _, seen = bounds.tolist()
        longest, longest_prefix = max(lengths), max(seen)
        for start, length in zip(starts, lengths, strict=True):
            source[start : start + length] = torch.arange(place, place + length)
            place += longest
        start, length, prefix_start, seen = _upload(bounds, device)
        own = torch.arange(longest, device=device)
        q_rows = start[:, None] + own.minimum(length[:, None] - 1)  # beyond the end: the last row again
        if skips_masks and not longest_prefix:
            # Rows beyond the end come after all others: none of those sees them.
            buckets.append(_Bucket(q_rows, q_rows, None))
            continue
        prefix = torch.arange(longest_prefix, device=device)
        prefix_rows = prefix_start[:, None] + prefix.minimum((seen[:, None] - 1).clamp(min=0))
        # A segment without a prefix may name rows beyond the end; they are masked, but must exist.
        k_rows = torch.cat((prefix_rows.clamp(max=tokens - 1), q_rows), dim=1)
        visible = torch.cat(
            (
                (prefix < seen[:, None])[:, None].expand(-1, longest, -1),
                (own <= own[:, None]) & (own < length[:, None])[:, None],
            ),
            dim=2,
        )
        buckets.append(_Bucket(q_rows, k_rows, visible[:, None]))
    source[source < 0] = place
    return PaddedSegments(buckets, _upload(source, device))


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # torch keeps such memory until the copy is through
    return tensor.to(device, non_blocking=True)


def _padded_attention(q: Tensor, k: Tensor, v: Tensor, padded: PaddedSegments, scale: float) -> Tensor:
    """Each bucket by torch's own attention, and the rows put back where they belong."""
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
    pieces = []
    for bucket in padded.buckets:
        queries, keys, values = (
            x.index_select(0, rows.flatten()).view(*rows.shape, -1, dim).transpose(1, 2)
            for x, rows in ((q, bucket.q_rows), (k, bucket.k_rows), (v, bucket.k_rows))
        )
        if q.is_cuda and bucket.visible is not None and heads != kv_heads:
            # Of torch's kernels there, the one that takes a mask wants as many heads of keys as of queries.
            keys, values = (
                x[:, :, None].expand(-1, -1, heads // kv_heads, -1, -1).flatten(1, 2) for x in (keys, values)
            )
        mixed = functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=bucket.visible,
            is_causal=bucket.visible is None,
            scale=scale,
            enable_gqa=keys.shape[1] != heads,
        )
        pieces.append(mixed.transpose(1, 2).reshape(-1, heads * dim))
    # One selection of rows: a mask of them would make the host wait to know how many they are.
    return torch.cat((*pieces, q.new_zeros(1, heads * dim))).index_select(0, padded.source)


def _buckets(segments: Tensor) -> list[Tensor]:
    """Segments that are not empty as rows start, length, prefix_start, prefix_length (4, n), lengths alike."""
    lengths, seen = (segments[:, 1] - segments[:, 0]), (segments[:, 3] - segments[:, 2])
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (length, prefix) in enumerate(zip(lengths.tolist(), seen.tolist(), strict=True)):
        if length:
            groups.setdefault((_step(length), _step(prefix)), []).append(index)
    return [torch.stack((segments[at, 0], lengths[at], segments[at, 2], seen[at])) for at in groups.values()]


def _step(length: int) -> int:
    """Lengths within a quarter of each other share a step."""
    return round(4 * math.log2(length)) if length else -1
