"""The cache formats from their words alone: what a row of numbers is stored as, and what stored bytes stand for.

Nothing here is taken from :mod:`kvpass.kernels`: random calls are made of it, so that a mistake of the formats' own
code shows. The settling formats are defined by blocks, see :mod:`tests.kernels.settled_cases`.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
SATURATING = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}
TAIL = 4  # bytes behind the codes of a slab, for each of its rows
CUTS = (0.0, 0.04, 0.08, 0.12)  # parts of the range of an int4 row that may be cut off at either end


def encode(rows: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
    """Rows ``[..., D]`` as stored bytes ``[..., bytes]``, and their tails uint8 ``[..., 4]`` or None."""
    rows = rows.float()
    if name in SATURATING:
        most = SATURATING[name]
        rows = torch.where(rows.isfinite(), rows.clamp(-most, most), torch.nan)
    if name in FLOATS:
        return rows.to(FLOATS[name]).contiguous().view(torch.uint8), None
    if name == "int4":
        codes, tails = _fit_nibbles(rows)
        low, high = (codes + 8).to(torch.uint8).chunk(2, -1)
        return low | (high << 4), tails
    finite = rows.isfinite().all(-1, keepdim=True)
    scales = torch.where(finite, rows.abs().amax(-1, keepdim=True) / 127, torch.nan)
    codes = torch.where(scales > 0, torch.round(rows / scales).clamp(-127, 127), 0.0)
    return codes.to(torch.int8).view(torch.uint8), scales.view(torch.uint8)


def decode(stored: Tensor, tails: Tensor | None, name: str) -> Tensor:
    """The numbers that stored rows stand for, float64 ``[..., D]``."""
    if tails is None:
        return stored.contiguous().view(FLOATS[name]).double()
    if name == "int4":
        codes = torch.cat((stored & 15, stored >> 4), -1).double() - 8
        scales, offsets = tails.contiguous().view(torch.bfloat16).double().chunk(2, -1)
        return codes * scales + offsets
    return stored.contiguous().view(torch.int8).double() * tails.contiguous().view(torch.float32).double()


def make_cache(rows: Tensor, name: str) -> Tensor:
    """A cache ``[B, H, P, W]`` of rows ``[B, H, P, D]``: in each slab the codes of all rows, then their tails."""
    stored, tails = encode(rows, name)
    if tails is None:
        return stored.view(FLOATS[name])
    return torch.cat((stored.flatten(2), tails.flatten(2)), 2).view(*rows.shape[:3], -1)


def split_cache(cache: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
    """Views of the bytes of a cache: elements ``[B, H, P, bytes]``, and tails ``[B, H, P, 4]`` where there are any."""
    if name in FLOATS:
        return cache.view(torch.uint8), None
    blocks, heads, size, width = cache.shape
    flat, elements = cache.flatten(2), size * (width - TAIL)
    return flat[..., :elements].view(blocks, heads, size, -1), flat[..., elements:].view(blocks, heads, size, TAIL)


def read_cache(cache: Tensor, name: str) -> Tensor:
    """The numbers of a cache, float64 ``[B, H, P, D]``."""
    return decode(*split_cache(cache, name), name)


def _fit_nibbles(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of -8..7, and scale and offset in bfloat16 as bytes: of all cuts, each with its regression, the best."""
    finite = rows.isfinite().all(-1, keepdim=True)
    fine = torch.where(finite, rows, 0.0).double()
    low, high = fine.amin(-1, keepdim=True), fine.amax(-1, keepdim=True)
    part = (fine - low) / torch.where(high > low, high - low, 1.0)
    tried = []
    for lower in CUTS:
        for upper in CUTS:
            codes = ((part - lower) / (1 - lower - upper) * 15 - 8).round().clamp(-8, 7)
            centred = codes - codes.mean(-1, keepdim=True)
            scale = (fine * centred).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True).clamp(min=1e-30)
            left = fine - fine.mean(-1, keepdim=True) - scale * centred
            tried.append((left.square().sum(-1, keepdim=True), codes, scale))
    best = torch.stack([error for error, _, _ in tried]).argmin(0, keepdim=True)
    codes, scale = (torch.stack(each).take_along_dim(best, 0)[0] for each in list(zip(*tried, strict=True))[1:])
    scale = scale.bfloat16()
    offset = fine.mean(-1, keepdim=True) - scale.double() * codes.mean(-1, keepdim=True)
    tails = torch.cat((scale, offset.bfloat16()), -1).masked_fill(~finite, torch.nan)
    return torch.where(finite, codes, 0.0), tails.view(torch.uint8)
