"""The codes of int4: a search for the scale of least squared error, when a row is written."""

from __future__ import annotations

import torch
from torch import Tensor

# Steps that the largest magnitude is tried to be, from no clipping at either end of -8..7 to three steps cut off.
STEPS = (7.0, 7.5, 8.0, 8.5, 9.0, 9.5, 10.0)


def fit_codes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of -8..7 and a scale for each row, of all that are tried those with the least squared error.

    Tried are codes ``round(x * s)``, clipped, with steps ``s`` that make the largest magnitude each of
    :data:`STEPS`, with either sign. To given codes c the scale of least squares is ``sum(x c) / sum(c c)``, and the
    error that it leaves is least where ``sum(x c)^2 / sum(c c)`` is largest. The first trial clips nothing, so no row's
    squared error is above that of a symmetric scale ``absmax / 7``.

    Args:
        rows: float32 ``[..., D]``.

    Returns:
        codes int8 ``[..., D]`` and scales float32 ``[...]``: 0 for a row of zeros, NaN for one that is not finite.
    """
    absmax = rows.abs().amax(-1, keepdim=True)
    unit = (rows / absmax).nan_to_num(0.0, 0.0, 0.0)
    best = torch.zeros_like(absmax)
    codes, scales = torch.zeros_like(unit), torch.zeros_like(absmax)
    for step in STEPS:
        for signed in (step, -step):
            tried = (unit * signed).round_().clamp_(-8.0, 7.0)
            along, square = (unit * tried).sum(-1, keepdim=True), tried.square().sum(-1, keepdim=True)
            gain = along * along / square
            better = gain > best
            best = torch.where(better, gain, best)
            codes = torch.where(better, tried, codes)
            scales = torch.where(better, along / square, scales)
    scales = (scales * absmax).masked_fill(~absmax.isfinite(), torch.nan).masked_fill(absmax == 0, 0.0)
    return codes.to(torch.int8), scales.squeeze(-1)
