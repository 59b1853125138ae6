"""Attention over caches of k4v2, whose blocks are settled or wide: see :mod:`kvpass.kernels.formats.settling`.

A tile of keys lies in one block, so its kind is one branch per tile. Rows are read in *parts*, the halves of a key and
the quarters of a value, which are apart in the bytes of a settled row; dots are float32. Everything else is shared with
:mod:`kvpass.kernels.triton_kernels.device.attention`: the schedule, the scores, the partial sums and their merge.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvpass.kernels.triton_kernels.device.attention import store_columns
from kvpass.kernels.triton_kernels.device.schedule import (
    find_seen_keys,
    find_stretch,
    load_keys_range,
    load_tile,
    place_rows,
)
from kvpass.kernels.triton_kernels.device.scores import add_scores, close_rows, finish_scores, weigh_keys


@triton.jit
def load_part(
    codes, halves, end, block, head, heads, offsets, there, cols, PART: tl.constexpr, PARTS: tl.constexpr,
    D: tl.constexpr, P: tl.constexpr, SLAB: tl.constexpr,
):  # fmt: skip
    """Part PART of rows ``offsets`` of a block, float32 ``[BLOCK_N, COLUMNS]``, without the scales of its tokens.

    ``codes`` is the cache in bytes and ``halves`` in bfloat16, ``end`` its length in those.
    """
    width: tl.constexpr = D // PARTS
    bits: tl.constexpr = 8 // PARTS
    middle: tl.constexpr = 8.0 if PARTS == 2 else 1.5
    inside = there[:, None] & (cols < width)[None, :]
    if block < 0:
        places = end + (((block * heads + head) * P + offsets) * D + PART * width)[:, None] + cols[None, :]
        numbers = tl.load(halves + places, mask=inside, other=0.0).to(tl.float32)
    else:
        slab = (block * heads + head) * SLAB
        raw = tl.load(codes + slab + (offsets * width)[:, None] + cols[None, :], mask=inside, other=0).to(tl.int32)
        numbers = ((raw >> (bits * PART)) & ((1 << bits) - 1)).to(tl.float32) - middle
        if PARTS == 2:
            groups = slab + P * width + (offsets // 16 * D + PART * width)[:, None] + cols[None, :]
            units = tl.load(codes + groups, mask=inside, other=255).to(tl.int32)
            numbers = numbers * ((units + 761) << 20).to(tl.float32, bitcast=True)
    return numbers


@triton.jit
def load_token_scales(halves, block, head, heads, offsets, there, P: tl.constexpr, SLAB: tl.constexpr):
    """The scales of a block's tokens, float32 ``[BLOCK_N]``: 1 in a wide block."""
    scales = there.to(tl.float32)
    if block >= 0:
        places = ((block * heads + head) * SLAB + SLAB) // 2 - P + offsets
        scales = tl.load(halves + places, mask=there, other=0.0).to(tl.float32)
    return scales


@triton.jit
def load_query_part(
    query, token, row_head, valid, stride_token, stride_head, cols, PART: tl.constexpr, D: tl.constexpr
):
    """Half PART of the query's rows, float32; zeros past it."""
    places = token.to(tl.int64)[:, None] * stride_token + (row_head * stride_head)[:, None]
    inside = valid[:, None] & (cols < D // 2)[None, :]
    return tl.load(query + places + PART * (D // 2) + cols[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def multiply_settled_keys(
    q0, q1, codes, halves, end, block, head, heads, offsets, there, cols, D: tl.constexpr, P: tl.constexpr,
    SLAB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products ``[BLOCK_M, BLOCK_N]`` of the query with a block's keys, without the scales of its tokens."""
    keys = load_part(codes, halves, end, block, head, heads, offsets, there, cols, 0, 2, D, P, SLAB)
    products = tl.dot(q0, tl.trans(keys), input_precision=PRECISION)
    keys = load_part(codes, halves, end, block, head, heads, offsets, there, cols, 1, 2, D, P, SLAB)
    return tl.dot(q1, tl.trans(keys), products, input_precision=PRECISION)


@triton.jit
def store_quarters(out, rows, acc0, acc1, acc2, acc3, factor, valid, cols, DV: tl.constexpr):
    """Store the sums of the values' quarters, times ``factor``, in ``[rows, DV]``."""
    width: tl.constexpr = DV // 4
    dims = tl.where(cols < width, cols, DV)
    store_columns(out, rows, dims, acc0 * factor[:, None], valid, DV)
    store_columns(out, rows, dims + width, acc1 * factor[:, None], valid, DV)
    store_columns(out, rows, dims + 2 * width, acc2 * factor[:, None], valid, DV)
    store_columns(out, rows, dims + 3 * width, acc3 * factor[:, None], valid, DV)


@triton.jit
def settled_attention_kernel(
    out, lse, partial, partial_sums, query, key_codes, key_halves, key_end, value_codes, value_halves, value_end,
    block_tables, seq_lens, query_start, shared_start, schedule, positions, slopes, sinks, bias, tree_mask, scale,
    softcap, window, chunk, table_width, tiles, heads, stride_token, stride_head, bias_rows, bias_length, tree_width,
    GROUP: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, KEY_SLAB: tl.constexpr,
    KEY_COLUMNS: tl.constexpr, VALUE_SLAB: tl.constexpr, VALUE_COLUMNS: tl.constexpr, PAIRS: tl.constexpr,
    PART: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program's stretch of the schedule; BLOCK_N divides P."""
    unit, end, units, head, tile = find_stretch(schedule, heads)
    unit_start = schedule + 4
    program = tl.program_id(0)
    cols = tl.arange(0, KEY_COLUMNS)
    value_cols = tl.arange(0, VALUE_COLUMNS)

    while unit < end:
        tile_start = tl.load(unit_start + tile)
        tile_stop = tl.load(unit_start + tile + 1)
        from_unit = unit - head * units
        to_unit = tl.minimum(tile_stop, end - head * units)
        member, start, past, token, row_head, valid, position = load_tile(
            schedule, tiles, tile, head, query_start, seq_lens, shared_start, positions, GROUP, PART, BLOCK_M
        )
        first_key, stop_key = load_keys_range(schedule, tiles, tile)

        q0 = load_query_part(query, token, row_head, valid, stride_token, stride_head, cols, 0, D)
        q1 = load_query_part(query, token, row_head, valid, stride_token, stride_head, cols, 1, D)
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc0 = tl.zeros((BLOCK_M, VALUE_COLUMNS), tl.float32)
        acc1 = tl.zeros((BLOCK_M, VALUE_COLUMNS), tl.float32)
        acc2 = tl.zeros((BLOCK_M, VALUE_COLUMNS), tl.float32)
        acc3 = tl.zeros((BLOCK_M, VALUE_COLUMNS), tl.float32)
        table = block_tables + member * table_width
        origin = (first_key // BLOCK_N - tile_start) * BLOCK_N
        for u in range(from_unit, to_unit):
            first = origin + u * BLOCK_N
            keys = first + tl.arange(0, BLOCK_N)
            there = (keys >= first_key) & (keys < stop_key)
            block = tl.load(table + first // P, mask=(first < stop_key), other=0).to(tl.int64)
            offsets = keys % P
            products = multiply_settled_keys(
                q0, q1, key_codes, key_halves, key_end, block, head, heads, offsets, there, cols, D, P, KEY_SLAB,
                PRECISION,
            )  # fmt: skip
            key_scale = load_token_scales(key_halves, block, head, heads, offsets, there, P, KEY_SLAB)
            seen = there[None, :] & valid[:, None]
            scores = finish_scores(
                products * scale, seen, token, row_head, position, keys, start, past, key_scale, None, None, softcap,
                window, chunk, slopes, bias, bias_rows, bias_length, tree_mask, tree_width, positions, PAIRS,
                PART != "prefix", False,
            )  # fmt: skip
            weights, shrink, largest, total = add_scores(scores, largest, total)
            shrink = shrink[:, None]
            weights *= load_token_scales(value_halves, block, head, heads, offsets, there, P, VALUE_SLAB)[None, :]
            values = load_part(
                value_codes, value_halves, value_end, block, head, heads, offsets, there, value_cols, 0, 4, DV, P,
                VALUE_SLAB,
            )  # fmt: skip
            acc0 = tl.dot(weights, values, acc0 * shrink, input_precision=PRECISION)
            values = load_part(
                value_codes, value_halves, value_end, block, head, heads, offsets, there, value_cols, 1, 4, DV, P,
                VALUE_SLAB,
            )  # fmt: skip
            acc1 = tl.dot(weights, values, acc1 * shrink, input_precision=PRECISION)
            values = load_part(
                value_codes, value_halves, value_end, block, head, heads, offsets, there, value_cols, 2, 4, DV, P,
                VALUE_SLAB,
            )  # fmt: skip
            acc2 = tl.dot(weights, values, acc2 * shrink, input_precision=PRECISION)
            values = load_part(
                value_codes, value_halves, value_end, block, head, heads, offsets, there, value_cols, 3, 4, DV, P,
                VALUE_SLAB,
            )  # fmt: skip
            acc3 = tl.dot(weights, values, acc3 * shrink, input_precision=PRECISION)

        if (from_unit == tile_start) & (to_unit == tile_stop):
            factor, row_lse = close_rows(largest, total, sinks, row_head, valid)
            place = token * (heads * GROUP) + row_head
            store_quarters(out, place, acc0, acc1, acc2, acc3, factor, valid, value_cols, DV)
            if lse is not None:
                tl.store(lse + place, row_lse, mask=valid)
        else:
            place = (2 * program + (from_unit == tile_start).to(tl.int32)) * BLOCK_M + tl.arange(0, BLOCK_M)
            one = tl.full((BLOCK_M,), 1.0, tl.float32)
            store_quarters(partial, place, acc0, acc1, acc2, acc3, one, valid, value_cols, DV)
            tl.store(partial_sums + place * 2, largest, mask=valid)
            tl.store(partial_sums + place * 2 + 1, total, mask=valid)

        unit += to_unit - from_unit
        tile += 1
        if to_unit == units:
            tile = 0
            head += 1


@triton.jit
def settled_mass_kernel(
    mass, lse, query, key_codes, key_halves, key_end, block_tables, seq_lens, query_start, positions, slopes, bias,
    tree_mask, scale, softcap, window, chunk, table_width, heads, stride_token, stride_head, bias_rows, bias_length,
    tree_width, GROUP: tl.constexpr, P: tl.constexpr, D: tl.constexpr, KEY_SLAB: tl.constexpr,
    KEY_COLUMNS: tl.constexpr, PAIRS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Mass of BLOCK_N slots of one sequence and KV head, as :mod:`kvpass.kernels.triton_kernels.device.mass` has it."""
    n = tl.program_id(0)
    head = tl.program_id(1)
    first_key = tl.program_id(2) * BLOCK_N
    keys = first_key + tl.arange(0, BLOCK_N)
    start, count, past, oldest, stop = find_seen_keys(n, query_start, seq_lens, window, chunk, tree_mask)
    there = (keys < stop) & (keys >= oldest)
    followed = (first_key < stop) & (first_key + BLOCK_N > oldest)
    block = tl.load(block_tables + n.to(tl.int64) * table_width + first_key // P, mask=followed, other=0).to(tl.int64)
    offsets = keys % P
    cols = tl.arange(0, KEY_COLUMNS)
    key_scale = load_token_scales(key_halves, block, head, heads, offsets, there, P, KEY_SLAB)
    received = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, count * GROUP, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        token, row_head, valid, position = place_rows(row, head, start, count, past, positions, GROUP)
        q0 = load_query_part(query, token, row_head, valid, stride_token, stride_head, cols, 0, D)
        q1 = load_query_part(query, token, row_head, valid, stride_token, stride_head, cols, 1, D)
        products = multiply_settled_keys(
            q0, q1, key_codes, key_halves, key_end, block, head, heads, offsets, there, cols, D, P, KEY_SLAB, PRECISION
        )
        seen = there[None, :] & valid[:, None]
        scores = finish_scores(
            products * scale, seen, token, row_head, position, keys, start, past, key_scale, None, None, softcap,
            window, chunk, slopes, bias, bias_rows, bias_length, tree_mask, tree_width, positions, PAIRS, True, False,
        )  # fmt: skip
        received += weigh_keys(scores, lse, token * (heads * GROUP) + row_head, valid)
    place = (n * heads + head).to(tl.int64) * (table_width * P) + keys
    tl.store(mass + place, received, mask=keys < table_width * P)


@triton.jit
def settled_gather_kernel(
    out, codes, halves, end, block_tables, seq_lens, table_width, heads, D: tl.constexpr, P: tl.constexpr,
    SLAB: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One block of one sequence and head, dequantised into ``out [N, W * P, Hkv, D]``; zeros past the end."""
    n = tl.program_id(0) // table_width
    column = tl.program_id(0) - n * table_width
    head = tl.program_id(1)
    offsets = tl.arange(0, P)
    keys = column * P + offsets
    length = tl.load(seq_lens + n)
    there = keys < length
    place = n.to(tl.int64) * table_width + column
    block = tl.load(block_tables + place, mask=column * P < length, other=0).to(tl.int64)
    scales = load_token_scales(halves, block, head, heads, offsets, there, P, SLAB)
    cols = tl.arange(0, COLUMNS)
    rows = (n.to(tl.int64) * table_width * P + keys) * heads + head
    inside = (cols < D // PARTS)[None, :] & (offsets >= 0)[:, None]
    for part in tl.static_range(PARTS):
        x = load_part(codes, halves, end, block, head, heads, offsets, there, cols, part, PARTS, D, P, SLAB)
        x = tl.where(there[:, None], x * scales[:, None], 0.0)
        tl.store(out + (rows * D + part * (D // PARTS))[:, None] + cols[None, :], x, mask=inside)
