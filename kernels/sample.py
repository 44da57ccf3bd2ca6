"""Logits to tokens on the device: greedy, or temperature, then top-k, then top-p, then one draw. No sort, no host.

With w = exp((x - max x) / temperature), tokens in falling order of x and equal ones by index:

    kept  = the first top_k tokens, of those the fewest that hold top_p of their mass
    token = the first kept one up to which more than draw * mass(kept) lies

A threshold among 2^bits ordered keys is found digit by digit, 16 pivots a pass over the row (which stays in the L2
cache): four passes a threshold for 2-byte logits, eight for float32. Equal values are counted: bfloat16 makes many.
Reference: vila2/ops/sampling.py. Tests: tests/kernels/test_sample.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def _load(row_ptr, first, vocab, banned_ptr, is_banned, NUM_BANNED: tl.constexpr, BLOCK: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    x = tl.load(row_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    for index in tl.static_range(NUM_BANNED):
        x = tl.where(is_banned & (at == tl.load(banned_ptr + index)), float("-inf"), x)
    return at, x


@triton.jit
def _key(x, BITS: tl.constexpr):
    """Unsigned integers in the order of the floats `x`: of 2-byte floats only the upper half says anything."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    # Read as integers, negative floats fall where they should rise: turn those over, and lift the others above them.
    ordered = bits ^ ((bits >> 31) | -2147483648)
    return ordered.to(tl.uint32, bitcast=True) >> (32 - BITS)


@triton.jit
def _search(
    row_ptr,
    vocab,
    banned_ptr,
    is_banned,
    peak,
    inverse,
    least,
    BY_COUNT: tl.constexpr,
    IS_STRICT: tl.constexpr,
    NUM_BANNED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest key such that the tokens from it upwards have at least (or, IS_STRICT, more than) `least`."""
    digit = tl.arange(0, 16)
    low = tl.zeros((), tl.int64)
    for place in tl.static_range(BITS // 4):
        pivots = low + (digit.to(tl.int64) << (BITS - 4 - 4 * place))
        measured = tl.zeros((16,), tl.float32)
        for first in range(0, vocab, BLOCK):
            _, x = _load(row_ptr, first, vocab, banned_ptr, is_banned, NUM_BANNED, BLOCK)
            weight = tl.exp((x - peak) * inverse)
            if BY_COUNT:
                weight = tl.where(x > float("-inf"), 1.0, 0.0)
            above = _key(x, BITS)[None, :] >= pivots[:, None].to(tl.uint32)
            measured += tl.sum(tl.where(above, weight[None, :], 0.0), axis=1)
        reaches = measured > least if IS_STRICT else measured >= least
        low += tl.max(tl.where(reaches, digit, 0), axis=0).to(tl.int64) << (BITS - 4 - 4 * place)
    return low.to(tl.uint32)


@triton.jit
def _weigh(
    row_ptr,
    vocab,
    banned_ptr,
    is_banned,
    peak,
    inverse,
    key,
    NUM_BANNED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`(tokens above key, their mass, tokens at key, the mass of one of those)`."""
    above_count = tl.zeros((), tl.float32)
    above_mass = tl.zeros((), tl.float32)
    equal_count = tl.zeros((), tl.float32)
    equal_mass = tl.zeros((), tl.float32)
    for first in range(0, vocab, BLOCK):
        _, x = _load(row_ptr, first, vocab, banned_ptr, is_banned, NUM_BANNED, BLOCK)
        weight = tl.exp((x - peak) * inverse)
        keys = _key(x, BITS)
        counts = x > float("-inf")
        above_count += tl.sum(tl.where(counts & (keys > key), 1.0, 0.0), axis=0)
        above_mass += tl.sum(tl.where(keys > key, weight, 0.0), axis=0)
        equal_count += tl.sum(tl.where(counts & (keys == key), 1.0, 0.0), axis=0)
        equal_mass = tl.maximum(equal_mass, tl.max(tl.where(keys == key, weight, 0.0), axis=0))
    return above_count, above_mass, equal_count, equal_mass


@triton.jit
def _sample_kernel(
    logits_ptr,
    banned_ptr,
    is_banned_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    draws_ptr,
    tokens_ptr,
    row_stride,
    vocab,
    NUM_BANNED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    is_banned = tl.load(is_banned_ptr + row) != 0
    peak = tl.full((), float("-inf"), tl.float32)
    best = tl.zeros((), tl.int32)
    for first in range(0, vocab, BLOCK):
        at, x = _load(row_ptr, first, vocab, banned_ptr, is_banned, NUM_BANNED, BLOCK)
        here = tl.max(x, axis=0)
        index = tl.min(tl.where(x == here, at, vocab), axis=0)
        best = tl.where(here > peak, index, best)
        peak = tl.maximum(peak, here)
    tl.store(tokens_ptr + row, best.to(tl.int64))

    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        inverse = 1.0 / temperature
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        lowest = tl.zeros((), tl.uint32)  # the least key that is kept, and how many tokens at it are
        num_lowest = tl.zeros((), tl.float32)
        above_count, mass, equal_count, equal_mass = _weigh(
            row_ptr, vocab, banned_ptr, is_banned, peak, inverse, lowest, NUM_BANNED, BITS, BLOCK
        )
        if (top_k > 0) & (top_k < vocab):
            found = _search(
                row_ptr, vocab, banned_ptr, is_banned, peak, inverse, top_k.to(tl.float32),
                True, False, NUM_BANNED, BITS, BLOCK,
            )  # fmt: skip
            above_count, above_mass, equal_count, equal_mass = _weigh(
                row_ptr, vocab, banned_ptr, is_banned, peak, inverse, found, NUM_BANNED, BITS, BLOCK
            )
            # Fewer than top_k tokens are there when others are banned: `found` is then 0, and all are kept.
            if found > 0:
                lowest = found
                num_lowest = tl.minimum(equal_count, top_k.to(tl.float32) - above_count)
                mass = above_mass + num_lowest * equal_mass
        if top_p < 1:
            found = _search(
                row_ptr, vocab, banned_ptr, is_banned, peak, inverse, top_p * mass,
                False, False, NUM_BANNED, BITS, BLOCK,
            )  # fmt: skip
            if found >= lowest:
                above_count, above_mass, equal_count, equal_mass = _weigh(
                    row_ptr, vocab, banned_ptr, is_banned, peak, inverse, found, NUM_BANNED, BITS, BLOCK
                )
                wanted = tl.ceil((top_p * mass - above_mass) / tl.maximum(equal_mass, 1e-37))
                wanted = tl.minimum(tl.maximum(wanted, 1.0), equal_count)
                num_lowest = tl.where(
                    (found == lowest) & (num_lowest > 0), tl.minimum(wanted, num_lowest), wanted
                )
                lowest = found
                mass = above_mass + num_lowest * equal_mass
        target = tl.load(draws_ptr + row) * mass
        chosen = _search(
            row_ptr, vocab, banned_ptr, is_banned, peak, inverse, target,
            False, True, NUM_BANNED, BITS, BLOCK,
        )  # fmt: skip
        chosen = tl.maximum(chosen, lowest)
        above_count, above_mass, equal_count, equal_mass = _weigh(
            row_ptr, vocab, banned_ptr, is_banned, peak, inverse, chosen, NUM_BANNED, BITS, BLOCK
        )
        most = tl.where((chosen == lowest) & (num_lowest > 0), num_lowest, equal_count)
        place = tl.floor((target - above_mass) / tl.maximum(equal_mass, 1e-37))
        place = tl.maximum(tl.minimum(place, most - 1.0), 0.0).to(tl.int32)
        seen = tl.zeros((), tl.int32)
        for first in range(0, vocab, BLOCK):
            at, x = _load(row_ptr, first, vocab, banned_ptr, is_banned, NUM_BANNED, BLOCK)
            equal = ((_key(x, BITS) == chosen) & (x > float("-inf"))).to(tl.int32)
            rank = seen + tl.cumsum(equal, axis=0) - equal
            index = tl.max(tl.where((equal != 0) & (rank == place), at, -1), axis=0)
            # Where rounding leaves no token at `chosen`, the likeliest one stands.
            if index >= 0:
                tl.store(tokens_ptr + row, index.to(tl.int64))
            seen += tl.sum(equal, axis=0)


def sample_triton(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    draws: Tensor,
    banned: Tensor,
    is_banned: Tensor,
) -> Tensor:
    """Tokens (S,) int64 of `logits` (S, vocabulary), which are left as they were; all on the device.

    `temperature`, `top_p`, `draws` are float32 (S,), draws in [0, 1); `top_k` int32 (S,), 0 for all. `banned` (n,)
    int32 are tokens that rows with `is_banned` (S,) int8 must not choose. Temperature 0 is greedy, the first of equals.
    """
    rows, vocab = logits.shape
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        _sample_kernel[(rows,)](
            logits,
            banned,
            is_banned,
            temperature,
            top_k,
            top_p,
            draws,
            tokens,
            logits.stride(0),
            vocab,
            NUM_BANNED=banned.numel(),
            BITS=16 if logits.dtype == torch.bfloat16 else 32,
            BLOCK=min(_BLOCK, triton.next_power_of_2(vocab)),
            num_warps=8,
        )
    return tokens
