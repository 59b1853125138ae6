"""The codes of int4 by as few ops as there can be, for graphs that are written out.

What :func:`kvpass.kernels.formats.fitted_codes.fit_codes` tries one after the other, in a few hundred ops, is tried at
once here: a file has these ops for each cache of each layer. That takes sixteen times the memory of the new rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpass.kernels.formats.fitted_codes import CUTS, steps_between


def fit_at_once(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes float32 ``[..., D]`` of -8..7, scales and offsets bfloat16 ``[..., 1]`` of rows float32 ``[..., D]``.

    They are those of ``fit_codes``, of whose comments this has none.
    """
    width = rows.shape[-1]
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    middle, half = low * 0.5 + high * 0.5, high * 0.5 - low * 0.5
    unit = ((rows - middle) / half).nan_to_num(0.0, 0.0, 0.0)
    mean = unit.mean(-1, keepdim=True)
    steps = torch.tensor([steps_between(lower, upper) for lower in CUTS for upper in CUTS], device=rows.device)
    inverse, shift = steps[:, :1], steps[:, 1:]
    wide = unit.unsqueeze(-2)
    tried = (wide * inverse + shift).round().clamp(-8.0, 7.0)  # [..., 16, D]
    mean_code = tried.sum(-1, keepdim=True) / width
    along = (wide * tried).sum(-1, keepdim=True) - width * mean.unsqueeze(-2) * mean_code
    spread = tried.square().sum(-1, keepdim=True) - width * mean_code.square()
    gain = along * along / spread
    gain = torch.where(gain > 0.0, gain, 0.0)  # nothing is chosen where it is not a number
    place = torch.arange(len(steps), device=rows.device)[:, None]
    first = torch.where(gain == gain.amax(-2, keepdim=True), place, len(steps)).amin(-2, keepdim=True)
    chosen = (place == first) & (gain > 0.0)
    codes, slopes, means = (
        torch.where(chosen, part, 0.0).sum(-2) for part in (tried, along / spread, mean_code)
    )  # of one trial each
    strange = ~rows.isfinite().all(-1, keepdim=True)
    # Filled as float32: this runs where nothing but casts knows bfloat16.
    scales = (slopes * half).masked_fill(strange, torch.nan).to(torch.bfloat16)
    offsets = mean * half + middle - scales.float() * means
    return codes.masked_fill(strange, 0.0), scales, offsets.masked_fill(strange, torch.nan).to(torch.bfloat16)
