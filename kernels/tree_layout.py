"""Where the keys of a step with a tree mask lie: drafted tokens that are verified in one step.

The new tokens of a sequence are the nodes of a tree that grows from its earlier tokens. A node sees itself and its
ancestors, and takes the position that it would have if its branch were the sequence.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from kvpass.errors import InputError
from kvpass.kernels.step_layout import PrefillPiece, PrefillRun, Sight, StepLayout, Tiling, check_step, cut_runs


def lay_out_tree(
    block_tables: Tensor, seq_lens: Tensor, query_start: Tensor, tree_mask: Tensor, tiling: Tiling
) -> StepLayout:
    """The layout of a step whose new tokens are nodes of trees, ``tree_mask [T, M]``; all of it is prefill.

    Raises:
        InputError: if the four do not fit each other.
    """
    lens, starts = seq_lens.tolist(), query_start.tolist()
    counts = [stop - start for start, stop in itertools.pairwise(starts)]
    check_step(lens, starts, counts, block_tables.shape[1] * tiling.block_size)
    if max(counts, default=0) > tree_mask.shape[1]:
        raise InputError(
            f"tree_mask has {tree_mask.shape[1]} columns, but a sequence has {max(counts)} tokens in this step"
        )
    runs = [
        run
        for n, count in enumerate(counts)
        if count
        for run in _tree_runs(
            block_tables[n], n, lens[n], starts[n], tree_mask[starts[n] : starts[n] + count, :count], tiling
        )
    ]
    longest = max((length for length, count in zip(lens, counts, strict=True) if count), default=0)
    return StepLayout(starts[-1], longest, (), tuple(runs))


def _tree_runs(table: Tensor, sequence: int, length: int, start: int, seen: Tensor, tiling: Tiling) -> list[PrefillRun]:
    """The runs of one sequence, of whose new tokens row t sees ``seen[t, j]``."""
    count = len(seen)
    earlier = length - count
    positions = earlier + seen.sum(1) - 1
    oldest = min(tiling.first_visible(max(0, int(positions.min()))), earlier)
    origin = oldest // tiling.block_size * tiling.block_size
    key = torch.cat((torch.arange(oldest, earlier, device=table.device), positions)).view(1, 1, 1, -1)
    shown = torch.cat((seen.new_ones(count, earlier - oldest), seen), 1)

    def cut(rows: int) -> tuple[PrefillPiece, ...]:
        pieces = []
        for first in range(0, count, rows):
            taken = slice(first, min(count, first + rows))
            query = positions[taken].view(1, 1, -1, 1)
            hidden, apart = ~shown[taken][None, None], tiling.out_of_reach(query, key)
            hidden = hidden if apart is None else hidden | apart
            pieces.append(
                PrefillPiece(
                    tokens=slice(start + taken.start, start + taken.stop),
                    keys=slice(oldest - origin, length - origin),
                    sight=Sight(query, key, hidden, may_see_nothing=True),
                )
            )
        return tuple(pieces)

    return cut_runs(table, sequence, length, count, origin, tiling, cut)
