"""Rotary positions and the write into the paged KV cache in one launch: one program a token, all its heads.

    q' = rotate(q),   cache[k][slot] = rotate(k),   cache[v][slot] = v        (slot = block * block_size + row)

q, k and v may be slices of one tensor. A negative slot is not written. Reference: vila2/ops/attention.py. Tests:
tests/kernels/test_rope.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rope_store_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    slots_ptr,
    cos_ptr,
    sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    q_stride,
    k_stride,
    v_stride,
    k_block_stride,
    v_block_stride,
    heads,
    kv_heads,
    half,
    block_size,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_HALF)[None, :]
    dim = 2 * half
    position = tl.load(positions_ptr + token)
    cos = tl.load(cos_ptr + position * half + i, mask=i < half, other=0.0)
    sin = tl.load(sin_ptr + position * half + i, mask=i < half, other=0.0)

    head = tl.arange(0, BLOCK_HEADS)[:, None]
    inside = (head < heads) & (i < half)
    at = q_ptr + token * q_stride + head * dim + i
    first = tl.load(at, mask=inside, other=0.0)
    second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    wide = first.to(tl.float32)
    out = out_ptr + (token * heads + head) * dim + i
    tl.store(out, (wide * cos - second * sin).to(first.dtype), mask=inside)
    tl.store(out + half, (second * cos + wide * sin).to(first.dtype), mask=inside)

    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        kv_head = tl.arange(0, BLOCK_KV)[:, None]
        kv_inside = (kv_head < kv_heads) & (i < half)
        row = (kv_head * block_size + slot % block_size) * dim + i
        k_at = k_ptr + token * k_stride + kv_head * dim + i
        k_first = tl.load(k_at, mask=kv_inside, other=0.0)
        k_second = tl.load(k_at + half, mask=kv_inside, other=0.0).to(tl.float32)
        k_wide = k_first.to(tl.float32)
        # Rounded to the type of k first, as the reference does; the cache's type may be another.
        rotated = (k_wide * cos - k_second * sin).to(k_first.dtype)
        turned = (k_second * cos + k_wide * sin).to(k_first.dtype)
        k_cache = k_cache_ptr + (slot // block_size) * k_block_stride + row
        tl.store(k_cache, rotated.to(k_cache_ptr.dtype.element_ty), mask=kv_inside)
        tl.store(k_cache + half, turned.to(k_cache_ptr.dtype.element_ty), mask=kv_inside)
        v_at = v_ptr + token * v_stride + kv_head * dim + i
        v_cache = v_cache_ptr + (slot // block_size) * v_block_stride + row
        for part in tl.static_range(2):
            value = tl.load(v_at + part * half, mask=kv_inside, other=0.0)
            tl.store(v_cache + part * half, value.to(v_cache_ptr.dtype.element_ty), mask=kv_inside)


def rope_store_triton(
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
    """Rotate q (T, H, D) and k (T, KVH, D) to `positions`, write k and v at `slots`; returns q rotated.

    Caches are (blocks, KVH, block_size, D), each block contiguous. Positions and slots are not checked: they are
    on the device. ValueError for heads that do not lie side by side.
    """
    tokens, heads, dim = q.shape
    kv_heads, block_size = k_cache.shape[1:3]
    for name, part in (("q", q), ("k", k), ("v", v)):
        if part.stride(-1) != 1 or part.stride(-2) != dim:
            raise ValueError(f"the heads of {name} must lie side by side, got strides {part.stride()}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.shape[1:] != (kv_heads, block_size, dim) or not cache[:1].is_contiguous():
            raise ValueError(f"{name} must hold contiguous blocks (KVH, block_size, {dim})")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if tokens:
        block_heads = triton.next_power_of_2(heads)
        block_half = triton.next_power_of_2(dim // 2)
        _rope_store_kernel[(tokens,)](
            q,
            k,
            v,
            positions,
            slots,
            cos,
            sin,
            k_cache,
            v_cache,
            out,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            k_cache.stride(0),
            v_cache.stride(0),
            heads,
            kv_heads,
            dim // 2,
            block_size,
            BLOCK_HEADS=block_heads,
            BLOCK_KV=triton.next_power_of_2(kv_heads),
            BLOCK_HALF=block_half,
            num_warps=min(8, max(1, block_heads * block_half // 512)),
        )
    return out
