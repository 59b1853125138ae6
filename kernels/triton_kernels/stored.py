"""How the kernels see a cache tensor: its format, strides and pieces, and the dtype in which its dots are taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from kvpass.kernels.formats import CacheFormat, format_of
from kvpass.kernels.triton_kernels.launch import Target

FLOATS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
FP8 = ("fp8_e4m3", "fp8_e5m2")


@dataclass(frozen=True, eq=False)
class Stored:
    """One cache tensor as the kernels take it.

    Attributes:
        form: the format.
        spelling: how kernels read it; a format, "float", or fp8 as bytes.
        tensor: the elements.
        scales: the same memory as float32, or None for formats without scales.
        width: elements of a row, D.
        row: stored elements of a row, in the tensor's dtype.
        slab: stored elements of a slab, scales included.
        piece_a: width of the first piece of a row.
        piece_b: width of the second, 0 if there is none.
    """

    form: CacheFormat
    spelling: str
    tensor: Tensor
    scales: Tensor | None
    width: int
    row: int
    slab: int
    piece_a: int
    piece_b: int


def split_width(width: int) -> tuple[int, int]:
    """Two powers of two, at least 16 each, that cover ``width``; the second is 0 where one does."""
    whole = 1 << (max(width, 16).bit_length() - 1)
    rest = max(width, 16) - whole
    if rest == 0:
        return whole, 0
    rest = max(16, 1 << (rest - 1).bit_length())
    return (whole, rest) if rest < whole else (2 * whole, 0)


def see_cache(cache: Tensor, name: str | None, target: Target) -> Stored:
    """The cache ``[B, Hkv, P, W]`` as the kernels take it.

    Raises:
        InputError: if the name and the dtype of the cache do not fit each other.
    """
    form = format_of(cache, name)
    width, size = form.row_width(cache.shape[3]), cache.shape[2]
    row = width // 2 if form.bits == 4 else width
    scales, slab, spelling = None, size * cache.shape[3], "float"
    if form.scaled:
        scales, spelling = cache.view(-1).view(torch.float32), form.name
    elif form.name in FP8 and not target.native_fp8:
        cache, spelling = cache.view(torch.uint8), f"{form.name}_bytes"
    return Stored(form, spelling, cache, scales, width, row, slab, *split_width(row))


def dot_dtype(query: torch.dtype, form: CacheFormat, target: Target, scaled_weights: bool = False) -> Any:
    """The dtype of a dot of queries or weights with a cache of this format; it holds the cache's elements exactly.

    scaled_weights: the weights were multiplied by the scales of rows, and may have left the range of float16.
    """
    kind = query
    if form.bits > 8 and form.dtype is not query:
        kind = torch.float32
    if scaled_weights and kind == torch.float16:
        kind = torch.bfloat16
    return tl.float32 if kind == torch.bfloat16 and target.interpreted else FLOATS[kind]


def dot_precision(target: Target) -> str:
    """How float32 dots are taken: not in plain TF32, whose 10 bits would be the largest error of all."""
    return "ieee" if target.interpreted or target.architecture.startswith("gfx") else "tf32x3"
