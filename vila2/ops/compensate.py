"""Weights rounded to int8 so that what one rounding breaks, the next ones mend.

Rounding each weight to its nearest step is best for inputs that are all alike. Real inputs are not: they vary much in
some directions and little in most. GPTQ (arXiv 2210.17323) rounds one input channel after the other and adds each
one's error to the channels not yet rounded, as their second moments over real inputs say it is least felt.
"""

import torch
from torch import Tensor

from vila2.ops.quant import MOST, NARROW_PAIR, QuantizedWeight, least_scales

_BLOCK = 64  # channels whose errors are added up before the rest hears of them
_COLUMNS_AT_ONCE = 2048  # a block of so many columns stays in a cache
DAMPING = 0.01


def compensated_weight(weight: Tensor, moments: Tensor, *, narrow: bool) -> QuantizedWeight:
    """Round `weight` (columns, depth) for inputs whose second moments are `moments` (depth, depth), `x.T @ x`.

    Scales are those of `quantize_weight`, so zero columns stay zero, and `narrow` weights are narrow. Any multiple of
    the moments gives the same weights. ValueError if the moments are not finite.
    """
    weight = weight.detach().float()
    if not bool(moments.isfinite().all()):
        raise ValueError("the second moments of a product's inputs are not finite")
    factor = _factor(moments)
    scales = least_scales(weight, narrow=narrow)
    values = [
        _round(part.T / torch.where(scale > 0, scale, 1.0), factor, narrow)
        for part, scale in zip(
            torch.split(weight, _COLUMNS_AT_ONCE), torch.split(scales, _COLUMNS_AT_ONCE), strict=True
        )
    ]
    return QuantizedWeight(torch.cat(values, 1).T.contiguous().to(torch.int8), scales)


def _factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of damped moments: row k says what channel k owes the later ones."""
    wide = moments.double()
    mean = wide.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    wide = wide / mean + DAMPING * torch.eye(len(wide), dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _round(steps: Tensor, factor: Tensor, narrow: bool) -> Tensor:
    """Whole numbers for `steps` (depth, columns), which is consumed."""
    steps = steps.contiguous()
    values = torch.empty_like(steps)
    for start in range(0, len(steps), _BLOCK):
        end = min(start + _BLOCK, len(steps))
        errors = torch.empty_like(steps[start:end])
        for k in range(start, end):
            low, high = -float(MOST), float(MOST)
            value = steps[k].round().clamp_(low, high)
            if narrow and k % 2:
                before = values[k - 1]
                value = torch.minimum(value, NARROW_PAIR - before.clamp_min(0))
                value = torch.maximum(value, -NARROW_PAIR - before.clamp_max(0))
            values[k] = value
            errors[k - start] = (steps[k] - value) / factor[k, k]
            steps[k + 1 : end].addr_(factor[k, k + 1 : end], errors[k - start], alpha=-1)
        steps[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return values
