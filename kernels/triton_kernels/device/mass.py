"""The attention weights that each slot received, for token eviction; and the merge of a cascade's two parts."""

from __future__ import annotations

import triton
import triton.language as tl

from kvpass.kernels.triton_kernels.device.attention import load_query_sets, multiply_keys
from kvpass.kernels.triton_kernels.device.schedule import find_seen_keys, place_rows
from kvpass.kernels.triton_kernels.device.scores import LOG2E, close_rows, finish_scores, sum_query, weigh_keys
from kvpass.kernels.triton_kernels.device.tiles import find_slabs, load_rows, load_scales, split_tails


@triton.jit
def mass_kernel(
    mass, lse, query, key_cache, key_scales, block_tables, seq_lens, query_start, positions, slopes, bias, tree_mask,
    scale, softcap, window, chunk, table_width, heads, stride_token, stride_head, bias_rows, bias_length, tree_width,
    GROUP: tl.constexpr, P: tl.constexpr, D: tl.constexpr, KEY_FORMAT: tl.constexpr, KEY_ROW: tl.constexpr,
    KEY_SLAB: tl.constexpr, KEY_A: tl.constexpr, KEY_B: tl.constexpr, PAIRS: tl.constexpr, DOT: tl.constexpr,
    NORMED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Mass of BLOCK_N slots of one sequence and KV head: scores once more, and weights by the known log-sum-exp."""
    key_scaled: tl.constexpr = KEY_FORMAT == "int8" or KEY_FORMAT == "int4"
    n = tl.program_id(0)
    head = tl.program_id(1)
    keys = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    start, count, past, oldest, stop = find_seen_keys(n, query_start, seq_lens, window, chunk, tree_mask)
    there = (keys < stop) & (keys >= oldest)
    slabs = find_slabs(block_tables + n.to(tl.int64) * table_width, keys, there, head, heads, P, 2 * P)
    offsets = keys % P
    raw = load_rows(key_cache, slabs, offsets, there, tl.arange(0, KEY_A), KEY_ROW, KEY_SLAB)
    raw_b = raw
    if KEY_B:
        raw_b = load_rows(key_cache, slabs, offsets, there, KEY_A + tl.arange(0, KEY_B), KEY_ROW, KEY_SLAB)
    key_scale = None
    key_offset = None
    if key_scaled:
        key_scale = load_scales(key_scales, slabs, offsets, there, P, KEY_ROW, KEY_SLAB)
    if KEY_FORMAT == "int4":
        key_scale, key_offset = split_tails(key_scale)
    received = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, count * GROUP, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        token, row_head, valid, position = place_rows(row, head, start, count, past, positions, GROUP)
        q0, q1, q2, q3, peak = load_query_sets(
            query, token, row_head, valid, stride_token, stride_head, KEY_FORMAT, KEY_A, KEY_B, KEY_ROW, D, DOT, NORMED
        )
        products = multiply_keys(q0, q1, q2, q3, raw, raw_b, KEY_FORMAT, KEY_B, DOT, PRECISION)
        row_total = None
        if KEY_FORMAT == "int4":
            row_total = sum_query(q0, q1, q2, q3) * peak * scale
        if NORMED:
            products = products * peak[:, None]
        seen = there[None, :] & valid[:, None]
        scores = finish_scores(
            products * scale, seen, token, row_head, position, keys, start, past, key_scale, key_offset,
            row_total, softcap, window, chunk, slopes, bias, bias_rows, bias_length, tree_mask, tree_width, positions,
            PAIRS, True, False,
        )  # fmt: skip
        received += weigh_keys(scores, lse, token * (heads * GROUP) + row_head, valid)
    place = (n * heads + head).to(tl.int64) * (table_width * P) + keys
    tl.store(mass + place, received, mask=keys < table_width * P)


@triton.jit
def join_kernel(
    out, lse, prefix, prefix_lse, suffix, suffix_lse, sinks, rows, query_heads,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The attention over two sets of keys, from that over each, float32 ``[rows, WIDTH]``, and the sinks."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    dims = tl.arange(0, COLUMNS)
    inside = valid[:, None] & (dims < WIDTH)[None, :]
    places = row.to(tl.int64)[:, None] * WIDTH + dims[None, :]
    first = tl.load(prefix_lse + row, mask=valid, other=float("-inf")) * LOG2E
    second = tl.load(suffix_lse + row, mask=valid, other=float("-inf")) * LOG2E
    largest = tl.maximum(first, second)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    first = tl.exp2(first - base)
    second = tl.exp2(second - base)
    factor, row_lse = close_rows(largest, first + second, sinks, row % query_heads, valid)
    sums = tl.load(prefix + places, mask=inside, other=0.0) * first[:, None]
    sums += tl.load(suffix + places, mask=inside, other=0.0) * second[:, None]
    tl.store(out + places, (sums * factor[:, None]).to(out.dtype.element_ty), mask=inside)
    if lse is not None:
        tl.store(lse + row, row_lse, mask=valid)
