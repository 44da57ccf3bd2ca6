"""Loops, found while decoding: how long has each period been repeating at the end of the output?

`runs[p - 1]` counts the newest tokens that equal the one `p` before them, so one vector comparison a token
replaces a search of the whole output. `_C` makes that comparison where it is built, NumPy elsewhere.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vila2.ops.native import native
from vila2.types import RepetitionRule

_HAS_FIND_LOOP = hasattr(native, "find_loop")  # not in a `_C` built before it was


def new_runs(rule: RepetitionRule) -> NDArray[np.int32]:
    """The counters of an empty output."""
    return np.zeros(rule.max_period, dtype=np.int32)


def update_runs(runs: NDArray[np.int32], output: Sequence[int]) -> None:
    """Bring `runs` up to date with the newest token of `output`, in place."""
    tail = np.asarray(output[-len(runs) - 1 :], dtype=np.int64)
    earlier = tail[-2::-1]  # 1, 2, ... tokens back
    same = earlier == tail[-1]
    runs[: len(same)] = np.where(same, runs[: len(same)] + 1, 0)


def find_loop(runs: NDArray[np.int32], rule: RepetitionRule) -> int:
    """How many tokens at the end repeat what came before, by `rule`; 0 if they make no loop.

    Cutting that many leaves the first pass through the period.
    """
    periods = np.arange(1, len(runs) + 1)
    # A run of r tokens at period p means r + p tokens in the loop, r / p + 1 passes through it.
    needed = np.maximum(periods * (rule.min_repeats - 1), np.maximum(rule.min_tokens - periods, 1))
    loops = np.flatnonzero(runs >= needed)
    return int(runs[loops[0]]) if len(loops) else 0


def advance_runs(runs: NDArray[np.int32], output: list[int], rule: RepetitionRule) -> int:
    """`update_runs`, then `find_loop`: once a token of every sequence."""
    if _HAS_FIND_LOOP:
        return native.find_loop(runs, output, rule.min_repeats, rule.min_tokens)
    update_runs(runs, output)
    return find_loop(runs, rule)


def find_loop_reference(output: Sequence[int], rule: RepetitionRule) -> int:
    """The same by direct search: the definition that the tests compare with."""
    for period in range(1, rule.max_period + 1):
        run = 0
        while run + period < len(output) and output[-1 - run] == output[-1 - run - period]:
            run += 1
        if run >= max(period * (rule.min_repeats - 1), rule.min_tokens - period, 1):
            return run
    return 0
