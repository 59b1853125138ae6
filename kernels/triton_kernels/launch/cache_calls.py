"""The launches of the ops that move cache rows: write, fused write, gather, copy, settle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kvpass.kernels.triton_kernels.device.settle import place_kernel, settle_kernel
from kvpass.kernels.triton_kernels.device.settled import settled_gather_kernel
from kvpass.kernels.triton_kernels.device.write import copy_kernel, gather_kernel, write_kernel
from kvpass.kernels.triton_kernels.launch.launch import Launch
from kvpass.kernels.triton_kernels.launch.stored import Stored

WRITTEN_ELEMENTS = 1024  # per program
COPIED_WORDS = 2048


@dataclass(frozen=True, eq=False)
class Rotation:
    """The query part of a fused write; see ``kvpass::norm_rotary_write``. ``out`` receives the queries."""

    query: Tensor
    out: Tensor
    query_weight: Tensor | None
    key_weight: Tensor | None
    eps: float
    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool


def lay_out_write(
    key: Tensor, value: Tensor, keys: Stored, values: Stored, slot_mapping: Tensor, rotation: Rotation | None = None
) -> Launch:
    """The launch that writes ``key [T, Hkv, D]`` and ``value [T, Hkv, Dv]`` into their caches."""
    tokens, heads, width = key.shape
    rows = max(1, WRITTEN_ELEMENTS // triton.next_power_of_2(max(width, value.shape[2])))
    parts = triton.cdiv(tokens * heads, rows)
    programs = 2 * parts if value.shape[2] or rotation is not None else parts  # values may be part of the keys
    if rotation is not None:
        programs += triton.cdiv(tokens * rotation.query.shape[1], rows)
    arguments: dict[str, Any] = {
        "key": key,
        "value": value,
        "key_cache": keys.tensor,
        "key_scales": keys.scales,
        "value_cache": values.tensor,
        "value_scales": values.scales,
        "slot_mapping": slot_mapping,
        "tokens": tokens,
        "heads": heads,
        "stride_key_token": key.stride(0),
        "stride_key_head": key.stride(1),
        "stride_value_token": value.stride(0),
        "stride_value_head": value.stride(1),
        "P": keys.block_size,
        "D": width,
        "KEY_FORMAT": keys.spelling,
        "KEY_ROW": keys.row,
        "KEY_SLAB": keys.slab,
        "DV": value.shape[2],
        "VALUE_FORMAT": values.spelling,
        "VALUE_ROW": values.row,
        "VALUE_SLAB": values.slab,
        "ROWS": rows,
        "KEY_COLUMNS": triton.next_power_of_2(keys.row),
        "VALUE_COLUMNS": max(1, triton.next_power_of_2(values.row)),
        "QUERY_COLUMNS": triton.next_power_of_2(width),
        **_describe_rotation(rotation),
    }
    return Launch(write_kernel, (programs,), arguments, stages=1)


def _describe_rotation(rotation: Rotation | None) -> dict[str, Any]:
    if rotation is None:
        absent = ("query", "out", "query_weight", "key_weight", "cos", "sin")
        numbers = {"eps": 0.0, "query_heads": 0, "stride_query_token": 0, "stride_query_head": 0}
        return {**dict.fromkeys(absent), **numbers, "ROTARY": 0, "INTERLEAVED": False}
    return {
        "query": rotation.query,
        "out": rotation.out,
        "query_weight": rotation.query_weight,
        "key_weight": rotation.key_weight,
        "cos": rotation.cos,
        "sin": rotation.sin,
        "eps": rotation.eps,
        "query_heads": rotation.query.shape[1],
        "stride_query_token": rotation.query.stride(0),
        "stride_query_head": rotation.query.stride(1),
        "ROTARY": 0 if rotation.cos is None else rotation.cos.shape[1],
        "INTERLEAVED": rotation.interleaved,
    }


def lay_out_gather(stored: Stored, block_tables: Tensor, seq_lens: Tensor, out: Tensor) -> Launch:
    """The launch that fills ``out``, float32 ``[N, W * P, Hkv, D]``."""
    grid = (block_tables.shape[0] * block_tables.shape[1], out.shape[2])
    if stored.form.settles is not None:
        assert stored.scales is not None, "a settling format has scales"
        arguments = {
            "out": out,
            "codes": stored.tensor,
            "halves": stored.scales,
            "end": stored.scales.numel(),
            "block_tables": block_tables,
            "seq_lens": seq_lens,
            "table_width": block_tables.shape[1],
            "heads": out.shape[2],
            "D": stored.width,
            "P": stored.block_size,
            "SLAB": stored.slab,
            "PARTS": 8 // stored.form.bits,
            "COLUMNS": stored.piece_a,
        }
        return Launch(settled_gather_kernel, grid, arguments, stages=1)
    arguments = {
        "out": out,
        "cache": stored.tensor,
        "scales": stored.scales,
        "block_tables": block_tables,
        "seq_lens": seq_lens,
        "table_width": block_tables.shape[1],
        "heads": out.shape[2],
        "width": stored.width,
        "P": stored.block_size,
        "FORMAT": stored.spelling,
        "ROW": stored.row,
        "SLAB": stored.slab,
        "A": triton.next_power_of_2(stored.row),
    }
    return Launch(gather_kernel, grid, arguments, stages=1)


def lay_out_copy(cache: Tensor, source: Tensor, target: Tensor) -> list[Launch]:
    """The launches that copy blocks of one tensor: all are read before any is written."""
    bytes_per_block = cache.numel() // max(1, cache.shape[0]) * cache.element_size()
    word = torch.int64 if bytes_per_block % 8 == 0 else torch.uint8
    words = bytes_per_block // word.itemsize
    blocks, between = cache.view(-1).view(word), cache.new_empty(source.shape[0] * words, dtype=word)
    grid = (source.shape[0], triton.cdiv(words, COPIED_WORDS))
    return [
        Launch(copy_kernel, grid, {**one, "words": words, "BLOCK": COPIED_WORDS}, stages=1)
        for one in (
            {"to": between, "at": blocks, "to_blocks": None, "at_blocks": source},
            {"to": blocks, "at": between, "to_blocks": target, "at_blocks": None},
        )
    ]


def lay_out_settle(stored: Stored, source: Tensor, target: Tensor) -> list[Launch]:
    """The launches that settle, widen and copy blocks of one tensor: all are read before any is written."""
    assert stored.scales is not None, "a settling format has scales"
    heads = stored.tensor.shape[1]
    between = stored.tensor.new_empty(source.shape[0] * heads * stored.block_size * stored.width * 2)
    shared = {
        "between_halves": between.view(torch.bfloat16),
        "halves": stored.scales,
        "end": stored.scales.numel(),
        "target": target,
        "heads": heads,
        "D": stored.width,
        "P": stored.block_size,
        "SLAB": stored.slab,
    }
    reading = {"between": between, "codes": stored.tensor, "source": source, "PARTS": 8 // stored.form.bits}
    grid = (source.shape[0], heads)
    return [
        Launch(settle_kernel, grid, {**shared, **reading, "COLUMNS": stored.piece_a}, stages=1),
        Launch(place_kernel, grid, shared, stages=1),
    ]
