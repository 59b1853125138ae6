"""Filling, moving and reading back caches in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpass.kernels.formats.cache_formats import (
    CacheFormat,
    find_format,
    format_of,
    quantise_rows,
    split_slabs,
    unpack_slabs,
)
from kvpass.kernels.formats.settling import open_for_write, read_blocks, settle_cache
from kvpass.kernels.step_memo import StepMemo

WRITTEN_ROWS: StepMemo[Tensor] = StepMemo()


def write_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_format: str | None = None,
    value_format: str | None = None,
) -> None:
    """``kvpass::write_cache``; see :mod:`kvpass.kernels.cache_ops`."""
    if key_format == "k4":
        key_cache, value_cache, slot_mapping = open_for_write(key_cache, value_cache, slot_mapping)
        key_format = value_format = None
    _, heads, size, _ = key_cache.shape

    def find_rows() -> Tensor:
        block = slot_mapping.div(size, rounding_mode="floor")
        first = slot_mapping + block * ((heads - 1) * size)
        return (first[:, None] + torch.arange(heads, device=first.device) * size).flatten()

    # The row of a token and head in a list of all rows: slab * P + offset.
    rows = WRITTEN_ROWS.get((slot_mapping,), (heads, size), find_rows)
    for new, cache, name in ((key, key_cache, key_format), (value, value_cache, value_format)):
        if not cache.shape[3]:
            continue  # values that are part of the keys
        _write_rows(new.reshape(-1, new.shape[2]), cache, rows, format_of(cache, name))


def _write_rows(new: Tensor, cache: Tensor, rows: Tensor, form: CacheFormat) -> None:
    elements, new_tails = quantise_rows(new, form)
    if new_tails is None:
        if form.bits == 8:  # not every device can index fp8
            elements, cache = elements.view(torch.uint8), cache.view(torch.uint8)
        cache.view(-1, cache.shape[3]).index_copy_(0, rows, elements)
        return
    codes, tails = split_slabs(cache.flatten(0, 1), form)
    slab, offset = rows.div(cache.shape[2], rounding_mode="floor"), rows % cache.shape[2]
    codes[slab, offset] = elements
    tails[slab, offset] = new_tails


def norm_rotary_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool = False,
    key_format: str | None = None,
    value_format: str | None = None,
) -> Tensor:
    """``kvpass::norm_rotary_write``; see :mod:`kvpass.kernels.cache_ops`."""
    normed = (norm_rows(query.float(), query_weight, eps), norm_rows(key.float(), key_weight, eps))
    if cos is not None and sin is not None:
        normed = (rotate_rows(normed[0], cos, sin, interleaved), rotate_rows(normed[1], cos, sin, interleaved))
    write_cache(normed[1], value, key_cache, value_cache, slot_mapping, key_format, value_format)
    return normed[0].to(query.dtype, memory_format=torch.contiguous_format, copy=True)


def norm_rows(rows: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The RMS norm of each head of ``rows [T, H, D]``; the rows themselves where no weight ``[D]`` is given."""
    if weight is None:
        return rows
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * weight.float()


def rotate_rows(rows: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first dims of ``rows [T, H, D]`` by the angles of ``cos`` and ``sin [T, Dr]``."""
    turned, rest = rows[..., : cos.shape[1]], rows[..., cos.shape[1] :]
    if interleaved:
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        other = torch.cat((-second, first), -1)
    turned = turned * cos.float().unsqueeze(1) + other * sin.float().unsqueeze(1)
    return torch.cat((turned, rest), -1)


def copy_blocks(caches: Sequence[Tensor], source: Tensor, target: Tensor) -> None:
    """``kvpass::copy_blocks``; see :mod:`kvpass.kernels.cache_ops`."""
    for cache in caches:
        blocks = cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache
        blocks.index_copy_(0, target, blocks.index_select(0, source))


def settle_blocks(caches: Sequence[Tensor], formats: Sequence[str], source: Tensor, target: Tensor) -> None:
    """``kvpass::settle_blocks``; see :mod:`kvpass.kernels.cache_ops`."""
    for cache, name in zip(caches, formats, strict=True):
        settle_cache(cache, find_format(name), source, target)


def gather_cache(
    cache: Tensor, block_tables: Tensor, seq_lens: Tensor, width: int, format: str | None = None
) -> Tensor:
    """``kvpass::gather_cache``; see :mod:`kvpass.kernels.cache_ops`."""
    form = format_of(cache, format)
    sequences, columns = block_tables.shape
    size = cache.shape[2]
    slots = torch.arange(columns * size, device=cache.device)
    ended = slots >= seq_lens[:, None]
    held = torch.where(ended.view(sequences, columns, size)[:, :, 0], 0, block_tables)
    if not cache.shape[0]:
        return cache.new_zeros(sequences, columns * size, cache.shape[1], width, dtype=torch.float32)
    if form.settles is not None:
        rows = read_blocks(cache, form, held.flatten())
    else:
        stored = cache.view(torch.uint8) if form.bits == 8 else cache
        rows = unpack_slabs(stored.index_select(0, held.flatten()).view(cache.dtype), form)
    rows = rows.view(sequences, columns, cache.shape[1], size, width).transpose(2, 3)
    return rows.flatten(1, 2).masked_fill(ended[:, :, None, None], 0.0)
