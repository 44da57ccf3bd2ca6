"""Token embeddings: rows of a table, in the type that the model computes in."""

import torch
from torch import Tensor
from torch.nn import functional

from vila2.ops.native import native

_KERNEL_TYPES = (torch.float32, torch.bfloat16)
_HAS_EMBED = hasattr(native, "embed")  # not in a `_C` built before it was


def embed_reference(ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (T,) int64 of `table` (rows, width), rounded or widened to `dtype`: (T, width)."""
    return functional.embedding(ids, table).to(dtype)


def embed(ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """The same, in `_C` on the CPU without the copy in between. An id that is no row is a ValueError there."""
    if (
        _HAS_EMBED
        and table.is_cpu
        and table.dtype in _KERNEL_TYPES
        and dtype in _KERNEL_TYPES
        and not (torch.is_grad_enabled() and table.requires_grad)
    ):
        out = torch.empty(len(ids), table.shape[1], dtype=dtype)
        native.embed(ids.contiguous(), table, out)
        return out
    return embed_reference(ids, table, dtype)
