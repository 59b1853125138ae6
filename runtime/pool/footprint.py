"""How many blocks sequences take, worked out without a pool; what the scheduler does with them comes out the same."""

from __future__ import annotations

from kvpass.types import CachePlan


def blocks_of_sequence(plan: CachePlan, tokens: int) -> int:
    """Blocks that a sequence of so many cached tokens holds once its prompt is computed, shared ones included."""
    return sum(
        -(-tokens // plan.block_size) - blocks_passed(tokens - 1, window, plan.block_size)
        for window in plan.group_windows
    )


def blocks_passed(computed: int, window: int | None, block_size: int) -> int:
    """Blocks from the front that neither the next token nor any later one looks at, once ``computed`` are cached."""
    return 0 if window is None else max(0, computed - window + 1) // block_size


def blocks_of_prefix(plan: CachePlan, tokens: int, prefix: int) -> int:
    """Of the blocks of a sequence, those that it shares with every other one that begins with the same ``prefix``.

    Full blocks of the prefix that are still looked at; the last token of a prompt is always computed.
    """
    full = min(prefix, tokens - 1) // plan.block_size
    return sum(max(0, full - blocks_passed(tokens - 1, window, plan.block_size)) for window in plan.group_windows)


def sequences_that_fit(plan: CachePlan, num_blocks: int, tokens: int, prefix: int = 0) -> int:
    """Sequences of so many cached tokens each that a pool holds at once, all beginning with the same ``prefix``."""
    shared = blocks_of_prefix(plan, tokens, prefix)
    own = blocks_of_sequence(plan, tokens) - shared
    return max(0, (num_blocks - shared) // own)
