"""Content of blocks on its way between the device and host memory, and the wiping of blocks that nobody owns.

Everything here happens between two steps. What is moved out or wiped is noted while the scheduler decides, and done at
once before anything is written to a block: no block is written to before it was read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from kvpass.errors import ConfigError
from kvpass.runtime.block_pool import BlockPool
from kvpass.runtime.host_memory import BlockKey, StoredBlock
from kvpass.runtime.tiers import Prefetch, TierCounts, Tiers
from kvpass.types import CachePlan

# Blocks that are read at once to be written to disk.
_SAVED_AT_ONCE = 64


@dataclass(eq=False)
class _Swapped:
    """The content of the blocks of a preempted sequence, uint8 ``[blocks, bytes]``."""

    content: Tensor


class BlockMoves:
    """Moves blocks of one pool; the shelf of its prefix tree, and the swap space of its scheduler.

    Attributes:
        swapped_bytes: bytes of what is swapped out.
    """

    def __init__(
        self,
        plan: CachePlan,
        caches: Ordered[tuple[Tensor, Tensor]],
        pool: BlockPool,
        tiers: Tiers | None = None,
        swap_bytes: int = 0,
    ) -> None:
        """Move blocks between ``caches``, in the order of the plan, and host memory.

        Args:
            tiers: where evicted blocks go; None to lose them.
            swap_bytes: most bytes of host memory for what is swapped out.

        Raises:
            ConfigError: if a cache is in k4v2, where a block's content is not always in its own place, and there is
                host memory.
        """
        if plan.settles and (tiers is not None or swap_bytes):
            raise ConfigError("dtype k4v2 keeps its blocks on the device: leave out host_memory, disk and scrub")
        groups: list[list[Tensor]] = [[] for _ in plan.group_windows]
        for spec, pair in zip(plan.caches, caches, strict=True):
            groups[spec.group] += [_as_bytes(tensor) for tensor in pair if tensor.numel()]
        self._groups = groups
        # Groups may share tensors: layer i of each of them has its blocks in the same one.
        self._tensors = list({tensor.data_ptr(): tensor for group in groups for tensor in group}.values())
        self._pool = pool
        self._tiers = tiers
        self._swap_bytes = swap_bytes
        self.swapped_bytes = 0
        # What was evicted since the last flush, and is still in its block.
        self._leaving: list[tuple[BlockKey, int]] = []

    def shelve(self, namespace: str, group: int, tokens: bytes, block: int) -> None:
        """Note that ``block``, the cache of ``tokens`` in ``group``, is being evicted."""
        if self._tiers is not None and self._groups[group]:
            key = BlockKey.of(namespace, group, tokens)
            if not self._tiers.holds(key):
                self._leaving.append((key, block))

    def find(
        self, namespace: str, tokens: bytes, step: int, start: int, present: Mapping[int, int]
    ) -> list[list[StoredBlock | None]]:
        """As :meth:`kvpass.runtime.tiers.Tiers.find`."""
        return [] if self._tiers is None else self._tiers.find(namespace, tokens, step, start, present)

    def prefetch(
        self, namespace: str, tokens: bytes, step: int, start: int, present: Mapping[int, int]
    ) -> Prefetch | None:
        """As :meth:`kvpass.runtime.tiers.Tiers.prefetch`."""
        return None if self._tiers is None else self._tiers.prefetch(namespace, tokens, step, start, present)

    def drop(self, namespace: str | None) -> None:
        """Forget the content of one namespace, or all, wherever it is beside the device."""
        self._leaving = [entry for entry in self._leaving if namespace not in (None, entry[0].namespace)]
        if self._tiers is not None:
            self._tiers.drop(namespace)

    def flush(self) -> None:
        """Read what is being evicted, then wipe what is free. To be called before anything is written to blocks."""
        leaving, self._leaving = self._leaving, []
        if self._tiers is not None:
            for stored in self._read_out(leaving):
                self._tiers.put(stored)
        wiped = self._pool.take_scrubs()
        if wiped:
            for tensor in self._tensors:
                tensor[torch.tensor(wiped, device=tensor.device)] = 0

    def fill(self, stored: Mapping[int, StoredBlock]) -> None:
        """Write stored content to the blocks that are its keys, at once."""
        self.flush()
        for group, tensors in enumerate(self._groups):
            entries = [(block, content.payload) for block, content in stored.items() if content.key.group == group]
            if entries:
                content = torch.from_numpy(np.stack([payload for _, payload in entries]))
                _write(tensors, [block for block, _ in entries], content)
        if self._tiers is not None:
            self._tiers.count_promoted(len(stored))

    @property
    def has_disk(self) -> bool:
        """Whether there is a disk behind host memory."""
        return self._tiers is not None and self._tiers.has_disk

    @property
    def tier_counts(self) -> TierCounts:
        """What went where so far."""
        return TierCounts() if self._tiers is None else self._tiers.counts

    def save(self, held: Iterable[tuple[str, int, bytes, int]]) -> None:
        """Write blocks that are there (namespace, group, bytes of tokens, block) to disk, and all of host memory."""
        if self._tiers is None:
            return
        self.flush()
        entries = ((BlockKey.of(name, group, tokens), block) for name, group, tokens, block in held)
        while batch := list(islice(entries, _SAVED_AT_ONCE)):
            self._tiers.write(self._read_out(batch))
        self._tiers.save()

    def swap_out(self, blocks: Ordered[int]) -> object | None:
        """As :meth:`kvpass.runtime.swap_space.SwapSpace.swap_out`."""
        size = len(blocks) * sum(tensor[0].numel() for tensor in self._tensors)
        if self.swapped_bytes + size > self._swap_bytes:
            return None
        self.swapped_bytes += size
        return _Swapped(_read(self._tensors, list(blocks)))

    def swap_in(self, handle: object, targets: Ordered[tuple[int, int]]) -> bool:
        """As :meth:`kvpass.runtime.swap_space.SwapSpace.swap_in`."""
        assert isinstance(handle, _Swapped)
        self.flush()
        if targets:
            places, blocks = zip(*targets, strict=True)
            _write(self._tensors, list(blocks), handle.content[list(places)])
        return True

    def discard(self, handle: object) -> None:
        """As :meth:`kvpass.runtime.swap_space.SwapSpace.discard`."""
        assert isinstance(handle, _Swapped)
        self.swapped_bytes -= handle.content.numel()
        handle.content = handle.content[:0]

    def close(self) -> None:
        """Let what is on its way to disk arrive, and let go of the caches."""
        if self._tiers is not None:
            self.flush()
            self._tiers.close()
        self._groups, self._tensors = [[] for _ in self._groups], []

    def clear(self) -> None:
        """As :meth:`kvpass.runtime.swap_space.SwapSpace.clear`; nor is anything moved out any more."""
        self.swapped_bytes = 0
        self._leaving = []

    def _read_out(self, entries: list[tuple[BlockKey, int]]) -> list[StoredBlock]:
        found = []
        for group, tensors in enumerate(self._groups):
            chosen = [(key, block) for key, block in entries if key.group == group]
            if chosen and tensors:
                content = _read(tensors, [block for _, block in chosen]).numpy()
                # Copies, or one entry would hold the memory of all.
                found += [StoredBlock(key, row.copy()) for (key, _), row in zip(chosen, content, strict=True)]
        return found


def _as_bytes(cache: Tensor) -> Tensor:
    """``[B, bytes of a block]``, the same memory."""
    return cache.view(torch.uint8).flatten(1)


def _read(tensors: list[Tensor], blocks: list[int]) -> Tensor:
    """The content of blocks in all of ``tensors``, uint8 ``[blocks, bytes]`` on the CPU."""
    return torch.cat([tensor[torch.tensor(blocks, device=tensor.device)].cpu() for tensor in tensors], dim=1)


def _write(tensors: list[Tensor], blocks: list[int], content: Tensor) -> None:
    for tensor, part in zip(tensors, content.split([tensor.shape[1] for tensor in tensors], dim=1), strict=True):
        tensor[torch.tensor(blocks, device=tensor.device)] = part.to(tensor.device)
