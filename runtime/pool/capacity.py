"""How many blocks there are, and the tensors behind them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kvpass.config import CacheConfig
from kvpass.errors import ConfigError
from kvpass.kernels.formats import cache_formats as formats
from kvpass.kernels.formats.cache_formats import cache_bytes_per_token, shared_tensors, wide_bytes_per_token
from kvpass.runtime.pool.state_slots import bytes_per_state
from kvpass.types import CachePlan

# A model that remembers nothing of past tokens has blocks that cost no memory; they still count its tokens.
BLOCKS_WITHOUT_MEMORY = 1 << 16
LEAST_WIDE_BLOCKS = 8  # of a group: for one sequence and a step of four blocks


def bytes_per_block(plan: CachePlan) -> int:
    """Bytes of one block in all tensors of the caches together; groups of caches share tensors."""
    sizes = dict(zip(shared_tensors(plan.caches), map(cache_bytes_per_token, plan.caches), strict=True))
    return plan.block_size * sum(sizes.values())


def free_bytes(device: torch.device | str) -> int:
    """Bytes of memory that are free on ``device`` now.

    Raises:
        ConfigError: if that cannot be found out.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        if device.type != "cpu":
            raise OSError
        memory = Path("/proc/meminfo")
        if memory.exists():  # what the system would give back of its caches is free as well
            return next(int(line.split()[1]) * 1024 for line in memory.open() if line.startswith("MemAvailable"))
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, StopIteration, AttributeError) as error:
        raise ConfigError(
            f"memory as a share of what is free on {device} cannot be known here: write an amount, such as '2GiB'"
        ) from error


def count_blocks(plan: CachePlan, config: CacheConfig, device: torch.device | str = "cpu") -> int:
    """Blocks that ``config`` asks for, or that its memory can hold.

    Raises:
        ConfigError: if the memory does not hold a single block.
    """
    return divide_memory(plan, config, device).num_blocks


class Room(NamedTuple):
    """How the memory is divided, and what fits it.

    Attributes:
        num_blocks: blocks of the pool.
        wide_blocks: how many of them may be wide at a time, where caches settle.
        wide_bytes: what those take.
        max_batch_tokens: tokens of one step, which may need that many wide blocks: at most those of the config.
        max_sequences: sequences that run at once, likewise.
        state_slots: sequences that have recurrent states at once, all that may run; 0 where the plan has no states.
        state_bytes: what those take.
    """

    num_blocks: int
    wide_blocks: int
    wide_bytes: int
    max_batch_tokens: int
    max_sequences: int
    state_slots: int = 0
    state_bytes: int = 0


def divide_memory(plan: CachePlan, config: CacheConfig, device: torch.device | str = "cpu") -> Room:
    """Blocks that ``config`` asks for, or that its memory can hold, and for caches that settle the wide ones.

    Wide blocks are as many as a step may write to, and one more for each sequence: its first. Where the memory is
    given, at most a quarter of it goes to them, and fewer sequences and tokens run at once if that is not enough.
    Recurrent states, of all sequences that may run, are taken from the memory first.

    Raises:
        ConfigError: if the memory does not hold a single block, or too few wide ones, beside the states; if a step is
            too short for the prefix of the plan; if a state cannot be stored.
    """
    if config.max_batch_tokens < plan.prefix:
        raise ConfigError(
            f"max_batch_tokens={config.max_batch_tokens} is less than the first {plan.prefix} tokens of a sequence, "
            f"which see one another in this model and are computed in one step: give at least {plan.prefix}"
        )
    size, wide = bytes_per_block(plan), _bytes_per_wide_block(plan)
    tokens, sequences, groups = config.max_batch_tokens, config.max_sequences, len(plan.group_windows)
    wanted = groups * _wide_blocks_for(plan, tokens, sequences) if plan.settles else 0
    slots = min(sequences, tokens - max(0, plan.prefix - 1)) if plan.states else 0
    states = slots * bytes_per_state(plan)
    if config.num_blocks is not None:
        wanted = min(wanted, config.num_blocks)
        return Room(config.num_blocks, wanted, wanted * wide, tokens, sequences, slots, states)
    if size == 0 and not states:
        return Room(BLOCKS_WITHOUT_MEMORY, 0, 0, tokens, sequences)
    share = config.memory_share
    memory = (config.memory_bytes if share is None else int(share * free_bytes(device))) - states
    if states and memory < size:
        raise ConfigError(
            f"memory={config.memory!r} is too little: the recurrent states of the {slots} sequences that may run at "
            f"once take {states} bytes, and a block {size}; give at least memory={states + size}, or a smaller "
            f"max_sequences"
        )
    if size == 0:
        return Room(BLOCKS_WITHOUT_MEMORY, 0, 0, tokens, sequences, slots, states)
    least, num_wide = size, 0
    if plan.settles:
        least = 4 * groups * LEAST_WIDE_BLOCKS * wide
        num_wide = min(wanted, memory // 4 // wide)
        if num_wide < wanted:
            few = max(LEAST_WIDE_BLOCKS, num_wide // groups)
            tokens = min(tokens, few // 2 * plan.block_size)
            sequences = min(sequences, (few - _wide_blocks_for(plan, tokens, 0)) // 3)
    if memory < least:
        raise ConfigError(
            f"memory={config.memory!r} holds no block: one block of {plan.block_size} tokens takes {size} bytes in "
            f"the {len(plan.caches)} caches of this model; give at least memory={least + states}, or a smaller "
            f"block_size"
        )
    num_blocks = (memory - num_wide * wide) // size
    return Room(num_blocks, num_wide, num_wide * wide, tokens, sequences, slots, states)


def _wide_blocks_for(plan: CachePlan, tokens: int, sequences: int) -> int:
    """Blocks that have to be wide at once: what a step writes, and of each sequence its first block and two more."""
    return -(-tokens // plan.block_size) + 3 * sequences + 1


def _bytes_per_wide_block(plan: CachePlan) -> int:
    places = zip(shared_tensors(plan.caches), plan.caches, strict=True)
    sizes = {place: wide_bytes_per_token(spec) for place, spec in places if spec.key_format == "k4"}
    return plan.block_size * sum(sizes.values())


def allocate_caches(
    plan: CachePlan, num_blocks: int, device: torch.device | str, wide_blocks: int = 0
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Key and value tensors ``[B, Hkv, P, D]`` and ``[B, Hkv, P, Dv]`` of each cache, in the order of the plan.

    Caches of different groups may share their memory, since a block belongs to one group at a time. Those in k4v2 have
    ``wide_blocks`` besides.

    Raises:
        ConfigError: if the device has too little memory.
    """
    try:
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            return formats.allocate_caches(plan.caches, num_blocks, plan.block_size, device, wide_blocks)
    except (MemoryError, RuntimeError) as error:
        size = num_blocks * bytes_per_block(plan)
        raise ConfigError(
            f"{num_blocks} blocks, {size} bytes of cache, could not be allocated on {device}: give less memory or a "
            f"smaller num_blocks in CacheConfig ({error})"
        ) from error
