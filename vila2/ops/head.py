"""The scores of a vocabulary: a head's product, and in int8 the best of them once more for rows as they are.

Rounding a row to bytes shifts its scores, and greedy decoding hangs on the two best. So the product over the whole
vocabulary only finds the best few; these are multiplied again with the row in fixed point, 24 bits beside the largest.
Such a row times int8 weights sums to whole numbers that float64 holds, so a score is the same in any batch.
"""

import torch
from torch import Tensor
from torch.nn import functional

from vila2.ops.linear import Linear
from vila2.ops.quant import GROUP, PANEL, PackedBytes, gated_order, turn_rows
from vila2.ops.top import KERNEL_TOP, finds_top, linear_top, top_reference

NUM_REFINED = 8  # columns of a row; 16 agree with float32 no more often
MOST_TOP = (
    112  # columns that `head_top` finds without all scores: room for those and some banned ones is left
)

_STEPS = 2.0**24
_LEAST = 1e-30


def refined_reference(x: Tensor, weights: PackedBytes) -> Tensor:
    """`x @ weight.T + bias` of float32 `x` (rows, depth), its rows in fixed point."""
    rows, step = _fixed_point(x, weights)
    weight = weights.unpacked()
    y = ((rows @ weight.values.double().T) * step).float() * weight.scales
    if weights.bias is not None:
        y = y + weights.bias[: weights.columns]
    return y[:, torch.argsort(gated_order(weights.columns))] if weights.is_gated else y


def refined(x: Tensor, weights: PackedBytes, columns: Tensor) -> Tensor:
    """The same in some columns of each row, (rows, n) int64, to (rows, n). The weights must not be gated."""
    rows, step = _fixed_point(x, weights)
    rows = functional.pad(rows, (0, -weights.depth % GROUP))
    # Four weights of a column are an int32: a gather of these, and bytes again.
    groups = weights.panels.view(torch.int32)[columns // PANEL, :, columns % PANEL, 0]
    sums = groups.view(torch.int8).double() @ rows[:, :, None]
    y = (sums.squeeze(-1) * step).float() * weights.scales[columns]
    return y if weights.bias is None else y + weights.bias[columns]


def head_scores(x: Tensor, head: Linear) -> Tensor:
    """`head(x)` of `x` (rows, depth); with weights in bytes the NUM_REFINED best columns of each row are refined."""
    scores: Tensor = head(x)
    weights = head.packed
    if not isinstance(weights, PackedBytes) or weights.is_gated:
        return scores
    best = _best(scores, min(NUM_REFINED, weights.columns))
    return scores.scatter_(1, best, refined(x, weights, best))


def head_top(x: Tensor, head: Linear, count: int, banned: Tensor, is_banned: Tensor) -> tuple[Tensor, Tensor]:
    """`top_reference(head_scores(x, head), ...)`. ValueError if `count` passes the columns, or MOST_TOP."""
    weights = head.packed
    if not isinstance(weights, PackedBytes):
        return linear_top(x, head, count, banned, is_banned)
    if not 1 <= count <= min(MOST_TOP, weights.columns):
        raise ValueError(f"the best {count} of {weights.columns} columns: take 1 to {MOST_TOP} of them")
    if not bool(is_banned.any()):
        banned = banned[:0]
    most = min(weights.columns, NUM_REFINED + count + len(banned))
    if not finds_top(head) or most > KERNEL_TOP:
        return top_reference(head_scores(x, head), count, banned, is_banned)
    # What is not refined keeps its order, so of these columns are the best, whatever becomes of the refined.
    values, columns = linear_top(x, head, most, banned[:0], torch.zeros_like(is_banned))
    best = refined(x, weights, columns[:, :NUM_REFINED])
    values[:, :NUM_REFINED] = best.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if len(banned):
        values.masked_fill_(is_banned.bool()[:, None] & torch.isin(columns, banned), -torch.inf)
    columns, order = columns.sort(-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values[:, :count], columns.gather(1, order[:, :count])


def _fixed_point(x: Tensor, weights: PackedBytes) -> tuple[Tensor, Tensor]:
    """Rows as whole numbers in float64, and what a step is worth (rows, 1). A row that is not finite is NaN."""
    turned = turn_rows(x, weights.turn).double()
    step = turned.abs().amax(-1, keepdim=True).clamp_min_(_LEAST) / _STEPS
    return (turned / step).round_(), step


def _best(scores: Tensor, count: int) -> Tensor:
    """The columns (rows, count) that `top_reference` puts first, in any order."""
    values, columns = scores.topk(count)
    if count < scores.shape[1]:
        # Of equal ones topk takes any.
        tied = (scores >= values[:, -1:]).sum(-1) > count
        for row in tied.nonzero().flatten().tolist():
            columns[row] = scores[row].sort(descending=True, stable=True).indices[:count]
    return columns
