"""Split-KV attention over paged caches: decode, prefill, tree, latent and shared prefix are one kernel.

The query heads that share a KV head are packed, with the tokens of a sequence, into the rows of the dots, so that each
key and value is read once for all of them. Programs take equal stretches of the schedule; see
:mod:`kvpass.kernels.triton_kernels.schedule`. A tile that one program does alone is written at once. Of the others each
program leaves a partial sum, at most two per program, and :func:`merge_kernel` adds them up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvpass.kernels.triton_kernels.scores import LOG2E, close_rows, finish_scores
from kvpass.kernels.triton_kernels.tiles import decode, find_last, find_slabs, load_rows, load_scales


@triton.jit
def load_query(query, tokens, heads, valid, dims, stride_token, stride_head, D: tl.constexpr, DOT: tl.constexpr):
    """Columns ``dims`` of the query's rows, in the dtype of the dot; zeros past row and width."""
    places = tokens.to(tl.int64)[:, None] * stride_token + (heads * stride_head)[:, None] + dims[None, :]
    return tl.load(query + places, mask=valid[:, None] & (dims < D)[None, :], other=0.0).to(DOT)


@triton.jit
def multiply(weights, values, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(weights.to(DOT), values, input_precision=PRECISION)


@triton.jit
def store_columns(out, rows, dims, value, valid, stop, WIDTH: tl.constexpr):
    places = rows.to(tl.int64)[:, None] * WIDTH + dims[None, :]
    tl.store(out + places, value.to(out.dtype.element_ty), mask=valid[:, None] & (dims < stop)[None, :])


@triton.jit
def store_pieces(
    out, rows, acc0, acc1, acc2, acc3, factor, valid,
    A: tl.constexpr, B: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store the pieces of ``[rows, WIDTH]``, times ``factor``. HALF: the first element of high nibbles, or 0."""
    low: tl.constexpr = HALF if HALF and HALF < WIDTH else WIDTH
    cols = tl.arange(0, A)
    store_columns(out, rows, cols, acc0 * factor[:, None], valid, low, WIDTH)
    if HALF:
        store_columns(out, rows, HALF + cols, acc2 * factor[:, None], valid, WIDTH, WIDTH)
    if B:
        cols = A + tl.arange(0, B)
        store_columns(out, rows, cols, acc1 * factor[:, None], valid, low, WIDTH)
        if HALF:
            store_columns(out, rows, HALF + cols, acc3 * factor[:, None], valid, WIDTH, WIDTH)


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
    VALUE_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program's stretch of the schedule.

    ``X_ROW`` is the stored elements of a row (bytes for int4), ``X_SLAB`` those of a slab, both in the cache's dtype;
    ``X_A`` and ``X_B`` the widths of the pieces. LATENT: the values are the first DV elements of the keys' rows.
    """
    key_nibbles: tl.constexpr = KEY_FORMAT == "int4"
    value_nibbles: tl.constexpr = VALUE_FORMAT == "int4"
    value_quantized: tl.constexpr = VALUE_FORMAT == "int8" or VALUE_FORMAT == "int4"
    half: tl.constexpr = D // 2
    low: tl.constexpr = half if key_nibbles else D  # the elements that pieces A and B cover
    plain: tl.constexpr = softcap is None and slopes is None and bias is None
    if plain:
        scale = scale * LOG2E
    per_program = tl.load(schedule)
    units = tl.load(schedule + 1)
    unit_start = schedule + 4
    program = tl.program_id(0)
    unit = program * per_program
    end = tl.minimum(unit + per_program, units * heads)
    head = unit // tl.maximum(units, 1)
    tile = find_last(unit_start, unit - head * units, tl.maximum(tl.load(schedule + 2), 1))

    key_a = tl.arange(0, KEY_A)
    value_a = tl.arange(0, VALUE_A)
    # Pieces that a format does not have are one element wide, and dropped by the compiler.
    key_b = KEY_A + tl.arange(0, KEY_B if KEY_B else 1)
    value_b = VALUE_A + tl.arange(0, VALUE_B if VALUE_B else 1)
    while unit < end:
        tile_start = tl.load(unit_start + tile)
        tile_stop = tl.load(unit_start + tile + 1)
        from_unit = unit - head * units
        to_unit = tl.minimum(tile_stop, end - head * units)
        n = tl.load(unit_start + tiles + 1 + tile)
        row = tl.load(unit_start + 2 * tiles + 1 + tile) + tl.arange(0, BLOCK_M)
        first_key = tl.load(unit_start + 3 * tiles + 1 + tile)
        stop_key = tl.load(unit_start + 4 * tiles + 1 + tile)
        if PART == "prefix":
            member = tl.load(shared_start + n)
            start = tl.load(query_start + member).to(tl.int32)
            stop = tl.load(query_start + tl.load(shared_start + n + 1)).to(tl.int32)
            past = 0
        else:
            member = n.to(tl.int64)
            start = tl.load(query_start + n).to(tl.int32)
            stop = tl.load(query_start + n + 1).to(tl.int32)
            past = tl.load(seq_lens + n).to(tl.int32) - (stop - start)
        token = row // GROUP
        row_head = head * GROUP + row - token * GROUP
        valid = token < stop - start
        position = past + token if positions is None else tl.load(positions + start + token, mask=valid, other=0)
        token += start

        q0 = load_query(query, token, row_head, valid, key_a, stride_token, stride_head, low, DOT)
        if KEY_B:
            q1 = load_query(query, token, row_head, valid, key_b, stride_token, stride_head, low, DOT)
        if key_nibbles:
            q2 = load_query(query, token, row_head, valid, half + key_a, stride_token, stride_head, D, DOT)
            if KEY_B:
                q3 = load_query(query, token, row_head, valid, half + key_b, stride_token, stride_head, D, DOT)

        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc0 = tl.zeros((BLOCK_M, VALUE_A), tl.float32)
        acc1 = tl.zeros((BLOCK_M, VALUE_B if VALUE_B else 1), tl.float32)
        acc2 = tl.zeros((BLOCK_M, VALUE_A if value_nibbles else 1), tl.float32)
        acc3 = tl.zeros((BLOCK_M, VALUE_B if value_nibbles and VALUE_B else 1), tl.float32)
        table = block_tables + member * table_width
        origin = (first_key // BLOCK_N - tile_start) * BLOCK_N
        for u in range(from_unit, to_unit):
            keys = origin + u * BLOCK_N + tl.arange(0, BLOCK_N)
            there = (keys >= first_key) & (keys < stop_key)
            slabs = find_slabs(table, keys, there, head, heads, P, BLOCK_N)
            offsets = keys % P
            raw = load_rows(key_cache, slabs, offsets, there, key_a, KEY_ROW, KEY_SLAB)
            k0 = decode(raw, KEY_FORMAT, False, DOT)
            products = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
            if key_nibbles:
                k2 = decode(raw, KEY_FORMAT, True, DOT)
                products += tl.dot(q2, tl.trans(k2), input_precision=PRECISION)
            if KEY_B:
                raw_b = load_rows(key_cache, slabs, offsets, there, key_b, KEY_ROW, KEY_SLAB)
                k1 = decode(raw_b, KEY_FORMAT, False, DOT)
                products += tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
                if key_nibbles:
                    k3 = decode(raw_b, KEY_FORMAT, True, DOT)
                    products += tl.dot(q3, tl.trans(k3), input_precision=PRECISION)
            key_scale = None
            if KEY_FORMAT == "int8" or key_nibbles:
                key_scale = load_scales(key_scales, slabs, offsets, there, P, KEY_ROW, KEY_SLAB)
            seen = there[None, :] & valid[:, None]
            scores = finish_scores(
                products * scale, seen, token, row_head, position, keys, start, past, key_scale, softcap, window, chunk,
                slopes, bias, bias_rows, bias_length, tree_mask, tree_width, positions, PAIRS, PART != "prefix", plain,
            )  # fmt: skip
            higher = tl.maximum(largest, tl.max(scores, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(largest - base)
            total = total * shrink + tl.sum(weights, 1)
            largest = higher

            if LATENT:
                v0 = decode(raw, VALUE_FORMAT, False, VALUE_DOT)
            else:
                raw = load_rows(value_cache, slabs, offsets, there, value_a, VALUE_ROW, VALUE_SLAB)
                v0 = decode(raw, VALUE_FORMAT, False, VALUE_DOT)
            if value_quantized:
                if LATENT:
                    weights = weights * key_scale[None, :]  # type: ignore[index]
                else:
                    value_scale = load_scales(value_scales, slabs, offsets, there, P, VALUE_ROW, VALUE_SLAB)
                    weights = weights * value_scale[None, :]
            acc0 = acc0 * shrink[:, None] + multiply(weights, v0, VALUE_DOT, PRECISION)
            if value_nibbles:
                v2 = decode(raw, VALUE_FORMAT, True, VALUE_DOT)
                acc2 = acc2 * shrink[:, None] + multiply(weights, v2, VALUE_DOT, PRECISION)
            if VALUE_B:
                if not LATENT:
                    raw_b = load_rows(value_cache, slabs, offsets, there, value_b, VALUE_ROW, VALUE_SLAB)
                v1 = decode(raw_b, VALUE_FORMAT, False, VALUE_DOT)
                acc1 = acc1 * shrink[:, None] + multiply(weights, v1, VALUE_DOT, PRECISION)
                if value_nibbles:
                    v3 = decode(raw_b, VALUE_FORMAT, True, VALUE_DOT)
                    acc3 = acc3 * shrink[:, None] + multiply(weights, v3, VALUE_DOT, PRECISION)

        high: tl.constexpr = VALUE_ROW if value_nibbles else 0
        if (from_unit == tile_start) & (to_unit == tile_stop):
            factor, row_lse = close_rows(largest, total, sinks, row_head, valid)
            place = token * (heads * GROUP) + row_head
            store_pieces(out, place, acc0, acc1, acc2, acc3, factor, valid, VALUE_A, VALUE_B, high, DV)
            if lse is not None:
                tl.store(lse + place, row_lse, mask=valid)
        else:
            place = (2 * program + (from_unit == tile_start).to(tl.int32)) * BLOCK_M + tl.arange(0, BLOCK_M)
            store_pieces(partial, place, acc0, acc1, acc2, acc3, total * 0 + 1.0, valid, VALUE_A, VALUE_B, high, DV)
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
        if PART == "prefix":
            start = tl.load(query_start + tl.load(shared_start + n)).to(tl.int32)
            stop = tl.load(query_start + tl.load(shared_start + n + 1)).to(tl.int32)
        else:
            start = tl.load(query_start + n).to(tl.int32)
            stop = tl.load(query_start + n + 1).to(tl.int32)
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
        store_columns(out, place, dims, acc * factor[:, None], valid, DV, DV)
        if lse is not None:
            tl.store(lse + place, row_lse, mask=valid)
