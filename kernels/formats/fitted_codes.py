"""The codes of int4: a search for scale and offset of least squared error, when a row is written."""

from __future__ import annotations

import torch
from torch import Tensor

# Shares of a row's range that are tried to be cut off at either end, each with each.
CUTS = (0.0, 0.04, 0.08, 0.12)


def fit_codes(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of -8..7, a scale and an offset for each row, of all that are tried those with the least squared error.

    A number is ``scale * code + offset``. Tried are codes in 15 equal steps between two ends, which are the smallest
    and the largest number or lie :data:`CUTS` of the range inside; what lies beyond is clipped. To given codes c scale
    and offset of least squares are a regression of x on c, and the error that it leaves is least where
    ``cov(x, c)^2 / var(c)`` is largest. Scale and offset are rounded to bfloat16, the offset last. The first trial
    clips nothing, so the root mean square error of a row is at most half of a 15th of its range, but for that rounding.

    Args:
        rows: float32 ``[..., D]``.

    Returns:
        codes int8 ``[..., D]``, scales and offsets bfloat16 ``[...]``: a scale of 0 for a row of equal numbers, NaN for
        both for one that is not finite.
    """
    width = rows.shape[-1]
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    middle, half = low * 0.5 + high * 0.5, high * 0.5 - low * 0.5
    unit = ((rows - middle) / half).nan_to_num(0.0, 0.0, 0.0)
    mean = unit.mean(-1, keepdim=True)
    best, slopes, means = (torch.zeros_like(half) for _ in range(3))
    codes = torch.zeros_like(unit)
    for lower in CUTS:
        for upper in CUTS:
            inverse, shift = steps_between(lower, upper)
            tried = (unit * inverse + shift).round_().clamp_(-8.0, 7.0)
            mean_code = tried.sum(-1, keepdim=True) / width
            along = (unit * tried).sum(-1, keepdim=True) - width * mean * mean_code
            spread = tried.square().sum(-1, keepdim=True) - width * mean_code.square()
            gain = along * along / spread
            better = gain > best
            best = torch.where(better, gain, best)
            codes = torch.where(better, tried, codes)
            slopes = torch.where(better, along / spread, slopes)
            means = torch.where(better, mean_code, means)
    scales = (slopes * half).to(torch.bfloat16)
    offsets = (mean * half + middle - scales.float() * means).to(torch.bfloat16)
    strange = ~rows.isfinite().all(-1, keepdim=True)
    scales, offsets = (part.masked_fill(strange, torch.nan).squeeze(-1) for part in (scales, offsets))
    return codes.masked_fill_(strange, 0.0).to(torch.int8), scales, offsets


def steps_between(lower: float, upper: float) -> tuple[float, float]:
    """Factor and shift that bring what lies between ``2 lower - 1`` and ``1 - 2 upper`` to -8..7."""
    inverse = 15.0 / (2.0 - 2.0 * lower - 2.0 * upper)
    return inverse, (1.0 - 2.0 * lower) * inverse - 8.0
