"""Split-KV attention over paged caches: decode, prefill, tree, latent and shared prefix are one kernel.

The query heads that share a KV head are packed, with the tokens of a sequence, into the rows of the dots, so that each
key and value is read once for all of them. Programs take equal stretches of the schedule; see
:mod:`kvpass.kernels.triton_kernels.device.schedule`. A tile that one program does alone is written at once. Of the
others each program leaves a partial sum, at most two per program, and :func:`merge_kernel` adds them up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvpass.kernels.triton_kernels.device.schedule import find_step_rows, find_stretch, load_keys_range, load_tile
from kvpass.kernels.triton_kernels.device.scores import LOG2E, add_scores, close_rows, finish_scores, sum_query
from kvpass.kernels.triton_kernels.device.tiles import (
    find_slabs,
    load_rows,
    load_scales,
    set_dims,
    split_tails,
    unpack,
)


@triton.jit
def load_query(
    query, tokens, heads, valid, stride_token, stride_head, INDEX: tl.constexpr, FORMAT: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, ROW: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The query's rows ``[BLOCK_M, columns]`` in the dims of a set of the keys; zeros past row and width."""
    words: tl.constexpr = FORMAT == "int8" or FORMAT == "int4"
    piece: tl.constexpr = B if INDEX % 2 and FORMAT != "int4" else A
    dims = set_dims(tl.arange(0, 2 * piece if words else piece), INDEX, FORMAT, A, ROW)
    places = tokens.to(tl.int64)[:, None] * stride_token + (heads * stride_head)[:, None] + dims[None, :]
    return tl.load(query + places, mask=valid[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def load_query_sets(
    query, tokens, heads, valid, stride_token, stride_head, FORMAT: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ROW: tl.constexpr, D: tl.constexpr, DOT: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """The query in the dims of the keys' sets, those that there are, in ``DOT``; and what to multiply products by.

    NORMED: rows are divided by the power of two of their largest magnitude, and keep the bits of bfloat16 in float16.
    """
    nibbles: tl.constexpr = FORMAT == "int4"
    words: tl.constexpr = FORMAT == "int8" or nibbles
    q0 = load_query(query, tokens, heads, valid, stride_token, stride_head, 0, FORMAT, A, B, ROW, D)
    q1 = q0
    q2 = q0
    q3 = q0
    if nibbles or B:
        q1 = load_query(query, tokens, heads, valid, stride_token, stride_head, 1, FORMAT, A, B, ROW, D)
    if words:
        q2 = load_query(query, tokens, heads, valid, stride_token, stride_head, 2, FORMAT, A, B, ROW, D)
    if words and (nibbles or B):
        q3 = load_query(query, tokens, heads, valid, stride_token, stride_head, 3, FORMAT, A, B, ROW, D)
    if NORMED:
        peak = tl.max(tl.abs(q0.to(tl.float32)), 1)
        peak = tl.maximum(peak, tl.max(tl.abs(q1.to(tl.float32)), 1))
        peak = tl.maximum(peak, tl.max(tl.abs(q2.to(tl.float32)), 1))
        peak = tl.maximum(peak, tl.max(tl.abs(q3.to(tl.float32)), 1))
        exponent = tl.maximum(peak, 1e-30).to(tl.int32, bitcast=True) & 0x7F800000
        peak = exponent.to(tl.float32, bitcast=True)
        q0 = q0.to(tl.float32) / peak[:, None]
        q1 = q1.to(tl.float32) / peak[:, None]
        q2 = q2.to(tl.float32) / peak[:, None]
        q3 = q3.to(tl.float32) / peak[:, None]
        return q0.to(DOT), q1.to(DOT), q2.to(DOT), q3.to(DOT), peak
    else:
        return q0.to(DOT), q1.to(DOT), q2.to(DOT), q3.to(DOT), valid.to(tl.float32)


@triton.jit
def multiply_keys(
    q0, q1, q2, q3, raw, raw_b, FORMAT: tl.constexpr, B: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr
):
    """Products ``[BLOCK_M, BLOCK_N]`` of the query with keys as stored, over all sets of dims."""
    nibbles: tl.constexpr = FORMAT == "int4"
    words: tl.constexpr = FORMAT == "int8" or nibbles
    products = tl.dot(q0, tl.trans(unpack(raw, 0, FORMAT, DOT)), input_precision=PRECISION)
    if nibbles or B:
        k1 = unpack(raw if nibbles else raw_b, 1, FORMAT, DOT)
        products = tl.dot(q1, tl.trans(k1), products, input_precision=PRECISION)
    if words:
        products = tl.dot(q2, tl.trans(unpack(raw, 2, FORMAT, DOT)), products, input_precision=PRECISION)
    if words and (nibbles or B):
        k3 = unpack(raw if nibbles else raw_b, 3, FORMAT, DOT)
        products = tl.dot(q3, tl.trans(k3), products, input_precision=PRECISION)
    return products


@triton.jit
def add_values(
    acc0, acc1, acc2, acc3, shrink, weights, raw, raw_b, FORMAT: tl.constexpr, B: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums over values, set by set, times ``shrink`` and with a tile more."""
    nibbles: tl.constexpr = FORMAT == "int4"
    words: tl.constexpr = FORMAT == "int8" or nibbles
    weights = weights.to(DOT)
    acc0 = tl.dot(weights, unpack(raw, 0, FORMAT, DOT), acc0 * shrink[:, None], input_precision=PRECISION)
    if nibbles or B:
        v1 = unpack(raw if nibbles else raw_b, 1, FORMAT, DOT)
        acc1 = tl.dot(weights, v1, acc1 * shrink[:, None], input_precision=PRECISION)
    if words:
        v2 = unpack(raw, 2, FORMAT, DOT)
        acc2 = tl.dot(weights, v2, acc2 * shrink[:, None], input_precision=PRECISION)
    if words and (nibbles or B):
        v3 = unpack(raw if nibbles else raw_b, 3, FORMAT, DOT)
        acc3 = tl.dot(weights, v3, acc3 * shrink[:, None], input_precision=PRECISION)
    return acc0, acc1, acc2, acc3


@triton.jit
def store_columns(out, rows, dims, value, valid, WIDTH: tl.constexpr):
    places = rows.to(tl.int64)[:, None] * WIDTH + dims[None, :]
    tl.store(out + places, value.to(out.dtype.element_ty), mask=valid[:, None] & (dims < WIDTH)[None, :])


@triton.jit
def store_sets(
    out, rows, acc0, acc1, acc2, acc3, factor, added, valid,
    FORMAT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROW: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store the sums of all sets, times ``factor`` and plus ``added``, in ``[rows, WIDTH]``."""
    nibbles: tl.constexpr = FORMAT == "int4"
    words: tl.constexpr = FORMAT == "int8" or nibbles
    dims = set_dims(tl.arange(0, acc0.shape[1]), 0, FORMAT, A, ROW)
    store_columns(out, rows, dims, acc0 * factor[:, None] + added[:, None], valid, WIDTH)
    if nibbles or B:
        dims = set_dims(tl.arange(0, acc1.shape[1]), 1, FORMAT, A, ROW)
        store_columns(out, rows, dims, acc1 * factor[:, None] + added[:, None], valid, WIDTH)
    if words:
        dims = set_dims(tl.arange(0, acc2.shape[1]), 2, FORMAT, A, ROW)
        store_columns(out, rows, dims, acc2 * factor[:, None] + added[:, None], valid, WIDTH)
    if words and (nibbles or B):
        dims = set_dims(tl.arange(0, acc3.shape[1]), 3, FORMAT, A, ROW)
        store_columns(out, rows, dims, acc3 * factor[:, None] + added[:, None], valid, WIDTH)


@triton.jit
def attention_kernel(
    out,
    lse,
    partial,
    partial_sums,
    query,
    key_cache,
    key_scales,
    value_cache,
    value_scales,
    block_tables,
    seq_lens,
    query_start,
    shared_start,
    schedule,
    positions,
    slopes,
    sinks,
    bias,
    tree_mask,
    scale,
    softcap,
    window,
    chunk,
    table_width,
    tiles,
    heads,
    stride_token,
    stride_head,
    bias_rows,
    bias_length,
    tree_width,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    KEY_FORMAT: tl.constexpr,
    KEY_ROW: tl.constexpr,
    KEY_SLAB: tl.constexpr,
    KEY_A: tl.constexpr,
    KEY_B: tl.constexpr,
    VALUE_FORMAT: tl.constexpr,
    VALUE_ROW: tl.constexpr,
    VALUE_SLAB: tl.constexpr,
    VALUE_A: tl.constexpr,
    VALUE_B: tl.constexpr,
    LATENT: tl.constexpr,
    PAIRS: tl.constexpr,
    PART: tl.constexpr,
    DOT: tl.constexpr,
    NORMED: tl.constexpr,
    VALUE_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program's stretch of the schedule.

    ``X_ROW`` is the stored elements of a row (words for int8 and int4), ``X_SLAB`` those of a slab; ``X_A`` and ``X_B``
    are the widths of the pieces. LATENT: the values are the first DV elements of the keys' rows.
    """
    key_scaled: tl.constexpr = KEY_FORMAT == "int8" or KEY_FORMAT == "int4"
    value_scaled: tl.constexpr = VALUE_FORMAT == "int8" or VALUE_FORMAT == "int4"
    # Columns of the sets of sums; those that a format does not have are one wide, and dropped by the compiler.
    value_a: tl.constexpr = 2 * VALUE_A if value_scaled else VALUE_A
    value_b: tl.constexpr = value_a if VALUE_FORMAT == "int4" else (2 * VALUE_B if value_scaled else VALUE_B)
    plain: tl.constexpr = softcap is None and slopes is None and bias is None
    if plain:
        scale = scale * LOG2E
    unit, end, units, head, tile = find_stretch(schedule, heads)
    unit_start = schedule + 4
    program = tl.program_id(0)

    while unit < end:
        tile_start = tl.load(unit_start + tile)
        tile_stop = tl.load(unit_start + tile + 1)
        from_unit = unit - head * units
        to_unit = tl.minimum(tile_stop, end - head * units)
        member, start, past, token, row_head, valid, position = load_tile(
            schedule, tiles, tile, head, query_start, seq_lens, shared_start, positions, GROUP, PART, BLOCK_M
        )
        first_key, stop_key = load_keys_range(schedule, tiles, tile)

        q0, q1, q2, q3, peak = load_query_sets(
            query, token, row_head, valid, stride_token, stride_head, KEY_FORMAT, KEY_A, KEY_B, KEY_ROW, D, DOT, NORMED
        )
        row_scale = scale * peak if NORMED else scale + tl.zeros((BLOCK_M,), tl.float32)
        row_total = None
        if KEY_FORMAT == "int4":
            row_total = sum_query(q0, q1, q2, q3) * row_scale
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc0 = tl.zeros((BLOCK_M, value_a), tl.float32)
        acc1 = tl.zeros((BLOCK_M, value_b if value_b else 1), tl.float32)
        acc2 = tl.zeros((BLOCK_M, value_a if value_scaled else 1), tl.float32)
        acc3 = tl.zeros((BLOCK_M, value_b if value_scaled and value_b else 1), tl.float32)
        acc_shift = tl.zeros((BLOCK_M,), tl.float32)  # what the offsets of values add to all dims
        value_unit = 1e-30  # largest scale of a value so far: relative to it, weights stay in the range of float16
        table = block_tables + member * table_width
        origin = (first_key // BLOCK_N - tile_start) * BLOCK_N
        for u in range(from_unit, to_unit):
            keys = origin + u * BLOCK_N + tl.arange(0, BLOCK_N)
            there = (keys >= first_key) & (keys < stop_key)
            slabs = find_slabs(table, keys, there, head, heads, P, BLOCK_N)
            offsets = keys % P
            raw = load_rows(key_cache, slabs, offsets, there, tl.arange(0, KEY_A), KEY_ROW, KEY_SLAB)
            raw_b = raw
            if KEY_B:
                cols = KEY_A + tl.arange(0, KEY_B)
                raw_b = load_rows(key_cache, slabs, offsets, there, cols, KEY_ROW, KEY_SLAB)
            products = multiply_keys(q0, q1, q2, q3, raw, raw_b, KEY_FORMAT, KEY_B, DOT, PRECISION)
            key_scale = None
            key_offset = None
            if key_scaled:
                key_tail = load_scales(key_scales, slabs, offsets, there, P, KEY_ROW, KEY_SLAB)
                key_scale = key_tail
            if KEY_FORMAT == "int4":
                key_scale, key_offset = split_tails(key_tail)
            seen = there[None, :] & valid[:, None]
            scores = finish_scores(
                products * row_scale[:, None], seen, token, row_head, position, keys, start, past, key_scale,
                key_offset, row_total, softcap, window, chunk, slopes, bias, bias_rows, bias_length, tree_mask,
                tree_width, positions, PAIRS, PART != "prefix", plain,
            )  # fmt: skip
            weights, shrink, largest, total = add_scores(scores, largest, total)

            if not LATENT:
                raw = load_rows(value_cache, slabs, offsets, there, tl.arange(0, VALUE_A), VALUE_ROW, VALUE_SLAB)
                if VALUE_B:
                    cols = VALUE_A + tl.arange(0, VALUE_B)
                    raw_b = load_rows(value_cache, slabs, offsets, there, cols, VALUE_ROW, VALUE_SLAB)
            if value_scaled:
                if LATENT:
                    value_scale = key_tail
                else:
                    value_scale = load_scales(value_scales, slabs, offsets, there, P, VALUE_ROW, VALUE_SLAB)
                if VALUE_FORMAT == "int4":
                    value_scale, value_offset = split_tails(value_scale)
                    acc_shift = acc_shift * shrink + tl.sum(weights * value_offset[None, :], 1)
                higher_unit = tl.maximum(value_unit, tl.max(tl.abs(value_scale), 0))
                inverse = 1.0 / higher_unit
                weights = weights * (value_scale * inverse)[None, :]
                shrink = shrink * (value_unit * inverse)
                value_unit = higher_unit
            acc0, acc1, acc2, acc3 = add_values(
                acc0, acc1, acc2, acc3, shrink, weights, raw, raw_b, VALUE_FORMAT, VALUE_B, VALUE_DOT, PRECISION
            )

        if (from_unit == tile_start) & (to_unit == tile_stop):
            factor, row_lse = close_rows(largest, total, sinks, row_head, valid)
            place = token * (heads * GROUP) + row_head
            added = acc_shift * factor
            if value_scaled:
                factor = factor * value_unit
            store_sets(
                out, place, acc0, acc1, acc2, acc3, factor, added, valid, VALUE_FORMAT, VALUE_A, VALUE_B, VALUE_ROW, DV
            )
            if lse is not None:
                tl.store(lse + place, row_lse, mask=valid)
        else:
            place = (2 * program + (from_unit == tile_start).to(tl.int32)) * BLOCK_M + tl.arange(0, BLOCK_M)
            factor = tl.full((BLOCK_M,), 1.0, tl.float32)
            if value_scaled:
                factor = factor * value_unit
            store_sets(
                partial, place, acc0, acc1, acc2, acc3, factor, acc_shift, valid, VALUE_FORMAT, VALUE_A, VALUE_B,
                VALUE_ROW, DV,
            )  # fmt: skip
            tl.store(partial_sums + place * 2, largest, mask=valid)
            tl.store(partial_sums + place * 2 + 1, total, mask=valid)

        unit += to_unit - from_unit
        tile += 1
        if to_unit == units:
            tile = 0
            head += 1


@triton.jit
def merge_kernel(
    out, lse, partial, partial_sums, query_start, shared_start, schedule, sinks, tiles, heads,
    GROUP: tl.constexpr, DV: tl.constexpr, PART: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Add up the partial sums of one tile and KV head, ROWS rows per program; nothing to do if one program did it."""
    tile = tl.program_id(0) // heads
    head = tl.program_id(0) - tile * heads
    unit_start = schedule + 4
    units = tl.load(schedule + 1)
    begin = tl.load(unit_start + tile)
    end = tl.load(unit_start + tile + 1)
    per_program = tl.load(schedule)
    first = (head * units + begin) // per_program
    last = (head * units + end - 1) // per_program
    if (begin < end) & (first < last):
        n = tl.load(unit_start + tiles + 1 + tile)
        _, start, stop = find_step_rows(n, query_start, shared_start, PART)
        inner = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        row = tl.load(unit_start + 2 * tiles + 1 + tile) + inner
        token = row // GROUP
        row_head = head * GROUP + row - token * GROUP
        valid = (token < stop - start) & (inner < BLOCK_M)
        dims = tl.arange(0, WIDTH)
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, WIDTH), tl.float32)
        for program in range(first, last + 1):
            place = (2 * program + (program == first).to(tl.int32)) * BLOCK_M + inner
            one_largest = tl.load(partial_sums + place * 2, mask=valid, other=float("-inf"))
            one_total = tl.load(partial_sums + place * 2 + 1, mask=valid, other=0.0)
            inside = valid[:, None] & (dims < DV)[None, :]
            one = tl.load(partial + place.to(tl.int64)[:, None] * DV + dims[None, :], mask=inside, other=0.0)
            higher = tl.maximum(largest, one_largest)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp2(largest - base)
            one_shrink = tl.exp2(one_largest - base)
            acc = acc * shrink[:, None] + one * one_shrink[:, None]
            total = total * shrink + one_total * one_shrink
            largest = higher
        factor, row_lse = close_rows(largest, total, sinks, row_head, valid)
        place = (start + token) * (heads * GROUP) + row_head
        store_columns(out, place, dims, acc * factor[:, None], valid, DV)
        if lse is not None:
            tl.store(lse + place, row_lse, mask=valid)
