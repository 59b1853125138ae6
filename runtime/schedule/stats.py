"""Figures of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.schedule.latency import Latencies, Percentiles
from kvpass.runtime.schedule.scheduler import Scheduler
from kvpass.runtime.tiers.tiers import TierCounts


@dataclass(frozen=True)
class EngineStats:
    """What an engine holds now, and what it has done so far.

    Attributes:
        blocks_total: blocks of the pool.
        blocks_free: blocks that hold nothing.
        blocks_used: blocks that running sequences refer to.
        blocks_cached: blocks that nobody refers to, kept for reuse of their prefix.
        blocks_shared: blocks that more than one sequence refers to.
        bytes_reserved: bytes of all caches and recurrent states, used or not.
        bytes_peak_used: bytes of the most blocks that were used at once.
        waste: slots of used blocks that held no token over all slots of used blocks, both summed over all steps.
        running: sequences that hold blocks.
        waiting: sequences that are queued.
        steps: steps computed.
        prefill_tokens: tokens computed of prompts, and of outputs that were computed again after a preemption.
        decode_tokens: new tokens computed one by one.
        prefix_hit_tokens: tokens not computed because a block with the same prefix was there.
        prefix_lookup_tokens: tokens of which that could have been: those of every sequence as it was started, also of
            one that was started again.
        hit_rate: the former over the latter.
        evictions: blocks whose content was given up to make room.
        preemptions: sequences that gave their blocks back before their end, to be computed again.
        drafted_tokens: proposed tokens that were computed.
        drafted_trees: trees of them: proposals with several continuations.
        accepted_tokens: those of them that were generated.
        acceptance: the latter over the former.
        first_token: seconds from the submission of a request to its first token (TTFT).
        between_tokens: seconds from one token of a request to the next.
        tiers: what went to host memory and disk, and came back.
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
    prefix_lookup_tokens: int
    hit_rate: float
    evictions: int
    preemptions: int
    drafted_tokens: int
    drafted_trees: int
    accepted_tokens: int
    acceptance: float
    first_token: Percentiles
    between_tokens: Percentiles
    tiers: TierCounts


def gather_stats(
    pool: BlockPool,
    scheduler: Scheduler,
    latencies: Latencies,
    tiers: TierCounts,
    block_bytes: int,
    other_bytes: int = 0,
) -> EngineStats:
    """The figures of a pool of blocks of so many bytes, of its scheduler and of its tokens' times.

    ``other_bytes`` are reserved besides, for blocks that have not settled and for recurrent states.
    """
    counts = scheduler.counts
    return EngineStats(
        blocks_total=pool.num_blocks,
        blocks_free=pool.num_free,
        blocks_used=pool.num_used,
        blocks_cached=pool.num_cached,
        blocks_shared=pool.num_shared,
        bytes_reserved=pool.num_blocks * block_bytes + other_bytes,
        bytes_peak_used=pool.peak_used * block_bytes,
        waste=counts.unused_slots / max(1, counts.allocated_slots),
        running=scheduler.num_running,
        waiting=scheduler.num_waiting,
        steps=counts.steps,
        prefill_tokens=counts.prefill_tokens,
        decode_tokens=counts.decode_tokens,
        prefix_hit_tokens=counts.prefix_hit_tokens,
        prefix_lookup_tokens=counts.prefix_lookup_tokens,
        hit_rate=counts.prefix_hit_tokens / max(1, counts.prefix_lookup_tokens),
        evictions=pool.evictions,
        preemptions=counts.preemptions,
        drafted_tokens=counts.drafted_tokens,
        drafted_trees=counts.drafted_trees,
        accepted_tokens=counts.accepted_tokens,
        acceptance=counts.accepted_tokens / max(1, counts.drafted_tokens),
        first_token=latencies.first_token.percentiles(),
        between_tokens=latencies.between_tokens.percentiles(),
        tiers=tiers,
    )
