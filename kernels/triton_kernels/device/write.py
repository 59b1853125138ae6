"""Writing rows into caches in each format, alone or fused with RMS norm and rotary embedding, and the way back."""

from __future__ import annotations

import triton
import triton.language as tl

from kvpass.kernels.triton_kernels.device.tiles import (
    encode_fp8,
    find_slabs,
    fit_codes,
    load_rows,
    load_scales,
    quantize,
    row_scale,
    set_dims,
    split_tails,
    store_row_scales,
    unpack,
)


@triton.jit
def read_elements(source, token, head, valid, dims, stride_token, stride_head, D: tl.constexpr):
    """Elements ``dims`` of some rows as float32 ``[R, C]``; zeros past row and width."""
    places = token.to(tl.int64)[:, None] * stride_token + (head * stride_head)[:, None] + dims[None, :]
    return tl.load(source + places, mask=valid[:, None] & (dims >= 0) & (dims < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def rotate_elements(
    source, weight, cos, sin, token, head, valid, dims, factor, stride_token, stride_head,
    D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Elements ``dims`` of normed and rotated rows. ``factor [R]`` is 1 / RMS; ROTARY is the rotated width, or 0."""
    x = read_elements(source, token, head, valid, dims, stride_token, stride_head, D)
    if weight is not None:
        x = x * factor[:, None]
        x = x * tl.load(weight + dims, mask=dims < D, other=0.0).to(tl.float32)[None, :]
    if ROTARY:
        if INTERLEAVED:
            partner = dims ^ 1
            first = (dims & 1) == 0
        else:
            partner = tl.where(dims < ROTARY // 2, dims + ROTARY // 2, dims - ROTARY // 2)
            first = dims < ROTARY // 2
        rotated = dims < ROTARY
        y = read_elements(source, token, head, valid, tl.where(rotated, partner, 0), stride_token, stride_head, D)
        if weight is not None:
            y = y * factor[:, None]
            y = y * tl.load(weight + tl.where(rotated, partner, 0)).to(tl.float32)[None, :]
        inside = valid[:, None] & rotated[None, :]
        angle = token.to(tl.int64)[:, None] * ROTARY + dims[None, :]
        turned = x * tl.load(cos + angle, mask=inside, other=0.0)
        turned += tl.where(first[None, :], -y, y) * tl.load(sin + angle, mask=inside, other=0.0)
        x = tl.where(rotated[None, :], turned, x)
    return x


@triton.jit
def encode_rows(
    cache, scales, slabs, offsets, valid, low, high, FORMAT: tl.constexpr, ROW: tl.constexpr, SLAB: tl.constexpr,
    P: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store rows ``[R, COLUMNS]`` in a cache's format. ``high``: the second half of each row, for int4."""
    cols = tl.arange(0, COLUMNS)
    places = slabs[:, None] * SLAB + (offsets * ROW)[:, None] + cols[None, :]
    inside = valid[:, None] & (cols < ROW)[None, :]
    if FORMAT == "int8":
        strange = tl.max((tl.abs(low) < float("inf")).to(tl.int32) ^ 1, 1)
        scale = row_scale(tl.max(tl.abs(low), 1), strange == 0, 127.0)
        store_row_scales(scales, slabs, offsets, valid, scale, P, ROW, SLAB)
        tl.store(cache + places, quantize(low, scale, 127.0).to(tl.uint8), mask=inside)
    elif FORMAT == "int4":
        low_codes, high_codes, tail = fit_codes(low, high, cols < ROW, 2 * ROW)
        store_row_scales(scales, slabs, offsets, valid, tail.to(tl.float32, bitcast=True), P, ROW, SLAB)
        tl.store(cache + places, ((low_codes + 8) | ((high_codes + 8) << 4)).to(tl.uint8), mask=inside)
    elif FORMAT == "fp8_e4m3_bytes":
        tl.store(cache + places, encode_fp8(low, 3), mask=inside)
    elif FORMAT == "fp8_e5m2_bytes":
        tl.store(cache + places, encode_fp8(low, 2), mask=inside)
    else:
        tl.store(cache + places, low.to(cache.dtype.element_ty), mask=inside)


@triton.jit
def row_factor(
    source, weight, token, head, valid, stride_token, stride_head, eps, COLUMNS: tl.constexpr, D: tl.constexpr
):
    """``1 / sqrt(mean(x^2) + eps)`` of each row; 1 without a weight, that is without a norm."""
    if weight is None:
        return valid.to(tl.float32)
    else:
        x = read_elements(source, token, head, valid, tl.arange(0, COLUMNS), stride_token, stride_head, D)
        return 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / D + eps)


@triton.jit
def write_keys(
    program, key, weight, cache, scales, slot_mapping, cos, sin, eps, tokens, heads, stride_token, stride_head,
    P: tl.constexpr, D: tl.constexpr, FORMAT: tl.constexpr, ROW: tl.constexpr, SLAB: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS rows of keys, or without weight and rotation of values, into their cache."""
    row = program * ROWS + tl.arange(0, ROWS)
    valid = row < tokens * heads
    token = row // heads
    head = row - token * heads
    factor = row_factor(key, weight, token, head, valid, stride_token, stride_head, eps, WIDTH, D)
    cols = tl.arange(0, COLUMNS)
    low = rotate_elements(
        key, weight, cos, sin, token, head, valid, tl.where(cols < ROW, cols, D), factor, stride_token, stride_head,
        D, ROTARY, INTERLEAVED,
    )  # fmt: skip
    high = low
    if FORMAT == "int4":
        high = rotate_elements(
            key, weight, cos, sin, token, head, valid, cols + ROW, factor, stride_token, stride_head,
            D, ROTARY, INTERLEAVED,
        )  # fmt: skip
    slot = tl.load(slot_mapping + token, mask=valid, other=0)
    block = slot // P
    slabs = block.to(tl.int64) * heads + head
    offsets = (slot - block * P).to(tl.int32)
    encode_rows(cache, scales, slabs, offsets, valid, low, high, FORMAT, ROW, SLAB, P, COLUMNS)


@triton.jit
def turn_queries(
    program, out, query, weight, cos, sin, eps, tokens, heads, stride_token, stride_head,
    D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of queries, normed and rotated."""
    row = program * ROWS + tl.arange(0, ROWS)
    valid = row < tokens * heads
    token = row // heads
    head = row - token * heads
    factor = row_factor(query, weight, token, head, valid, stride_token, stride_head, eps, COLUMNS, D)
    cols = tl.arange(0, COLUMNS)
    turned = rotate_elements(
        query, weight, cos, sin, token, head, valid, cols, factor, stride_token, stride_head, D, ROTARY, INTERLEAVED
    )
    places = row.to(tl.int64)[:, None] * D + cols[None, :]
    tl.store(out + places, turned.to(out.dtype.element_ty), mask=valid[:, None] & (cols < D)[None, :])


@triton.jit
def write_kernel(
    key, value, key_cache, key_scales, value_cache, value_scales, slot_mapping, query, out, query_weight, key_weight,
    cos, sin, eps, tokens, heads, query_heads, stride_key_token, stride_key_head, stride_value_token,
    stride_value_head, stride_query_token, stride_query_head,
    P: tl.constexpr, D: tl.constexpr, KEY_FORMAT: tl.constexpr, KEY_ROW: tl.constexpr, KEY_SLAB: tl.constexpr,
    DV: tl.constexpr, VALUE_FORMAT: tl.constexpr, VALUE_ROW: tl.constexpr, VALUE_SLAB: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, KEY_COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr, QUERY_COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows, of one token and head each, of keys or of values or, where ``query`` is given, of queries."""
    program = tl.program_id(0)
    parts = (tokens * heads + ROWS - 1) // ROWS
    if program < parts:
        write_keys(
            program, key, key_weight, key_cache, key_scales, slot_mapping, cos, sin, eps, tokens, heads,
            stride_key_token, stride_key_head, P, D, KEY_FORMAT, KEY_ROW, KEY_SLAB, ROTARY, INTERLEAVED, ROWS,
            KEY_COLUMNS, QUERY_COLUMNS,
        )  # fmt: skip
    elif program < 2 * parts:
        write_keys(
            program - parts, value, None, value_cache, value_scales, slot_mapping, None, None, eps, tokens, heads,
            stride_value_token, stride_value_head, P, DV, VALUE_FORMAT, VALUE_ROW, VALUE_SLAB, 0, False, ROWS,
            VALUE_COLUMNS, QUERY_COLUMNS,
        )  # fmt: skip
    elif query is not None:
        turn_queries(
            program - 2 * parts, out, query, query_weight, cos, sin, eps, tokens, query_heads, stride_query_token,
            stride_query_head, D, ROTARY, INTERLEAVED, ROWS, QUERY_COLUMNS,
        )  # fmt: skip


@triton.jit
def gather_kernel(
    out, cache, scales, block_tables, seq_lens, table_width, heads, width,
    P: tl.constexpr, FORMAT: tl.constexpr, ROW: tl.constexpr, SLAB: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """One block of one sequence and head, dequantised into ``out [N, W * P, Hkv, D]``; zeros past the end."""
    scaled: tl.constexpr = FORMAT == "int8" or FORMAT == "int4"
    n = tl.program_id(0) // table_width
    column = tl.program_id(0) - n * table_width
    head = tl.program_id(1)
    offsets = tl.arange(0, P)
    keys = column * P + offsets
    valid = keys < tl.load(seq_lens + n)
    slabs = find_slabs(block_tables + n.to(tl.int64) * table_width, keys, valid, head, heads, P, 2 * P)
    raw = load_rows(cache, slabs, offsets, valid, tl.arange(0, A), ROW, SLAB)
    rows = (n.to(tl.int64) * table_width * P + keys) * heads + head
    factor = valid.to(tl.float32)
    if scaled:
        factor = load_scales(scales, slabs, offsets, valid, P, ROW, SLAB)
    shift = valid.to(tl.float32)
    if FORMAT == "int4":
        factor, shift = split_tails(factor)
    for index in tl.static_range(4):
        if index == 0 or FORMAT == "int4" or (index == 2 and FORMAT == "int8"):
            dims = set_dims(tl.arange(0, 2 * A if scaled else A), index, FORMAT, A, ROW)
            x = unpack(raw, index, FORMAT, tl.float32)
            x = x * factor[:, None]
            if FORMAT == "int4":
                x = x + shift[:, None]
            x = tl.where(valid[:, None], x, 0.0)
            inside = (dims < width)[None, :] & (offsets >= 0)[:, None]
            tl.store(out + rows[:, None] * width + dims[None, :], x, mask=inside)


@triton.jit
def copy_kernel(to, at, to_blocks, at_blocks, words, BLOCK: tl.constexpr):
    """Words of one block to another; without a list of blocks, to or from the blocks in order."""
    pair = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = word < words
    from_block = pair if at_blocks is None else tl.load(at_blocks + pair).to(tl.int64)
    to_block = pair if to_blocks is None else tl.load(to_blocks + pair).to(tl.int64)
    tl.store(to + to_block * words + word, tl.load(at + from_block * words + word, mask=inside), mask=inside)
