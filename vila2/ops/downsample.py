"""The projector's down-sampling and the layer norm after it: factor x factor neighbours become one token."""

import math

from torch import Tensor
from torch.nn import functional

from vila2.ops.norms import layer_norm, layer_norm_reference
from vila2.ops.triton import is_triton, wants_gradient


def downsample(features: Tensor, factor: int, column_major: bool) -> Tensor:
    """(tiles, side * side, width) to (tiles, tokens, factor * factor * width); a token's parts in row order.

    Tokens leave row by row, or column by column; an incomplete right or bottom edge is filled with zeros.
    """
    tiles, count, width = features.shape
    side = math.isqrt(count)
    padding = -side % factor
    grid = features.reshape(tiles, side, side, width)
    if padding:
        grid = functional.pad(grid, (0, 0, 0, padding, 0, padding))
    cells = (side + padding) // factor
    grid = grid.reshape(tiles, cells, factor, cells, factor, width)
    order = (0, 3, 1, 2, 4, 5) if column_major else (0, 1, 3, 2, 4, 5)
    return grid.permute(order).reshape(tiles, cells * cells, factor * factor * width)


def downsample_norm_reference(
    features: Tensor, factor: int, column_major: bool, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """`layer_norm(downsample(features))`; weight and bias are (factor * factor * width,)."""
    return layer_norm_reference(downsample(features, factor, column_major), weight, bias, eps)


def downsample_norm(
    features: Tensor, factor: int, column_major: bool, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """The same by the fastest path; shapes as in `downsample`."""
    if is_triton(features, weight, bias) and not wants_gradient(features, weight, bias):
        from vila2.kernels.downsample import downsample_norm_triton

        side = math.isqrt(features.shape[1])
        return downsample_norm_triton(features, side, factor, column_major, weight, bias, eps)
    return layer_norm(downsample(features, factor, column_major), weight, bias, eps)
