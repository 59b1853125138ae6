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
from torch import Tensor

from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.pool.wide_blocks import WideBlocks, may_settle
from kvpass.runtime.tiers.block_bytes import BlockBytes
from kvpass.runtime.tiers.disk_store import DiskStore
from kvpass.runtime.tiers.host_memory import TOKEN_BYTES, BlockKey, Payload, StoredBlock
from kvpass.runtime.tiers.tiers import Prefetch, TierCounts, Tiers, Wanted
from kvpass.types import CachePlan

# Blocks that are read at once to be written to disk.
_SAVED_AT_ONCE = 64


@dataclass(eq=False)
class _Swapped:
    """The content of the blocks of a preempted sequence, how many tokens of each are written, and the bytes of all."""

    content: list[Payload]
    filled: list[int]
    size: int


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
        wide: WideBlocks | None = None,
    ) -> None:
        """Move blocks between ``caches``, in the order of the plan, and host memory.

        Args:
            tiers: where evicted blocks go; None to lose them.
            swap_bytes: most bytes of host memory for what is swapped out.
            wide: which blocks are, if caches settle.
        """
        self._bytes = BlockBytes(plan, caches, wide)
        self._wide = wide
        self._groups = len(plan.group_windows)
        self._pool = pool
        self._tiers = tiers
        self._swap_bytes = swap_bytes
        self.swapped_bytes = 0
        # What was evicted since the last flush, and is still in its block.
        self._leaving: list[tuple[BlockKey, int]] = []

    def shelve(self, namespace: str, group: int, tokens: bytes, block: int) -> None:
        """Note that ``block``, the cache of ``tokens`` in ``group``, is being evicted."""
        if self._tiers is not None and self._bytes.is_stored(group):
            key = BlockKey.of(namespace, group, tokens)
            if not self._tiers.holds(key):
                self._leaving.append((key, block))

    def find(self, wanted: Wanted) -> list[list[StoredBlock | None]]:
        """As :meth:`kvpass.runtime.tiers.tiers.Tiers.find`."""
        return [] if self._tiers is None else self._tiers.find(wanted)

    def prefetch(self, wanted: Wanted) -> Prefetch | None:
        """As :meth:`kvpass.runtime.tiers.tiers.Tiers.prefetch`."""
        return None if self._tiers is None else self._tiers.prefetch(wanted)

    def drop(self, namespace: str | None) -> None:
        """Forget the content of one namespace, or all, wherever it is beside the device."""
        self._leaving = [entry for entry in self._leaving if namespace not in (None, entry[0].namespace)]
        if self._tiers is not None:
            self._tiers.drop(namespace)

    def change_disk(self, disk: DiskStore | None) -> None:
        """Forget all content beside the device, and go on with another disk; what is on the one before stays there."""
        self._leaving = []
        if self._tiers is not None:
            self._tiers.change_disk(disk)

    def flush(self) -> None:
        """Read what is being evicted, then wipe what is free. To be called before anything is written to blocks."""
        leaving, self._leaving = self._leaving, []
        if self._tiers is not None:
            for stored in self._read_out(leaving):
                self._tiers.put(stored)
        wiped = self._pool.take_scrubs()
        if wiped:
            self._bytes.wipe(wiped)

    def fill(self, stored: Mapping[int, StoredBlock]) -> None:
        """Write stored content to the blocks that are its keys, at once."""
        self.flush()
        for group in range(self._groups):
            entries = {block: content.payload for block, content in stored.items() if content.key.group == group}
            if entries:
                full = [self._pool.block_size] * len(entries)
                self._bytes.write(list(entries), list(entries.values()), full, group)
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

    def swap_out(self, blocks: Ordered[int], places: Ordered[int], computed: int) -> object | None:
        """As :meth:`kvpass.runtime.tiers.swap_space.SwapSpace.swap_out`."""
        due = may_settle(np.array(places, dtype=np.int64), computed, self._pool.block_size)
        settled = set(np.array(blocks, dtype=np.int64)[due].tolist())
        size = self._bytes.size(blocks, settled)
        if self.swapped_bytes + size > self._swap_bytes:
            return None
        filled = [0] * len(blocks)
        if self._wide is not None:
            filled = self._wide.count_filled(np.array(blocks, dtype=np.int64)).tolist()
        content = self._bytes.read(blocks, settled)
        self.swapped_bytes += size
        return _Swapped(content, filled, size)

    def swap_in(self, handle: object, targets: Ordered[tuple[int, int]]) -> bool:
        """As :meth:`kvpass.runtime.tiers.swap_space.SwapSpace.swap_in`."""
        assert isinstance(handle, _Swapped)
        self.flush()
        if targets:
            chosen, blocks = zip(*targets, strict=True)
            content, filled = ([part[place] for place in chosen] for part in (handle.content, handle.filled))
            self._bytes.write(blocks, content, filled)
        return True

    def discard(self, handle: object) -> None:
        """As :meth:`kvpass.runtime.tiers.swap_space.SwapSpace.discard`."""
        assert isinstance(handle, _Swapped)
        self.swapped_bytes -= handle.size
        handle.content, handle.size = [], 0

    def close(self) -> None:
        """Let what is on its way to disk arrive, and let go of the caches."""
        if self._tiers is not None:
            self.flush()
            self._tiers.close()
        self._bytes.close()

    def clear(self) -> None:
        """As :meth:`kvpass.runtime.tiers.swap_space.SwapSpace.clear`; nor is anything moved out any more."""
        self.swapped_bytes = 0
        self._leaving = []

    def _read_out(self, entries: list[tuple[BlockKey, int]]) -> list[StoredBlock]:
        """The content of blocks that are kept: the first of each prefix as it is, others as they are to settle."""
        found = []
        step = self._pool.block_size * TOKEN_BYTES
        for group in range(self._groups):
            chosen = [(key, block) for key, block in entries if key.group == group]
            if chosen and self._bytes.is_stored(group):
                settled = {block for key, block in chosen if len(key.tokens) > step}
                content = self._bytes.read([block for _, block in chosen], settled, group)
                # Copies, or one entry would hold the memory of all.
                found += [StoredBlock(key, row.copy()) for (key, _), row in zip(chosen, content, strict=True)]
        return found
