"""Caches of k4v2 for random calls: some blocks settled and some wide, and NaN wherever nothing was written."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpass.kernels.formats.cache_formats import FORMATS
from kvpass.kernels.formats.settling import read_blocks, settle_slabs, wide_view

ROWS = tuple(name for name, row in FORMATS.items() if row.settles is None)  # formats whose rows stand for themselves
NAMES = (*ROWS, "k4")  # what tests iterate over: k4 stands for k4v2


def paired(first: str, second: str) -> tuple[str, str]:
    """Formats of keys and values drawn apart from each other: settling ones go together."""
    return ("k4", "v2") if FORMATS[first].settles or FORMATS[second].settles else (first, second)


def settled_caches(
    rows: tuple[Tensor, Tensor], written: Tensor, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Caches of keys and values, of which blocks that are full have settled or not, by chance.

    Args:
        rows: keys ``[B, H, P, D]`` and values.
        written: bool ``[B, P]``.
        generator: of chance.

    Returns:
        the two caches; the numbers that they stand for, float64 ``[B, H, P, D]``; and the number in the caches of each
        of the B blocks.
    """
    settled = written.all(1) & (torch.rand(len(written), generator=generator) < 0.6)
    narrow, wide = int(settled.sum()) + 2, int((~settled).sum()) + 1
    ids = torch.empty(len(written), dtype=torch.int64)
    ids[settled] = torch.randperm(narrow, generator=generator)[: narrow - 2]
    ids[~settled] = -1 - torch.randperm(wide, generator=generator)[: wide - 1]
    caches, numbers = [], []
    for part, form in zip(rows, (FORMATS["k4"], FORMATS["v2"]), strict=True):
        _, heads, size, dim = part.shape
        cache = form.allocate(narrow, heads, size, dim, "cpu", wide).fill_(255)
        cache[ids[settled]] = settle_slabs(part[settled], form)
        blocks = wide_view(cache, form)
        kept = part.bfloat16().masked_fill(~written[:, None, :, None], torch.nan)
        blocks[ids[~settled] + len(blocks)] = kept[~settled]
        caches.append(cache)
        numbers.append(read_blocks(cache, form, ids).double())
    return caches, numbers, ids


def allowed_errors(rows: Tensor, name: str) -> Tensor:
    """Largest error that settling blocks ``[..., P, D]`` may make of each number, from the words of the format."""
    rows = rows.double().abs()
    if name == "k4":  # half a step of 15, and a channel's byte is up to an eighth too large, a scale 2^-7
        groups = rows.unflatten(-2, (-1, 16))
        largest = groups.amax(-2, keepdim=True)
        tiny = largest.amax(-1, keepdim=True) * 2.0**-31
        return (largest * (1.125 * (1 + 2.0**-7)) + tiny).expand_as(groups).flatten(-3, -2) / 14 * 1.0001
    # the smallest scale that is tried reaches 3/8 of the largest number
    return (rows.amax(-1, keepdim=True) * (1 - 1.5 * 0.25 * (1 - 2.0**-8)) * 1.0001).expand_as(rows)
