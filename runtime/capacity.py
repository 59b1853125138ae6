"""How many blocks there are, and the tensors behind them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from kvpass.config import CacheConfig
from kvpass.errors import ConfigError
from kvpass.kernels import formats
from kvpass.kernels.formats import cache_bytes_per_token, shared_tensors
from kvpass.types import CachePlan

# A model that remembers nothing of past tokens has blocks that cost no memory; they still count its tokens.
BLOCKS_WITHOUT_MEMORY = 1 << 16


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
    if config.num_blocks is not None:
        return config.num_blocks
    size = bytes_per_block(plan)
    if size == 0:
        return BLOCKS_WITHOUT_MEMORY
    share = config.memory_share
    memory = config.memory_bytes if share is None else int(share * free_bytes(device))
    if memory < size:
        raise ConfigError(
            f"memory={config.memory!r} holds no block: one block of {plan.block_size} tokens takes {size} bytes in "
            f"the {len(plan.caches)} caches of this model; give at least memory={size}, or a smaller block_size"
        )
    return memory // size


def allocate_caches(plan: CachePlan, num_blocks: int, device: torch.device | str) -> tuple[tuple[Tensor, Tensor], ...]:
    """Key and value tensors ``[B, Hkv, P, D]`` and ``[B, Hkv, P, Dv]`` of each cache, in the order of the plan.

    Caches of different groups may share their memory, since a block belongs to one group at a time.

    Raises:
        ConfigError: if the device has too little memory.
    """
    try:
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            return formats.allocate_caches(plan.caches, num_blocks, plan.block_size, device)
    except (MemoryError, RuntimeError) as error:
        size = num_blocks * bytes_per_block(plan)
        raise ConfigError(
            f"{num_blocks} blocks, {size} bytes of cache, could not be allocated on {device}: give less memory or a "
            f"smaller num_blocks in CacheConfig ({error})"
        ) from error
