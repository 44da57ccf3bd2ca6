"""The largest columns of a product's rows: what greedy and top-k decoding want of a head over a vocabulary.

`_C` looks at each tile of the product while it is in the cache and keeps none: the logits of 64 rows of a vocabulary
of 49,152 are 12 MB, written and read again. The values are those of the product to the last bit.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vila2.ops.linear import Linear
from vila2.ops.native import native
from vila2.ops.quant import PackedBytes

if TYPE_CHECKING:
    from vila2._C import ByteWeights, PackedWeights

KERNEL_TOP = 128  # columns of a row that `_C` keeps

_HAS_TOP = native is not None and hasattr(native.PackedWeights, "top")  # not in a `_C` built before it was


def top_reference(logits: Tensor, count: int, banned: Tensor, is_banned: Tensor) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row of `logits` (rows, columns), largest first, equal ones by column.

    Returns float32 values and int64 columns, (rows, count) each. NaN counts as minus infinity, and so do the columns
    `banned` (n,) int64 in rows with `is_banned` (rows,) uint8.
    """
    wide = logits.float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    wide[
        is_banned.bool()[:, None] & torch.isin(torch.arange(wide.shape[1], device=wide.device), banned)
    ] = -torch.inf
    values, columns = wide.sort(dim=-1, descending=True, stable=True)
    return values[:, :count], columns[:, :count]


def finds_top(linear: Linear) -> bool:
    """Whether `linear_top` has a way of its own for these weights, and not only the reference."""
    return _handle(linear) is not None


def _handle(linear: Linear) -> "PackedWeights | ByteWeights | None":
    packed = linear.packed
    if not _HAS_TOP:
        return None
    if isinstance(packed, PackedBytes):
        return None if packed.is_gated else packed.native
    return packed if isinstance(packed, native.PackedWeights) else None


def linear_top(
    x: Tensor, linear: Linear, count: int, banned: Tensor, is_banned: Tensor
) -> tuple[Tensor, Tensor]:
    """`top_reference(linear(x), ...)` of `x` (rows, depth). ValueError if `count` passes the columns, or KERNEL_TOP."""
    handle = _handle(linear)
    if handle is None:
        return top_reference(linear(x), count, banned, is_banned)
    values = torch.empty(len(x), count)
    columns = torch.empty(len(x), count, dtype=torch.int64)
    handle.top(x.float().contiguous(), banned, is_banned, values, columns)
    return values, columns
