"""Tile sizes of the attention kernel, in one table: by architecture, rows, head dim, storage and block size.

Nothing is timed at run time. Every entry compiles without spills for its architecture and fits its shared memory:
``benchmarks/triton_aot.py`` checks that, and writes down what each takes.
"""

from __future__ import annotations

from typing import NamedTuple

from kvpass.kernels.triton_kernels.launch.launch import Target

ROWS = (16, 64)
WIDTHS = (64, 128, 256, 576)
STORAGES = (4, 8, 16, 32)


class Tile(NamedTuple):
    """How one tile of attention is worked on.

    Attributes:
        rows: rows of the dots, BLOCK_M.
        keys: keys at once, BLOCK_N.
        warps: warps per program.
        stages: depth of the software pipeline.
        programs: programs per multiprocessor.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int


class Entry(NamedTuple):
    """Keys, warps, stages and programs, as in :class:`Tile`."""

    keys: int
    warps: int
    stages: int
    programs: int


E = Entry
# rows, width: entries for storage of 4, 8, 16 and 32 bits per element. Where 64 rows are missing, 16 serve; float32
# dots of heads wider than 128 spill whatever the tile, and are refused.
_NVIDIA: dict[tuple[int, int], tuple[Entry | None, ...]] = {
    (16, 64): (E(64, 4, 3, 2), E(64, 4, 5, 2), E(64, 4, 5, 2), E(32, 4, 3, 2)),
    (16, 128): (E(64, 4, 3, 2), E(32, 4, 5, 2), E(64, 4, 5, 2), E(32, 4, 3, 2)),
    (16, 256): (E(32, 4, 3, 2), E(32, 4, 5, 2), E(32, 4, 5, 2), None),
    (16, 576): (E(16, 8, 2, 1), E(32, 8, 3, 1), E(32, 8, 3, 1), None),
    (64, 64): (E(64, 4, 3, 2), E(64, 4, 3, 2), E(64, 4, 3, 2), E(32, 8, 3, 1)),
    (64, 128): (E(64, 8, 3, 1), E(64, 8, 3, 1), E(64, 8, 3, 1), None),
    (64, 256): (E(16, 8, 2, 1), None, E(16, 8, 2, 1), None),
}
TILES: dict[str, dict[tuple[int, int], tuple[Entry | None, ...]]] = {
    "sm_80": {
        **_NVIDIA,
        (16, 128): (E(64, 4, 3, 2), E(64, 4, 5, 2), E(64, 4, 5, 2), E(32, 4, 3, 2)),
        (64, 64): (E(32, 4, 3, 2), None, E(64, 4, 3, 2), E(16, 8, 3, 1)),
        (64, 128): (E(32, 8, 3, 1), E(32, 8, 3, 1), E(64, 8, 3, 1), None),
    },
    "sm_90": _NVIDIA,
    "sm_100": {
        **_NVIDIA,
        (16, 576): (E(16, 8, 1, 1), E(32, 8, 3, 1), E(32, 8, 3, 1), None),
        (64, 64): (None, None, E(64, 4, 3, 2), None),
        (64, 128): (None, None, E(64, 8, 3, 1), None),
        (64, 256): (None, None, E(16, 8, 2, 1), None),
    },
    "gfx942": {
        (16, 64): (E(64, 4, 2, 2), E(64, 4, 2, 2), E(64, 4, 2, 2), E(32, 4, 2, 2)),
        (16, 128): (E(64, 4, 2, 2), E(64, 4, 2, 2), E(64, 4, 2, 1), E(32, 4, 2, 1)),
        (16, 256): (E(32, 4, 2, 1), E(32, 4, 2, 1), E(32, 4, 2, 1), None),
        (16, 576): (E(16, 4, 1, 1), E(16, 4, 1, 1), E(16, 4, 1, 1), None),
        (64, 64): (E(32, 4, 1, 1), E(32, 4, 1, 1), E(32, 4, 1, 1), E(32, 4, 1, 1)),
        (64, 128): (E(32, 4, 1, 1), E(32, 4, 1, 1), E(32, 4, 1, 1), E(16, 4, 1, 1)),
        (64, 256): (E(16, 4, 1, 1), E(16, 4, 1, 1), E(16, 4, 1, 1), None),
    },
}


def choose_rows(tokens: int, sequences: int, group: int) -> int:
    """Rows of a tile, from the mean number of rows per sequence and KV head."""
    mean = -(-tokens // max(1, sequences)) * group
    return next((rows for rows in ROWS if mean <= rows), ROWS[-1])


def choose_tile(target: Target, rows: int, width: int, bits: int, block_size: int, rich: bool = False) -> Tile:
    """The table's tile for head dim ``width`` (the larger of D and Dv) and elements of ``bits`` bits.

    A tile of keys does not reach over the end of a block of 64 tokens or more: one entry of the block table serves it.
    rich: scores go through a softcap, slopes, a bias or a tree mask, which takes registers: fewer keys, then.
    """
    column = next((limit for limit in WIDTHS if width <= limit), WIDTHS[-1])
    table = TILES[target.architecture]
    found = table.get((rows, column))
    entry = None if found is None else found[STORAGES.index(bits)]
    if entry is None:
        rows = ROWS[0]
        entry = table[rows, column][STORAGES.index(bits)]
        assert entry is not None, "kvpass.kernels.triton_kernels.launch.limits refuses what has no entry"
    keys = min(entry.keys, block_size) if block_size >= 64 else entry.keys
    if rich:
        keys = max(16, keys // 2)
    return Tile(rows, keys, entry.warps, entry.stages, entry.programs)
