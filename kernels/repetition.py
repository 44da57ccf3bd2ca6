"""Append a token to each sequence's history and find loops at its end, on the device.

    runs[p] = runs[p] + 1 if history[n - p] == token else 0          for every period p at once
    loop    = the least p with runs[p] >= max(p * (min_repeats - 1), min_tokens - p, 1)

Reference: vila2/ops/sampling.py (`append_reference`). Tests: tests/kernels/test_sample.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _append_kernel(
    tokens_ptr,
    history_ptr,
    lengths_ptr,
    runs_ptr,
    min_repeats_ptr,
    min_tokens_ptr,
    repeated_ptr,
    room,
    max_period,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens_ptr + row).to(tl.int32)
    length = tl.load(lengths_ptr + row)
    min_repeats = tl.load(min_repeats_ptr + row)
    min_tokens = tl.load(min_tokens_ptr + row)
    period = tl.arange(0, BLOCK) + 1
    inside = period <= max_period
    there = inside & (period <= length)
    before = tl.load(history_ptr + row * room + length - period, mask=there, other=-1)
    runs = tl.load(runs_ptr + row * max_period + period - 1, mask=inside, other=0)
    runs = tl.where(there & (before == token), runs + 1, 0)
    tl.store(runs_ptr + row * max_period + period - 1, runs, mask=inside)
    tl.store(history_ptr + row * room + length, token)
    tl.store(lengths_ptr + row, length + 1)
    needed = tl.maximum(period * (min_repeats - 1), tl.maximum(min_tokens - period, 1))
    loops = inside & (runs >= needed) & (min_repeats > 0)
    least = tl.min(tl.where(loops, period, BLOCK + 1), axis=0)
    tl.store(repeated_ptr + row, tl.sum(tl.where(loops & (period == least), runs, 0), axis=0))


def append_tokens_triton(
    tokens: Tensor, history: Tensor, lengths: Tensor, runs: Tensor, min_repeats: Tensor, min_tokens: Tensor
) -> Tensor:
    """As `append_reference`: writes into history (S, room), lengths (S,), runs (S, max_period), all int32."""
    for name, part in (("history", history), ("runs", runs)):
        if not part.is_contiguous() or part.dtype != torch.int32:
            raise ValueError(
                f"{name} must be contiguous int32, got {part.dtype} with strides {part.stride()}"
            )
    repeated = torch.empty(len(tokens), dtype=torch.int32, device=tokens.device)
    if len(tokens):
        _append_kernel[(len(tokens),)](
            tokens,
            history,
            lengths,
            runs,
            min_repeats,
            min_tokens,
            repeated,
            history.shape[1],
            runs.shape[1],
            BLOCK=triton.next_power_of_2(runs.shape[1]),
            num_warps=1,
        )
    return repeated
