"""How many threads the CPU operations use, torch's and ours together."""

import torch

from vila2.ops.native import native


def set_threads(count: int) -> None:
    """Use `count` threads in torch's operations and in `vila2._C`."""
    if count < 1:
        raise ValueError(f"at least one thread is needed, got {count}")
    torch.set_num_threads(count)
    if native is not None:
        native.set_num_threads(count)
