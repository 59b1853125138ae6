"""Figures of an engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """What an engine holds now, and what it has done so far.

    Attributes:
        blocks_total: blocks of the pool.
        blocks_free: blocks that hold nothing.
        blocks_used: blocks that running sequences refer to.
        blocks_cached: blocks that nobody refers to, kept for reuse of their prefix.
        blocks_shared: blocks that more than one sequence refers to.
        bytes_reserved: bytes of all caches, used or not.
        bytes_peak_used: bytes of the most blocks that were used at once.
        waste: slots of used blocks that held no token over all slots of used blocks, both summed over all steps.
        running: sequences that hold blocks.
        waiting: sequences that are queued.
        steps: steps computed.
        prefill_tokens: tokens computed of prompts, and of outputs that were computed again after a preemption.
        decode_tokens: new tokens computed one by one.
        prefix_hit_tokens: tokens not computed because a block with the same prefix was there.
        preemptions: sequences that gave their blocks back before their end, to be computed again.
    """

    blocks_total: int
    blocks_free: int
    blocks_used: int
    blocks_cached: int
    blocks_shared: int
    bytes_reserved: int
    bytes_peak_used: int
    waste: float
    running: int
    waiting: int
    steps: int
    prefill_tokens: int
    decode_tokens: int
    prefix_hit_tokens: int
    preemptions: int
