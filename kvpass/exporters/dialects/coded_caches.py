"""Caches in coded formats as tensors that any runtime reads: codes, scales and offsets apart, and the way between.

The library keeps codes and scales of a slab in one tensor of bytes, which has to be seen as other numbers to be read.
Few runtimes can do that, so an exported program holds each in a tensor of its own dtype, ``[..., H, P, width]``. The
numbers are those of :mod:`kvpass.kernels.formats.cache_formats`: equal codes, equal scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.exporters.dialects.fitted_at_once import fit_at_once
from kvpass.kernels.formats.cache_formats import CacheFormat, find_format, format_of

INT8, INT4 = "int8", "int4"


@dataclass(frozen=True)
class Piece:
    """One of the tensors that a cache is.

    Attributes:
        suffix: what its name has behind the cache's.
        dtype: of its numbers.
        width: of the row that one token and head take.
        meaning: what it holds, for the manifest.
    """

    suffix: str
    dtype: torch.dtype
    width: int
    meaning: str = ""


@dataclass(frozen=True)
class Coding:
    """How rows of a coded format become tensors, and come back.

    Attributes:
        pieces: the tensors for rows of so many numbers.
        encode: rows ``[..., D]`` as the pieces, in their order.
        decode: the numbers ``[..., D]`` of the pieces, in a dtype.
    """

    pieces: Callable[[int], tuple[Piece, ...]]
    encode: Callable[[Tensor], tuple[Tensor, ...]]
    decode: Callable[[Sequence[Tensor], torch.dtype], Tensor]


def _int8_pieces(dim: int) -> tuple[Piece, ...]:
    codes = Piece("", torch.int8, dim, "codes")
    return codes, Piece("_scales", torch.float32, 1, "scales; a number is scale * code")


def encode_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 ``[..., D]`` and scales float32 ``[..., 1]``; a scale is 0 for a row of zeros, NaN for one that is not
    finite."""
    rows = rows.float()
    # Not left to the largest number: runtimes differ in what that is where one of them is NaN.
    finite = rows.isfinite().all(-1, keepdim=True)
    scales = torch.where(finite, rows.abs().amax(-1, keepdim=True) / 127.0, torch.nan)
    codes = torch.where(scales > 0.0, rows / scales, 0.0).round().clamp(-127.0, 127.0)
    return codes.to(torch.int8), scales


def decode_int8(held: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """``scale * code``, ``[..., D]``."""
    codes, scales = held
    return codes.to(dtype) * scales.to(dtype)


def _int4_pieces(dim: int) -> tuple[Piece, ...]:
    halves = f"codes + 8; byte j holds dim j in its low and dim j + {dim // 2} in its high half"
    return (
        Piece("", torch.uint8, dim // 2, halves),
        Piece("_scales", torch.bfloat16, 1, "scales; a number is scale * code + offset"),
        Piece("_offsets", torch.bfloat16, 1, "offsets"),
    )


def encode_int4(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of codes uint8 ``[..., D / 2]``, scales and offsets bfloat16 ``[..., 1]``."""
    codes, scales, offsets = fit_at_once(rows.float())
    # In numbers, not in bits: not every dialect has shifts, and up to 255 they are exact.
    low, high = (codes + 8.0).chunk(2, -1)
    return (low + 16.0 * high).to(torch.uint8), scales, offsets


def decode_int4(held: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """``scale * code + offset``, ``[..., D]``."""
    pairs, scales, offsets = (part.to(dtype) for part in held)
    high = (pairs / 16.0).floor()
    codes = torch.cat((pairs - 16.0 * high, high), -1) - 8.0
    return codes * scales + offsets


CODINGS: dict[str, Coding] = {
    INT8: Coding(_int8_pieces, encode_int8, decode_int8),
    INT4: Coding(_int4_pieces, encode_int4, decode_int4),
}


def pieces(form: CacheFormat, dim: int) -> tuple[Piece, ...]:
    """The tensors of a cache of rows of ``dim`` numbers; one for what is no coded format."""
    return CODINGS[form.name].pieces(dim) if form.name in CODINGS else (Piece("", form.dtype, form.stored_width(dim)),)


def suffixes(name: str | None) -> tuple[str, ...]:
    """What the names of a cache's tensors end in."""
    return tuple(piece.suffix for piece in CODINGS[name].pieces(2)) if name in CODINGS else ("",)


def row_width(held: Sequence[Tensor], name: str | None) -> int:
    """Numbers D in a row of a cache."""
    width = held[0].shape[-1]
    return (
        width if name is None or name not in CODINGS else width * held[0].dtype.itemsize * 8 // find_format(name).bits
    )


def encode(rows: Tensor, held: Sequence[Tensor], name: str | None) -> tuple[Tensor, ...]:
    """Rows ``[..., D]`` as the tensors ``held`` of a cache hold them; ``name`` is its format, None for its dtype's."""
    if name in CODINGS:
        return CODINGS[name].encode(rows)
    form = format_of(held[0], name)
    if form.largest is not None:  # fp8, into which a cast by itself saturates or not, as the runtime likes
        rows = torch.where(rows.isinf(), torch.nan, rows.float()).clamp(-form.largest, form.largest)
    return (rows.to(form.dtype),)


def decode(held: Sequence[Tensor], name: str | None, dtype: torch.dtype) -> Tensor:
    """The numbers ``[..., D]`` of a cache's tensors: in ``dtype`` where they are coded, else as they are."""
    return CODINGS[name].decode(held, dtype) if name in CODINGS else held[0]


def uncoded(facts: Mapping[str, object]) -> str | None:
    """What of a call's caches is in a format that has no tensors of its own: those that are settled in blocks."""
    return _cache_in(facts, lambda name: find_format(name).coded and name not in CODINGS)


def coded(facts: Mapping[str, object]) -> str | None:
    """What of a call's caches is no plain number."""
    return _cache_in(facts, lambda name: find_format(name).coded)


def _cache_in(facts: Mapping[str, object], refused: Callable[[str], bool]) -> str | None:
    for part in ("key_format", "value_format", "format"):
        name = facts.get(part)
        if name is not None and refused(str(name)):
            return f"a cache in {name}"
    return None
