"""Append a token to each sequence's history and find loops at its end, on the device.

    runs[p] = runs[p] + 1 if history[n - p] == token else 0          for every period p at once
    loop    = the least p <= max_period with runs[p] >= max(p * (min_repeats - 1), min_tokens - p, 1)

Row i of a batch is sequence `slots[i]` of the tables; rows that pad a batch have a slot below 0 and write nothing.

Reference: vila2/ops/sampling.py (`append_reference`). Tests: tests/kernels/test_sample.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _append_kernel(
    tokens_ptr,
    slots_ptr,
    history_ptr,
    lengths_ptr,
    runs_ptr,
    rules_ptr,
    repeated_ptr,
    room,
    max_period,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        tl.store(repeated_ptr + row, 0)
        return
    token = tl.load(tokens_ptr + row).to(tl.int32)
    length = tl.load(lengths_ptr + slot)
    min_repeats = tl.load(rules_ptr + row * 3)
    min_tokens = tl.load(rules_ptr + row * 3 + 1)
    longest = tl.load(rules_ptr + row * 3 + 2)
    period = tl.arange(0, BLOCK) + 1
    inside = period <= max_period
    there = inside & (period <= length)
    before = tl.load(history_ptr + slot * room + length - period, mask=there, other=-1)
    runs = tl.load(runs_ptr + slot * max_period + period - 1, mask=inside, other=0)
    runs = tl.where(there & (before == token), runs + 1, 0)
    tl.store(runs_ptr + slot * max_period + period - 1, runs, mask=inside)
    tl.store(history_ptr + slot * room + length, token)
    tl.store(lengths_ptr + slot, length + 1)
    needed = tl.maximum(period * (min_repeats - 1), tl.maximum(min_tokens - period, 1))
    loops = inside & (period <= longest) & (runs >= needed) & (min_repeats > 0)
    least = tl.min(tl.where(loops, period, BLOCK + 1), axis=0)
    tl.store(repeated_ptr + row, tl.sum(tl.where(loops & (period == least), runs, 0), axis=0))


def append_tokens_triton(
    tokens: Tensor, slots: Tensor, history: Tensor, lengths: Tensor, runs: Tensor, rules: Tensor
) -> Tensor:
    """As `append_reference`: writes into history (N, room), lengths (N,), runs (N, max_period), all int32."""
    for name, part in (("history", history), ("runs", runs), ("rules", rules)):
        if not part.is_contiguous() or part.dtype != torch.int32:
            raise ValueError(
                f"{name} must be contiguous int32, got {part.dtype} with strides {part.stride()}"
            )
    repeated = torch.empty(len(tokens), dtype=torch.int32, device=tokens.device)
    if len(tokens):
        _append_kernel[(len(tokens),)](
            tokens,
            slots,
            history,
            lengths,
            runs,
            rules,
            repeated,
            history.shape[1],
            runs.shape[1],
            BLOCK=triton.next_power_of_2(runs.shape[1]),
            num_warps=1,
        )
    return repeated
