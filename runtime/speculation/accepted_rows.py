"""Where the rows of accepted tokens go that were computed as nodes of a tree."""

from __future__ import annotations

from collections.abc import Sequence as Ordered

import numpy as np
from numpy.typing import NDArray

from kvpass.runtime.sequences.step import Step


def rows_to_move(step: Step, tokens: Ordered[Ordered[int] | None], block_size: int) -> NDArray[np.int64] | None:
    """Rows of the caches that a step has left at the place of a node, and not at that of a token.

    The nodes of a tree are written one after the other behind the newest token. Those that are accepted have to stand
    behind one another; where the first path was right, they do.

    Args:
        step: what was computed; it is not committed yet.
        tokens: new tokens of each of its sampled sequences.
        block_size: tokens per block, P.

    Returns:
        int64 ``[2, G, M]``: in each group the slots, ``block * P + offset``, from which and to which M rows are moved,
        all at once; None if there are none.
    """
    moves: list[NDArray[np.int64]] = []
    for sequence, drafted, new in zip(step.sampled, step.drafted, tokens, strict=True):
        if new is None or sequence.draft_parents is None:
            continue
        path = sequence.draft_tree(drafted).follow(new[:-1])
        places = np.array([(node, depth) for depth, node in enumerate(path) if node != depth], dtype=np.int64)
        if len(places):
            at = sequence.num_tokens + places.T
            tables = np.stack([table.entries for table in sequence.tables])
            moves.append(np.stack([tables[:, row // block_size] * block_size + row % block_size for row in at]))
    return np.concatenate(moves, 2) if moves else None
