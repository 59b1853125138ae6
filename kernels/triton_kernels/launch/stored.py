"""How the kernels see a cache tensor: its format, strides and pieces, and the dtype in which its dots are taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from kvpass.kernels.backends import say_once
from kvpass.kernels.formats.cache_formats import CacheFormat, format_of
from kvpass.kernels.triton_kernels.launch.launch import Target

FLOATS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
FP8 = ("fp8_e4m3", "fp8_e5m2")


@dataclass(frozen=True, eq=False)
class Stored:
    """One cache tensor as the kernels take it.

    Attributes:
        form: the format.
        spelling: how kernels read it; a format, "float", or fp8 as bytes.
        tensor: the elements.
        scales: the same memory as float32, or None for formats without scales; of settling formats as bfloat16.
        block_size: tokens per block, P.
        width: numbers of a row, D.
        row: elements of a row, in the tensor's dtype.
        slab: elements of a slab, scales included.
        piece_a: width of the first piece of a row; of settling formats that of each of its parts.
        piece_b: width of the second, 0 if there is none.
    """

    form: CacheFormat
    spelling: str
    tensor: Tensor
    scales: Tensor | None
    block_size: int
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
    """The cache ``[B, Hkv, P, W]`` as the kernels read it: scaled formats in words of 32 bits.

    Raises:
        InputError: if the name and the dtype of the cache do not fit each other.
    """
    form = format_of(cache, name)
    width, size = form.row_width(cache.shape[3]), cache.shape[2]
    if form.settles is not None:
        slab, parts = size * cache.shape[3], 8 // form.bits
        piece = max(16, 1 << (width // parts - 1).bit_length())
        halves = cache.view(-1).view(torch.bfloat16)
        return Stored(form, form.name, cache, halves, size, width, width // parts, slab, piece, 0)
    if not form.scaled:
        spelling = "float"
        if form.name in FP8 and not target.native_fp8:
            say_once(
                f"kvpass kernels: this device does not convert {form.name} itself: its bytes are taken apart, which is "
                "slower and gives the same result"
            )
            cache, spelling = cache.view(torch.uint8), f"{form.name}_bytes"
        return Stored(form, spelling, cache, None, size, width, width, size * width, *split_width(width))
    row = width * form.bits // 32
    words, scales = (cache.view(-1).view(dtype).view(*cache.shape[:2], -1) for dtype in (torch.int32, torch.float32))
    pieces = split_width(row) if form.bits == 8 else (max(16, 1 << (row - 1).bit_length()), 0)
    return Stored(form, form.name, words, scales, size, width, row, size * (row + 1), *pieces)


def see_for_write(cache: Tensor, name: str | None) -> Stored:
    """The cache as the kernels write it: scaled formats and fp8 in bytes, which are made the same on every device.

    Raises:
        InputError: if the name and the dtype of the cache do not fit each other.
    """
    form = format_of(cache, name)
    width, size = form.row_width(cache.shape[3]), cache.shape[2]
    row, slab, spelling, scales = width, size * cache.shape[3], "float", None
    if form.scaled:
        row, spelling = width * form.bits // 8, form.name
        scales = cache.view(-1).view(torch.float32)
    elif form.name in FP8:
        cache, spelling = cache.view(torch.uint8), f"{form.name}_bytes"
    return Stored(form, spelling, cache, scales, size, width, row, slab, *split_width(row))


def dot_dtype(query: torch.dtype, form: CacheFormat, target: Target) -> Any:
    """The dtype of a dot of queries or weights with a cache of this format; it holds the cache's elements exactly.

    That is float16 for elements of 8 bits and less, into which they are brought in the fewest instructions.
    """
    if form.settles is not None:
        return tl.float32
    if form.bits <= 8:
        return tl.float32 if query is torch.float32 else tl.float16
    kind = query if form.dtype is query else torch.float32
    return tl.float32 if kind is torch.bfloat16 and target.interpreted else FLOATS[kind]


def dot_precision(target: Target) -> str:
    """How float32 dots are taken: not in plain TF32, whose 10 bits would be the largest error of all."""
    return "ieee" if target.interpreted or target.architecture.startswith("gfx") else "tf32x3"
