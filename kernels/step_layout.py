"""Where the keys of one step lie, worked out once per step and shared by all layers.

A step's tensors (block tables, lengths, query starts) say in integers which slots each query sees. Turning them into
gather indices and masks takes more calls than the attention of a small layer, and every layer of a step asks for the
same: see :class:`kvpass.kernels.step_memo.StepMemo`.

Rows and slabs
    A cache ``[B, Hkv, P, D]`` is a list of ``B * Hkv`` contiguous *slabs* of P tokens; slab ``block * Hkv + head``. A
    *row* is one query token and one KV head, ``token * Hkv + head``, with the G query heads that share it. Gathering a
    row's slabs in order gives its keys ``[K, D]`` with one ``index_select`` and no transpose.

Chunks
    Rows are gathered in chunks small enough to stay in the processor's cache, longest sequences first. A chunk is
    padded to its longest row, so what ragged lengths can waste is bounded by the size of one chunk.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvpass.errors import InputError


class Tiling(NamedTuple):
    """What a layout depends on beside the step's tensors.

    Attributes:
        block_size: tokens per block, P.
        num_kv_heads: heads of the cache, Hkv.
        group_size: query heads per KV head, G.
        window: newest keys that a query sees, itself included; None means all.
        slabs: slabs gathered at once.
        scores: elements of a score matrix at once.
        chunk: a query sees only keys of its own chunk of so many positions; None means all.
    """

    block_size: int
    num_kv_heads: int
    group_size: int
    window: int | None
    slabs: int
    scores: int
    chunk: int | None = None

    def first_visible(self, position: int) -> int:
        """Oldest key position that the query at ``position`` sees."""
        oldest = 0 if self.window is None else max(0, position - self.window + 1)
        return oldest if self.chunk is None else max(oldest, position // self.chunk * self.chunk)

    def out_of_reach(self, query: Tensor, key: Tensor) -> Tensor | None:
        """bool, broadcast: pairs of positions that window or chunk keep apart; None if neither is set."""
        apart = None
        if self.window is not None:
            apart = query - key >= self.window
        if self.chunk is not None:
            differs = query.div(self.chunk, rounding_mode="floor") != key.div(self.chunk, rounding_mode="floor")
            apart = differs if apart is None else apart | differs
        return apart


@dataclass(frozen=True, eq=False)
class Sight:
    """Which keys some queries see.

    Attributes:
        query: positions of the queries, int64 ``[R | 1, 1, m, 1]``.
        key: positions of the keys, int64 ``[R | 1, 1, 1, K]``.
        hidden: bool ``[R | 1, 1, m, K - hidden_from]``, the (query, key) pairs that may not be seen; None if there
            are none.
        hidden_from: every key in a column before this one is seen by all queries.
        may_see_nothing: whether a query may see no key at all, before any bias.
    """

    query: Tensor
    key: Tensor
    hidden: Tensor | None
    hidden_from: int = 0
    may_see_nothing: bool = False


@dataclass(frozen=True, eq=False)
class Part:
    """Keys of a decode chunk that are gathered together: columns ``start`` to ``stop`` of all its rows.

    Attributes:
        slabs: int64 ``[R * blocks]``.
        start: first column.
        stop: column after the last; the gathered blocks may reach further.
        unseen: int64, gathered places ``row * blocks * P + column - start`` that the row does not see. Nothing may be
            assumed of what they hold; None if there are none.
    """

    slabs: Tensor
    start: int
    stop: int
    unseen: Tensor | None


@dataclass(frozen=True, eq=False)
class DecodeChunk:
    """R rows of sequences that have one new token.

    Attributes:
        rows: int64 ``[R]``; None when the chunk is all rows of the step in order.
        heads: int64 ``[R]``, KV head of each row.
        sequences: int64 ``[R]``, sequence of each row.
        parts: several only when a single row is longer than a chunk should be.
        sight: of one query per row, ``m = 1``.
    """

    rows: Tensor | None
    heads: Tensor
    sequences: Tensor
    parts: tuple[Part, ...]
    sight: Sight


@dataclass(frozen=True, eq=False)
class PrefillPiece:
    """Consecutive new tokens of one sequence, with the keys that any of them sees.

    Attributes:
        tokens: rows of the step's tokens.
        keys: columns of the gathered keys.
        sight: with ``R = 1``, the same for all heads.
    """

    tokens: slice
    keys: slice
    sight: Sight


@dataclass(frozen=True, eq=False)
class PrefillRun:
    """All new tokens of one sequence that has more than one, for some KV heads.

    Attributes:
        heads: KV heads.
        slabs: int64 ``[heads * blocks]``.
        sequence: its number in the step.
        origin: position of the first gathered key.
        pieces: the sequence's tokens, cut so that the scores stay bounded.
    """

    heads: slice
    slabs: Tensor
    sequence: int
    origin: int
    pieces: tuple[PrefillPiece, ...]


@dataclass(frozen=True, eq=False)
class StepLayout:
    """Everything a step's attention needs to know besides queries and caches.

    Attributes:
        tokens: rows of the step, T.
        longest: length of the longest sequence that has a new token.
        decode: chunks that cover every sequence with one new token.
        prefill: runs that cover every sequence with more.
    """

    tokens: int
    longest: int
    decode: tuple[DecodeChunk, ...]
    prefill: tuple[PrefillRun, ...]


def lay_out_step(block_tables: Tensor, seq_lens: Tensor, query_start: Tensor, tiling: Tiling) -> StepLayout:
    """The layout of a step, from ``block_tables [N, W]``, ``seq_lens [N]`` and ``query_start [N + 1]``.

    Raises:
        InputError: if the three do not fit each other.
    """
    lens, starts = seq_lens.tolist(), query_start.tolist()
    counts = [stop - start for start, stop in itertools.pairwise(starts)]
    check_step(lens, starts, counts, block_tables.shape[1] * tiling.block_size)
    single = [n for n, count in enumerate(counts) if count == 1]
    chunks = _decode_chunks(block_tables, lens, starts, single, tiling)
    runs = [
        run
        for n, count in enumerate(counts)
        if count > 1
        for run in _prefill_runs(block_tables[n], n, lens[n], starts[n], count, tiling)
    ]
    longest = max((length for length, count in zip(lens, counts, strict=True) if count), default=0)
    return StepLayout(starts[-1], longest, tuple(chunks), tuple(runs))


def check_step(lens: list[int], starts: list[int], counts: list[int], room: int) -> None:
    """Raise :class:`InputError` if lengths, query starts and the room in the block tables do not fit each other."""
    if len(counts) != len(lens) or starts[0] != 0:
        raise InputError(f"query_start={starts} does not hold the first row of each of {len(lens)} sequences and T")
    for n, (length, count) in enumerate(zip(lens, counts, strict=True)):
        if not 0 <= count <= length or (count and length > room):
            raise InputError(
                f"sequence {n} has {count} new tokens, a length of {length} and blocks for {room} tokens: "
                "the length counts the new tokens and must fit the blocks"
            )


def _decode_chunks(
    tables: Tensor, lens: list[int], starts: list[int], sequences: list[int], tiling: Tiling
) -> list[DecodeChunk]:
    heads = tiling.num_kv_heads
    blocks = {n: _count_blocks(tiling.first_visible(lens[n] - 1), lens[n], tiling.block_size) for n in sequences}
    if sequences and len(sequences) * heads * max(blocks.values()) <= tiling.slabs:
        everything = len(sequences) == starts[-1]
        return [_decode_chunk(tables, lens, starts, sequences, range(heads), everything, tiling)]
    chunks = []
    ordered = sorted(sequences, key=lambda n: -blocks[n])
    while ordered:
        rows = max(1, tiling.slabs // blocks[ordered[0]])
        taken, ordered = ordered[: max(1, rows // heads)], ordered[max(1, rows // heads) :]
        chunks += [
            _decode_chunk(tables, lens, starts, taken, range(h, min(heads, h + rows)), False, tiling)
            for h in range(0, heads, rows)
        ]
    return chunks


def _decode_chunk(
    tables: Tensor,
    lens: list[int],
    starts: list[int],
    sequences: list[int],
    heads: range,
    everything: bool,
    tiling: Tiling,
) -> DecodeChunk:
    size, device = tiling.block_size, tables.device
    oldest = [tiling.first_visible(lens[n] - 1) for n in sequences]
    origin = [position // size * size for position in oldest]
    columns = max(lens[n] - start for n, start in zip(sequences, origin, strict=True))
    ragged = origin != oldest or any(lens[n] - start != columns for n, start in zip(sequences, origin, strict=True))
    facts = torch.tensor(
        [sequences, [lens[n] - 1 for n in sequences], oldest, origin, [starts[n] for n in sequences]], device=device
    ).unsqueeze(2)
    chosen, query, oldest_, origin_, token = facts.unbind()  # each [S, 1]
    head = torch.arange(heads.start, heads.stop, device=device)

    def per_row(values: Tensor) -> Tensor:
        return values.unsqueeze(1).expand(-1, len(heads), -1).reshape(-1, 1, 1, values.shape[1])

    key = origin_ + torch.arange(columns, device=device)
    hidden = per_row((key < oldest_) | (key > query)) if ragged else None
    # Past its end a row gathers its own last block again: what the table holds there is not to be followed.
    column = origin_ // size + torch.arange(-(-columns // size), device=device)
    table = tables[chosen, torch.minimum(column, query // size)]
    slabs = (table.unsqueeze(1) * tiling.num_kv_heads + head[:, None]).flatten(0, 1)

    return DecodeChunk(
        rows=None if everything else (token * tiling.num_kv_heads + head).flatten(),
        heads=head.expand(len(sequences), -1).reshape(-1),
        sequences=chosen.expand(-1, len(heads)).reshape(-1),
        parts=tuple(_cut_parts(slabs, hidden, columns, tiling)),
        sight=Sight(per_row(query), per_row(key), hidden),
    )


def _cut_parts(slabs: Tensor, hidden: Tensor | None, columns: int, tiling: Tiling) -> list[Part]:
    rows, blocks = slabs.shape
    step = max(1, tiling.slabs // rows)
    parts = []
    for block in range(0, blocks, step):
        taken = slabs[:, block : block + step]
        start, stop = block * tiling.block_size, min(columns, (block + step) * tiling.block_size)
        unseen = None
        if hidden is not None:
            row, column = hidden[:, 0, 0, start:stop].nonzero(as_tuple=True)
            unseen = row * (taken.shape[1] * tiling.block_size) + column if len(row) else None
        parts.append(Part(taken.reshape(-1), start, stop, unseen))
    return parts


def _prefill_runs(
    table: Tensor, sequence: int, length: int, start: int, count: int, tiling: Tiling
) -> list[PrefillRun]:
    position = length - count
    origin = tiling.first_visible(position) // tiling.block_size * tiling.block_size

    def cut(rows: int) -> tuple[PrefillPiece, ...]:
        return tuple(
            _prefill_piece(start, position, first, min(count, first + rows), origin, tiling, table.device)
            for first in range(0, count, rows)
        )

    return cut_runs(table, sequence, length, count, origin, tiling, cut)


def cut_runs(
    table: Tensor,
    sequence: int,
    length: int,
    count: int,
    origin: int,
    tiling: Tiling,
    cut: Callable[[int], tuple[PrefillPiece, ...]],
) -> list[PrefillRun]:
    """The runs of one sequence, by KV heads; ``cut(m)`` gives the pieces of at most m tokens."""
    size = tiling.block_size
    blocks = table[origin // size : -(-length // size)] * tiling.num_kv_heads
    step = min(tiling.num_kv_heads, max(1, tiling.slabs // len(blocks)))
    pieces = cut(min(count, max(1, tiling.scores // (step * tiling.group_size * length))))
    runs = []
    for first in range(0, tiling.num_kv_heads, step):
        heads = range(first, min(tiling.num_kv_heads, first + step))
        slabs = blocks + torch.arange(heads.start, heads.stop, device=table.device)[:, None]
        runs.append(PrefillRun(slice(heads.start, heads.stop), slabs.flatten(), sequence, origin, pieces))
    return runs


def _prefill_piece(
    start: int, position: int, first: int, last: int, origin: int, tiling: Tiling, device: torch.device
) -> PrefillPiece:
    oldest, newest = tiling.first_visible(position + first), position + last
    query = torch.arange(position + first, newest, device=device).view(1, 1, -1, 1)
    key = torch.arange(oldest, newest, device=device).view(1, 1, 1, -1)
    # Without window and chunk, a key older than the piece is seen by all of it: only the last columns need a mask.
    hidden_from = 0 if tiling.window is not None or tiling.chunk is not None else position + first - oldest
    hidden, apart = query < key[..., hidden_from:], tiling.out_of_reach(query, key)
    hidden = hidden if apart is None else hidden | apart
    return PrefillPiece(
        tokens=slice(start + first, start + last),
        keys=slice(oldest - origin, newest - origin),
        sight=Sight(query, key, hidden if last - first > 1 else None, hidden_from),
    )


def _count_blocks(oldest: int, length: int, size: int) -> int:
    return -(-length // size) - oldest // size
