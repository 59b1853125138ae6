"""The attention ops on native CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpass.errors import InputError
from kvpass.kernels.cpu import loader
from kvpass.kernels.cpu.packing import (
    ATTENTION,
    CODES,
    FLOATS,
    MEMORY,
    CacheFields,
    as_numbers,
    cache_fields,
    require_int64,
)
from kvpass.kernels.cpu.refusals import explain_attention

Step = tuple[Tensor, Tensor, Tensor]
Features = tuple[
    float, float | None, int | None, Tensor | None, Tensor | None, Tensor | None, int | None, Tensor | None
]


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
    keys, values = cache_fields(key_cache, key_format), cache_fields(value_cache, value_format)
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
    keys, values = cache_fields(key_cache, key_format), cache_fields(value_cache, value_format)
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
    keys = cache_fields(cache, format)
    if not 1 <= value_dim <= keys[2]:
        raise InputError(f"kvpass::latent_attention: value_dim={value_dim} must lie in 1 .. {keys[2]}")
    out = query.new_empty(query.shape[0], query.shape[1], value_dim)
    features = (scale, softcap, window, slopes, sinks, bias, chunk, None)
    step = (block_tables, seq_lens, query_start)
    _attend("latent_attention", query, cache, keys, (*keys[:2], value_dim, keys[3]), step, features, out, latent=True)
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
    keys, values = cache_fields(key_cache, key_format), cache_fields(value_cache, value_format)
    if shared_start.shape[0] != shared_lens.shape[0] + 1:
        raise InputError(
            f"kvpass::{op}: shared_start has {shared_start.shape[0]} entries for {shared_lens.shape[0]} groups: "
            "one more is due"
        )
    out = query.new_empty(query.shape[0], query.shape[1], values[2])
    features = (scale, softcap, window, slopes, sinks, bias, chunk, None)
    shared = (shared_start.contiguous(), shared_lens.contiguous())
    require_int64(op, shared_start=shared[0], shared_lens=shared[1])
    _attend(op, query, key_cache, keys, values, step, features, out, shared=shared)
    return out


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
    if not tables.dtype is lens.dtype is starts.dtype is torch.int64:
        require_int64(op, block_tables=tables, seq_lens=lens, query_start=starts)
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
    slopes, sinks, bias = as_numbers(slopes), as_numbers(sinks), as_numbers(bias)
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
        torch.get_num_threads(),
        latent,
        0,
        0,
    )
    if loader.current().kvpass_attention(memory.address):
        wide = None
        if keys[1] == CODES["k4"]:
            wide = min((end - start) // (2 * kv_heads * size * dim) for start, _, dim, end in (keys, values))
        raise explain_attention(op, query, key_cache, step, features, shared, wide)
