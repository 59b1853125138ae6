"""Moving single rows within caches, bit by bit, whatever the format."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpass.errors import InputError
from kvpass.kernels.formats.cache_formats import find_format, split_slabs


def move_rows(cache: Tensor, name: str, source: Tensor, target: Tensor) -> None:
    """Copy the rows of all heads from slot ``source[i]`` to slot ``target[i]``; no number is computed anew.

    All rows are read before any is written, so rows may be moved about and exchanged.

    Args:
        cache: ``[B, Hkv, P, W]``, contiguous; written.
        name: name of its format.
        source: int64 ``[M]``, ``block * P + offset``.
        target: int64 ``[M]``, all different.

    Raises:
        InputError: if the format stores blocks as a whole, so that no row stands by itself.
    """
    form = find_format(name)
    if form.settles is not None:
        raise InputError(f"rows of the format {name} cannot be moved: its blocks are stored as a whole")
    if not cache.shape[3]:
        return  # values that are part of the keys
    size = cache.shape[2]
    slabs = cache.view(torch.uint8) if form.bits == 8 else cache  # not every device can index fp8
    for part in split_slabs(slabs, form) if form.scaled else (slabs,):
        blocks, offsets = source.div(size, rounding_mode="floor"), source % size
        rows = part[blocks, :, offsets]
        part[target.div(size, rounding_mode="floor"), :, target % size] = rows
