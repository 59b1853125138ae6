"""The ops on native CPU kernels; a row of :data:`kvpass.kernels.backends.BACKENDS`.

A call is packed into the plain C struct of ``call.h`` and handed over in one piece. The memory behind every pointer is
owned by a tensor that this module holds on to until the call returns. What a tensor must look like is checked here,
what its numbers say (lengths, block ids) by the kernels before they touch anything.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvpass.errors import InputError
from kvpass.kernels.cpu import loader
from kvpass.kernels.cpu.refusals import explain_attention, explain_copy, explain_write
from kvpass.kernels.formats import FORMATS, format_of

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of tensors; the numbers are those of call.h
CODES = {name: code for code, name in enumerate(FORMATS)}
CODES_BY_DTYPE = {row.dtype: CODES[name] for name, row in FORMATS.items() if not row.scaled}

ATTENTION = struct.Struct("=21q2d20q")
WRITE = struct.Struct("=22q")
COPY = struct.Struct("=9q")


class CallMemory(threading.local):
    """One call's struct, per thread: torch releases the interpreter while a kernel runs."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(ATTENTION.size)
        self.address = ctypes.addressof(self.buffer)


MEMORY = CallMemory()


def available() -> bool:
    """Whether a native object was built and runs here."""
    return loader.current() is not None


def why_unavailable() -> str:
    """What :func:`available` found missing."""
    return loader.why_missing()


def unsupported(op: str, **arguments: Any) -> str | None:
    """Why the kernels cannot serve a call of ``op``, or None."""
    if op == "copy_blocks":
        return None if all(cache.is_contiguous() for cache in arguments["caches"]) else "a cache is not contiguous"
    for name in ("query", "key", "value"):
        tensor = arguments.get(name)
        if tensor is not None and tensor.dtype not in FLOATS:
            return f"{name} is {tensor.dtype}: permitted are torch.float32, torch.bfloat16 and torch.float16"
    for name in ("key_cache", "value_cache", "cache"):
        cache = arguments.get(name)
        if cache is None:
            continue
        if cache.dtype not in CODES_BY_DTYPE and cache.dtype is not torch.uint8:
            return f"{name} is {cache.dtype}: permitted are the formats {', '.join(FORMATS)}"
        if not cache.is_contiguous():
            return f"{name} is not contiguous"
    return None


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
    blocks, heads, size, _ = key_cache.shape
    caches = (_cache(key_cache, key_format), _cache(value_cache, value_format))
    key, value = (new if new.stride(2) == 1 else new.contiguous() for new in (key, value))
    slots = slot_mapping if slot_mapping.is_contiguous() else slot_mapping.contiguous()
    for new, cache, (_, _, dim) in ((key, key_cache, caches[0]), (value, value_cache, caches[1])):
        if new.shape[1] != cache.shape[1] or new.shape[2] != dim or new.shape[0] != slots.shape[0]:
            raise InputError(
                f"kvpass::write_cache: cannot write {tuple(new.shape)} to {slots.shape[0]} slots of a cache of "
                f"heads and dims {(cache.shape[1], dim)}"
            )
    _int64("write_cache", slot_mapping=slots)
    memory = MEMORY
    WRITE.pack_into(
        memory.buffer,
        0,
        key.data_ptr(),
        value.data_ptr(),
        FLOATS[key.dtype],
        FLOATS[value.dtype],
        key.stride(0),
        value.stride(0),
        key.stride(1),
        value.stride(1),
        *caches[0],
        *caches[1],
        slots.shape[0],
        blocks,
        heads,
        size,
        slots.data_ptr(),
        _threads(),
        0,
        0,
    )
    status = loader.current().kvpass_write(memory.address)
    if status:
        raise explain_write(status, slots, blocks * size)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    chunk: int | None = None,
    tree_mask: Tensor | None = None,
    key_format: str | None = None,
    value_format: str | None = None,
) -> Tensor:
    """``kvpass::paged_attention``; see :mod:`kvpass.kernels.attention_ops`."""
    keys, values = _cache(key_cache, key_format), _cache(value_cache, value_format)
    out = query.new_empty(query.shape[0], query.shape[1], values[2])
    features = (scale, softcap, window, slopes, sinks, bias, chunk, tree_mask)
    _attend("paged_attention", query, key_cache, keys, values, (block_tables, seq_lens, query_start), features, out)
    return out


def paged_attention_stats(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    chunk: int | None = None,
    tree_mask: Tensor | None = None,
    key_format: str | None = None,
    value_format: str | None = None,
    mass: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``kvpass::paged_attention_stats``; see :mod:`kvpass.kernels.attention_ops`."""
    op, step = "paged_attention_stats", (block_tables, seq_lens, query_start)
    keys, values = _cache(key_cache, key_format), _cache(value_cache, value_format)
    tokens, heads, _ = query.shape
    out = query.new_empty(tokens, heads, values[2])
    lse = query.new_empty(tokens, heads, dtype=torch.float32)
    slots = (len(seq_lens), key_cache.shape[1], block_tables.shape[1] * key_cache.shape[2])
    received = query.new_empty(slots if mass else (0,), dtype=torch.float32)
    features = (scale, softcap, window, slopes, sinks, bias, chunk, tree_mask)
    _attend(op, query, key_cache, keys, values, step, features, out, lse=lse, mass=received if mass else None)
    return out, lse, received


def latent_attention(
    query: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    scale: float,
    value_dim: int,
    softcap: float | None = None,
    window: int | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    chunk: int | None = None,
    format: str | None = None,
) -> Tensor:
    """``kvpass::latent_attention``; see :mod:`kvpass.kernels.attention_ops`."""
    keys = _cache(cache, format)
    if not 1 <= value_dim <= keys[2]:
        raise InputError(f"kvpass::latent_attention: value_dim={value_dim} must lie in 1 .. {keys[2]}")
    out = query.new_empty(query.shape[0], query.shape[1], value_dim)
    features = (scale, softcap, window, slopes, sinks, bias, chunk, None)
    step = (block_tables, seq_lens, query_start)
    _attend("latent_attention", query, cache, keys, (*keys[:2], value_dim), step, features, out, latent=True)
    return out


def cascade_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    shared_start: Tensor,
    shared_lens: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    chunk: int | None = None,
    key_format: str | None = None,
    value_format: str | None = None,
) -> Tensor:
    """``kvpass::cascade_attention``; see :mod:`kvpass.kernels.attention_ops`."""
    op, step = "cascade_attention", (block_tables, seq_lens, query_start)
    keys, values = _cache(key_cache, key_format), _cache(value_cache, value_format)
    if shared_start.shape[0] != shared_lens.shape[0] + 1:
        raise InputError(
            f"kvpass::{op}: shared_start has {shared_start.shape[0]} entries for {shared_lens.shape[0]} groups: "
            "one more is due"
        )
    out = query.new_empty(query.shape[0], query.shape[1], values[2])
    features = (scale, softcap, window, slopes, sinks, bias, chunk, None)
    shared = (shared_start.contiguous(), shared_lens.contiguous())
    _int64(op, shared_start=shared[0], shared_lens=shared[1])
    _attend(op, query, key_cache, keys, values, step, features, out, shared=shared)
    return out


def copy_blocks(caches: Sequence[Tensor], source: Tensor, target: Tensor) -> None:
    """``kvpass::copy_blocks``; see :mod:`kvpass.kernels.cache_ops`."""
    _int64("copy_blocks", source=source, target=target)
    source, target = source.contiguous(), target.contiguous()
    if source.shape != target.shape:
        raise InputError(f"kvpass::copy_blocks: {len(source)} source blocks for {len(target)} target blocks")
    memory = MEMORY
    for cache in caches:
        blocks = cache.shape[0]
        if not cache.numel():
            continue
        per_block = cache.numel() // blocks * cache.element_size()
        pointers = (source.data_ptr(), target.data_ptr())
        COPY.pack_into(
            memory.buffer, 0, cache.data_ptr(), per_block, blocks, *pointers, source.shape[0], _threads(), 0, 0
        )
        status = loader.current().kvpass_copy(memory.address)
        if status:
            raise explain_copy(status, source, target, blocks)


Step = tuple[Tensor, Tensor, Tensor]
CacheFields = tuple[int, int, int]  # pointer, format, numbers in a row
Features = tuple[
    float, float | None, int | None, Tensor | None, Tensor | None, Tensor | None, int | None, Tensor | None
]


def _attend(
    op: str,
    query: Tensor,
    key_cache: Tensor,
    keys: CacheFields,
    values: CacheFields,
    step: Step,
    features: Features,
    out: Tensor,
    *,
    lse: Tensor | None = None,
    mass: Tensor | None = None,
    latent: bool = False,
    shared: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Run ``kvpass_attention``, which writes ``out`` in full, and ``lse`` and ``mass`` where they are given."""
    tokens, heads, width = query.shape
    blocks, kv_heads, size, _ = key_cache.shape
    if width != keys[2] or heads % kv_heads:
        raise InputError(
            f"kvpass::{op}: query has {heads} heads of dim {width}, the cache {kv_heads} of dim {keys[2]}: the dims "
            "must be equal and the query heads a multiple of the cache's"
        )
    scale, softcap, window, slopes, sinks, bias, chunk, tree = features
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk={chunk} must be at least 1")
    tables, lens, starts = (part if part.is_contiguous() else part.contiguous() for part in step)
    _int64(op, block_tables=tables, seq_lens=lens, query_start=starts)
    sequences, columns = tables.shape
    if lens.shape[0] != sequences or starts.shape[0] != sequences + 1 or (tree is not None and len(tree) != tokens):
        raise explain_attention(op, query, key_cache, step, features, shared)
    if window is not None and window < 1:
        out.zero_()
        if lse is not None:
            lse.fill_(-torch.inf)
        if mass is not None:
            mass.zero_()
        return
    if query.stride(2) != 1:
        query = query.contiguous()
    slopes, sinks, bias = _numbers(slopes), _numbers(sinks), _numbers(bias)
    for vector in (slopes, sinks):
        if vector is not None and vector.shape != (heads,):
            raise InputError(f"kvpass::{op}: slopes and sinks hold one number per query head: ({heads},)")
    if bias is not None and (bias.dim() not in (2, 3) or bias.shape[0] not in (1, heads)):
        raise InputError(f"kvpass::{op}: bias is {tuple(bias.shape)}: permitted are [1 | {heads}, L] and [.., L, L]")
    if tree is not None:
        tree = tree.contiguous()
    memory = MEMORY
    ATTENTION.pack_into(
        memory.buffer,
        0,
        query.data_ptr(),
        FLOATS[query.dtype],
        tokens,
        query.stride(0),
        query.stride(1),
        heads,
        *keys,
        *values,
        blocks,
        kv_heads,
        size,
        tables.data_ptr(),
        columns,
        columns,
        lens.data_ptr(),
        starts.data_ptr(),
        sequences,
        scale,
        softcap or 0.0,
        window or 0,
        chunk or 0,
        0 if slopes is None else slopes.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        *((0, 0, 0, 0) if bias is None else (bias.data_ptr(), bias.shape[0], bias.shape[-1], bias.dim() == 3)),
        *((0, 0) if tree is None else (tree.data_ptr(), tree.shape[1])),
        *((0, 0, 0) if shared is None else (shared[0].data_ptr(), shared[1].data_ptr(), shared[1].shape[0])),
        out.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        0 if mass is None else mass.data_ptr(),
        _threads(),
        latent,
        0,
        0,
    )
    if loader.current().kvpass_attention(memory.address):
        raise explain_attention(op, query, key_cache, step, features, shared)


def _cache(cache: Tensor, name: str | None) -> CacheFields:
    """Pointer, format and row width of a cache tensor."""
    form = format_of(cache, name)
    return cache.data_ptr(), CODES[form.name], form.row_width(cache.shape[3])


def _numbers(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def _int64(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype is not torch.int64:
            raise InputError(f"kvpass::{op}: {name} is {tensor.dtype}: it must be torch.int64")


def _threads() -> int:
    return torch.get_num_threads()
