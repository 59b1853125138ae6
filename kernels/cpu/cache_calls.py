"""The ops that fill, move and read back caches, on native CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpass.errors import InputError
from kvpass.kernels.cpu import loader
from kvpass.kernels.cpu.packing import (
    COPY,
    FLOATS,
    GATHER,
    MEMORY,
    SETTLE,
    WRITE,
    as_numbers,
    cache_fields,
    require_int64,
)
from kvpass.kernels.cpu.refusals import explain_copy, explain_gather, explain_settle, explain_write
from kvpass.kernels.formats.cache_formats import find_format
from kvpass.kernels.formats.settling import open_for_write, read_blocks, wide_view
from kvpass.kernels.index_checks import count_wide_blocks

# Of a write: count of query heads, their result, weights of keys and queries, eps, cos, sin, width, interleaved.
NOTHING_BEFORE = (0, 0, 0, 0, 0.0, 0, 0, 0, 0)


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
    caches = ((key_cache, key_format), (value_cache, value_format))
    _write("write_cache", (_with_dense_rows(key), _with_dense_rows(value), None), caches, slot_mapping, NOTHING_BEFORE)


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
    op, (tokens, heads, width) = "norm_rotary_write", query.shape
    weights = (as_numbers(key_weight), as_numbers(query_weight))
    angles = (as_numbers(cos), as_numbers(sin))
    rotary = 0 if angles[0] is None else angles[0].shape[1]
    shapes = {None if angle is None else tuple(angle.shape) for angle in angles}
    fitting = shapes in ({None}, {(tokens, rotary)}) and key.shape[0] == tokens and key.shape[2] == width
    fitting &= all(weight is None or weight.numel() == width for weight in weights)
    if not fitting or rotary % 2 or rotary > width:
        raise InputError(
            f"kvpass::{op}: for queries {tuple(query.shape)}, keys must be [{tokens}, .., {width}], norm weights "
            f"[{width}], and cos and sin both [{tokens}, Dr] with an even Dr of at most {width}, or both None"
        )
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in (*weights, *angles)]
    before = (heads, out.data_ptr(), *pointers[:2], eps, *pointers[2:], rotary, interleaved)
    new = (_with_dense_rows(key), _with_dense_rows(value), _with_dense_rows(query))
    _write(op, new, ((key_cache, key_format), (value_cache, value_format)), slot_mapping, before)
    return out


def _write(
    op: str,
    new: tuple[Tensor, Tensor, Tensor | None],
    caches: tuple[tuple[Tensor, str | None], tuple[Tensor, str | None]],
    slots: Tensor,
    before: tuple[float, ...],
) -> None:
    """Run ``kvpass_write`` for new keys and values, and queries where there is something to do before."""
    (key_cache, key_format), (value_cache, _) = caches
    shift = 0
    if key_format == "k4":
        key_cache, value_cache, slots = open_for_write(key_cache, value_cache, slots)
        caches, shift = ((key_cache, None), (value_cache, None)), len(key_cache) * key_cache.shape[2]
    blocks, heads, size, _ = key_cache.shape
    fields = [cache_fields(cache, name) for cache, name in caches]
    key, value = new[:2]
    slots = slots if slots.is_contiguous() else slots.contiguous()
    for part, cache, (_, _, dim, _) in ((key, key_cache, fields[0]), (value, value_cache, fields[1])):
        if part.shape[1] != cache.shape[1] or part.shape[2] != dim or part.shape[0] != slots.shape[0]:
            raise InputError(
                f"kvpass::{op}: cannot write {tuple(part.shape)} to {slots.shape[0]} slots of a cache of "
                f"heads and dims {(cache.shape[1], dim)}"
            )
    require_int64(op, slot_mapping=slots)
    rows = (key, value, key if new[2] is None else new[2])
    memory = MEMORY
    WRITE.pack_into(
        memory.buffer,
        0,
        *(each.data_ptr() for each in rows),
        *(FLOATS[each.dtype] for each in rows),
        *(each.stride(0) for each in rows),
        *(each.stride(1) for each in rows),
        *fields[0],
        *fields[1],
        slots.shape[0],
        blocks,
        heads,
        size,
        slots.data_ptr(),
        *before,
        torch.get_num_threads(),
        0,
        0,
    )
    status = loader.current().kvpass_write(memory.address)
    if status:
        raise explain_write(op, status, slots, blocks * size, shift)


def _with_dense_rows(new: Tensor) -> Tensor:
    return new if new.stride(2) == 1 else new.contiguous()


def gather_cache(
    cache: Tensor, block_tables: Tensor, seq_lens: Tensor, width: int, format: str | None = None
) -> Tensor:
    """``kvpass::gather_cache``; see :mod:`kvpass.kernels.cache_ops`."""
    blocks, heads, size, _ = cache.shape
    sequences, columns = block_tables.shape
    fields = cache_fields(cache, format)
    if fields[2] != width or seq_lens.shape[0] != sequences:
        raise InputError(
            f"kvpass::gather_cache: width={width} and {seq_lens.shape[0]} seq_lens were asked of rows of {fields[2]} "
            f"numbers and {sequences} rows of block_tables: they must be equal"
        )
    tables, lens = block_tables.contiguous(), seq_lens.contiguous()
    require_int64("gather_cache", block_tables=tables, seq_lens=lens)
    out = cache.new_empty(sequences, columns * size, heads, width, dtype=torch.float32)
    memory, threads = MEMORY, torch.get_num_threads()
    step = (tables.data_ptr(), columns, lens.data_ptr(), sequences)
    GATHER.pack_into(memory.buffer, 0, *fields, blocks, heads, size, *step, out.data_ptr(), threads, 0, 0)
    status = loader.current().kvpass_gather(memory.address)
    if status:
        wide = count_wide_blocks({"cache": cache, "format": format}) or 0
        raise explain_gather(status, tables, lens, range(-wide, blocks), size)
    return out


def settle_blocks(caches: Sequence[Tensor], formats: Sequence[str], source: Tensor, target: Tensor) -> None:
    """``kvpass::settle_blocks``; see :mod:`kvpass.kernels.cache_ops`."""
    require_int64("settle_blocks", source=source, target=target)
    quantised = (source < 0) & (target >= 0)
    if quantised.all():
        for cache, name in zip(caches, formats, strict=True):
            _settle(cache, name, source.contiguous(), target.contiguous())
        return
    moved, kept, widened = (source >= 0) & (target >= 0), (source < 0) & (target < 0), (source >= 0) & (target < 0)
    for cache, name in zip(caches, formats, strict=True):  # all is read before it is written
        wide = wide_view(cache, find_format(name))
        rows = read_blocks(cache, find_format(name), source[widened]).to(wide.dtype)
        copy_blocks([cache], source[moved], target[moved])
        _settle(cache, name, source[quantised], target[quantised])
        copy_blocks([wide], source[kept] + len(wide), target[kept] + len(wide))
        wide.index_copy_(0, target[widened] + len(wide), rows)


def _settle(cache: Tensor, name: str, source: Tensor, target: Tensor) -> None:
    """Run ``kvpass_settle``: from wide blocks to settled ones."""
    if not len(source):
        return
    blocks, heads, size, _ = cache.shape
    wide, memory = len(wide_view(cache, find_format(name))), MEMORY
    pointers = (source.data_ptr(), target.data_ptr(), len(source), torch.get_num_threads())
    SETTLE.pack_into(memory.buffer, 0, *cache_fields(cache, name), blocks, wide, heads, size, *pointers, 0, 0)
    status = loader.current().kvpass_settle(memory.address)
    if status:
        raise explain_settle(status, source, target, blocks, wide)


def copy_blocks(caches: Sequence[Tensor], source: Tensor, target: Tensor) -> None:
    """``kvpass::copy_blocks``; see :mod:`kvpass.kernels.cache_ops`."""
    require_int64("copy_blocks", source=source, target=target)
    source, target = source.contiguous(), target.contiguous()
    if source.shape != target.shape:
        raise InputError(f"kvpass::copy_blocks: {len(source)} source blocks for {len(target)} target blocks")
    memory, threads = MEMORY, torch.get_num_threads()
    for cache in caches:
        blocks = cache.shape[0]
        if not cache.numel():
            continue
        per_block = cache.numel() // blocks * cache.element_size()
        pointers = (source.data_ptr(), target.data_ptr())
        COPY.pack_into(memory.buffer, 0, cache.data_ptr(), per_block, blocks, *pointers, source.shape[0], threads, 0, 0)
        status = loader.current().kvpass_copy(memory.address)
        if status:
            raise explain_copy(status, source, target, blocks)
