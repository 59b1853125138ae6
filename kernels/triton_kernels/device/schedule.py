"""Sharing the work of one attention call evenly among a fixed number of programs, on the device itself.

A *tile* is up to BLOCK_M rows of one sequence and one KV head, a row being one token and one query head of the group. A
*unit* is BLOCK_N keys of one tile. Per head the units of all tiles stand in one line, the heads one after the other,
and each program takes an equal stretch of it. So a long sequence is split over many programs and short ones share one,
however ragged the lengths are; and since the grid comes from shapes alone, no length is ever read by the host and a
CUDA graph may replay the call with other lengths.

The schedule is one int32 tensor::

    [0] units per program   [1] units per head   [2] tiles in use   [3] 0
    unit_start [TILES + 1]  first unit of each tile
    sequence   [TILES]      sequence (or group, for a shared prefix)
    first_row  [TILES]      first row, counted within the sequence
    first_key  [TILES]      oldest key that a row of the tile sees
    stop_key   [TILES]      newest key that a row of the tile sees, plus 1
    scratch    [N + 1]      first tile of each sequence
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvpass.kernels.triton_kernels.device.tiles import find_last

HEADER = 4


def schedule_size(tiles: int, sequences: int) -> int:
    """Numbers in the schedule of ``tiles`` tiles and ``sequences`` sequences."""
    return HEADER + 5 * tiles + 1 + sequences + 1


def most_tiles(tokens: int, sequences: int, group: int, block_m: int) -> int:
    """Tiles of one KV head that T tokens of N sequences can need, whatever their lengths are."""
    rows = tokens * group
    return max(1, min(tokens * -(-group // block_m), rows // block_m + min(sequences, tokens)))


@triton.jit
def find_last_each(starts, wanted, count):
    """:func:`kvpass.kernels.triton_kernels.device.tiles.find_last` for a vector of wanted values."""
    low = wanted * 0
    high = low + count
    left = count
    while left > 0:
        middle = (low + high) // 2
        search = high - low > 1
        below = tl.load(starts + middle) <= wanted
        low = tl.where(search & below, middle, low)
        high = tl.where(search & (below == 0), middle, high)
        left = left // 2
    return low


@triton.jit
def find_stretch(schedule, heads):
    """This program's stretch of the line: its first unit, the end, and the head and tile of the first."""
    per_program = tl.load(schedule)
    units = tl.load(schedule + 1)
    unit = tl.program_id(0) * per_program
    end = tl.minimum(unit + per_program, units * heads)
    head = unit // tl.maximum(units, 1)
    tile = find_last(schedule + 4, unit - head * units, tl.maximum(tl.load(schedule + 2), 1))
    return unit, end, units, head, tile


@triton.jit
def find_step_rows(n, query_start, shared_start, PART: tl.constexpr):
    """A tile's sequence, or the first of its group; and its rows, or the group's, in this step: the first, the end."""
    if PART == "prefix":
        member = tl.load(shared_start + n)
        stop = tl.load(query_start + tl.load(shared_start + n + 1)).to(tl.int32)
    else:
        member = n.to(tl.int64)
        stop = tl.load(query_start + n + 1).to(tl.int32)
    return member, tl.load(query_start + member).to(tl.int32), stop


@triton.jit
def place_rows(row, head, start, count, past, positions, GROUP: tl.constexpr):
    """Token, query head and position of rows ``row`` of a sequence's step, and which of them there are."""
    token = row // GROUP
    row_head = head * GROUP + row - token * GROUP
    valid = token < count
    position = past + token if positions is None else tl.load(positions + start + token, mask=valid, other=0)
    return token + start, row_head, valid, position


@triton.jit
def load_tile(
    schedule, tiles, tile, head, query_start, seq_lens, shared_start, positions, GROUP: tl.constexpr,
    PART: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A tile: its sequence, that sequence's first row and earlier tokens; of its rows what :func:`place_rows` gives."""
    unit_start = schedule + 4
    n = tl.load(unit_start + tiles + 1 + tile)
    row = tl.load(unit_start + 2 * tiles + 1 + tile) + tl.arange(0, BLOCK_M)
    member, start, stop = find_step_rows(n, query_start, shared_start, PART)
    past = 0
    if PART != "prefix":
        past = tl.load(seq_lens + n).to(tl.int32) - (stop - start)
    token, row_head, valid, position = place_rows(row, head, start, stop - start, past, positions, GROUP)
    return member, start, past, token, row_head, valid, position


@triton.jit
def load_keys_range(schedule, tiles, tile):
    """The oldest key that a row of a tile sees, and the newest, plus 1."""
    first_key = schedule + 4 + 3 * tiles + 1 + tile
    return tl.load(first_key), tl.load(first_key + tiles)


@triton.jit
def find_seen_keys(n, query_start, seq_lens, window, chunk, tree_mask):
    """First row, rows and earlier tokens of a sequence; the oldest key that one of them sees, and the newest, plus 1.

    Blocks that no query sees may have been given back: nothing of them is to be read.
    """
    start = tl.load(query_start + n).to(tl.int32)
    count = tl.load(query_start + n + 1).to(tl.int32) - start
    length = tl.load(seq_lens + n).to(tl.int32)
    past = length - count
    oldest = 0
    if window is not None:
        oldest = tl.maximum(oldest, past - window + (0 if tree_mask is not None else 1))
    if chunk is not None:
        oldest = tl.maximum(oldest, tl.maximum(past - (1 if tree_mask is not None else 0), 0) // chunk * chunk)
    return start, count, past, oldest, tl.where(count > 0, length, 0)


@triton.jit
def schedule_kernel(
    schedule,
    seq_lens,
    query_start,
    shared_start,
    shared_lens,
    sequences,
    groups,
    tiles,
    programs,
    heads,
    window,
    chunk,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEAST: tl.constexpr,
    PART: tl.constexpr,
    TREE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the schedule; one program. PART is "whole", "prefix" (keys shared by groups) or "suffix" (the others)."""
    unit_start = schedule + 4
    sequence = unit_start + tiles + 1
    first_row = sequence + tiles
    first_key = first_row + tiles
    stop_key = first_key + tiles
    tile_start = stop_key + tiles
    prefix: tl.constexpr = PART == "prefix"
    lanes = tl.arange(0, BLOCK)
    entries = groups if prefix else sequences

    used = 0
    tl.store(tile_start, 0)
    for begin in range(0, entries, BLOCK):
        n = begin + lanes
        there = n < entries
        if prefix:
            here = tl.load(shared_start + n, mask=there, other=0)
            after = tl.load(shared_start + n + 1, mask=there, other=0)
            rows = tl.load(query_start + after) - tl.load(query_start + here)
        else:
            rows = tl.load(query_start + n + 1, mask=there, other=0) - tl.load(query_start + n, mask=there, other=0)
        needed = tl.where(there, (rows.to(tl.int32) * GROUP + BLOCK_M - 1) // BLOCK_M, 0)
        tl.store(tile_start + 1 + n, used + tl.cumsum(needed, 0), mask=there)
        used += tl.sum(needed, 0)
    tl.debug_barrier()  # what other threads stored is read below

    units = 0
    tl.store(unit_start, 0)
    for begin in range(0, tiles, BLOCK):
        tile = begin + lanes
        there = tile < tl.minimum(used, tiles)
        wanted = tl.where(there, tile, 0)
        n = find_last_each(tile_start, wanted, entries)
        row = (wanted - tl.load(tile_start + n)) * BLOCK_M
        if prefix:
            oldest = n * 0
            stop = tl.load(shared_lens + n).to(tl.int32)
        else:
            length = tl.load(seq_lens + n).to(tl.int32)
            count = (tl.load(query_start + n + 1) - tl.load(query_start + n)).to(tl.int32)
            past = length - count
            position = past + row // GROUP
            stop = past + (tl.minimum(row + BLOCK_M, count * GROUP) - 1) // GROUP + 1
            if TREE:
                position = past - 1  # a drafted token's position is at least this
                stop = length
            oldest = n * 0
            if window is not None:
                oldest = tl.maximum(oldest, position - window + 1)
            if chunk is not None:
                oldest = tl.maximum(oldest, tl.maximum(position, 0) // chunk * chunk)
            if PART == "suffix":
                group = find_last_each(shared_start, n, groups)
                inside = (tl.load(shared_start + group) <= n) & (n < tl.load(shared_start + group + 1))
                oldest = tl.maximum(oldest, tl.where(inside, tl.load(shared_lens + group).to(tl.int32), 0))
        stop = tl.maximum(stop, 0)
        # At least one, so that a tile that sees nothing is written too.
        needed = tl.maximum((stop + BLOCK_N - 1) // BLOCK_N - oldest // BLOCK_N, 1)
        needed = tl.where(there, needed, 0)
        tl.store(sequence + tile, n, mask=there)
        tl.store(first_row + tile, row, mask=there)
        tl.store(first_key + tile, oldest, mask=there)
        tl.store(stop_key + tile, stop, mask=there)
        tl.store(unit_start + 1 + tile, units + tl.cumsum(needed, 0), mask=tile < tiles)
        units += tl.sum(needed, 0)

    total = units * heads
    tl.store(schedule, tl.maximum((total + programs - 1) // programs, LEAST))
    tl.store(schedule + 1, units)
    tl.store(schedule + 2, tl.minimum(used, tiles))
    tl.store(schedule + 3, 0)


@triton.jit
def positions_kernel(
    positions, query_start, seq_lens, tree_mask, tokens, sequences, tree_width, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    """Position of each token, int32 ``[T]``; a drafted one counts the set bits of its row of the tree mask."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = token < tokens
    low = find_last_each(query_start, token, sequences)
    start = tl.load(query_start + low).to(tl.int32)
    count = tl.load(query_start + low + 1).to(tl.int32) - start
    past = tl.load(seq_lens + low).to(tl.int32) - count
    if tree_mask is None:
        position = past + token - start
    else:
        bits = token * 0
        for first in range(0, tree_width, WIDTH):
            column = first + tl.arange(0, WIDTH)
            inside = (column < tree_width)[None, :] & (column[None, :] < tl.where(there, count, 0)[:, None])
            mask = tl.load(tree_mask + token.to(tl.int64)[:, None] * tree_width + column[None, :], mask=inside, other=0)
            bits += tl.sum((mask != 0).to(tl.int32), 1)
        position = past + bits - 1
    tl.store(positions + token, position, mask=there)
