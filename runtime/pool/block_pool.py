"""The block pool: who owns which block of the cache, and which block is given out next.

The pool deals in block numbers only; it has never seen a tensor. A block is in one of three states:

======  ===================================================================================
free    nobody refers to it and its content is worth nothing
used    at least one owner refers to it
cached  nobody refers to it, but its content is registered for reuse; evicted when needed
======  ===================================================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from kvpass.errors import CapacityError, IntegrityError


class Keeper(Protocol):
    """Who had content kept for reuse, and decides what is given up when there is no room."""

    def released(self, block: int) -> None:
        """Take note that the kept ``block`` has lost its last owner."""

    def make_room(self) -> None:
        """Give up the content of at least one kept block without an owner, by :meth:`BlockPool.forget`."""


class BlockPool:
    """Reference counts and a free list over ``num_blocks`` blocks of ``block_size`` tokens.

    Every operation takes constant time per block, beside what the keeper takes to choose what is evicted.

    Attributes:
        num_blocks: blocks in the pool, B.
        block_size: tokens per block, P.
        num_used: blocks that have an owner.
        num_shared: blocks that have more than one owner.
        peak_used: the largest ``num_used`` there has been.
        num_cached: blocks that nobody refers to and that hold content for reuse.
        evictions: blocks whose content was given up to make room, so far.
        keeper: who had the content of cached blocks kept; any of them can be given up.
    """

    def __init__(self, num_blocks: int, block_size: int, scrub: bool = False) -> None:
        """Start with free blocks; with ``scrub`` those that become free are noted for :meth:`take_scrubs`."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Blocks that became free and were not wiped since; None if nobody asks for them.
        self._unwiped: set[int] | None = set() if scrub else None
        self._first_fresh = 0
        self.keeper: Keeper | None = None
        self.evictions = 0
        self.reset()

    def reset(self) -> None:
        """Make every block free, whoever owned it."""
        if self._unwiped is not None:
            self._unwiped.update(range(self._first_fresh))
        # References held to each block. Used blocks are those above 0.
        self._references = [0] * self.num_blocks
        # 1 where the content is registered for reuse. Never set for a block of the free list.
        self._kept = bytearray(self.num_blocks)
        # Blocks given back with worthless content, each once; those from _first_fresh on were never given out and
        # are free as well. A large pool thus costs nothing before it is used.
        self._free: list[int] = []
        self._first_fresh = 0
        # Counts of references >= 1, of references >= 2, and of kept blocks without any, in step with the two above.
        self.num_used = 0
        self.num_cached = 0
        self.num_shared = 0
        self.peak_used = 0

    @property
    def num_free(self) -> int:
        """Blocks that nobody refers to and that hold nothing."""
        return len(self._free) + self.num_blocks - self._first_fresh

    @property
    def num_available(self) -> int:
        """Blocks that :meth:`allocate` can give out: free ones, and cached ones by eviction."""
        return self.num_free + self.num_cached

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens fill or begin."""
        return -(-num_tokens // self.block_size)

    def is_used(self, block: int) -> bool:
        """Whether ``block`` has an owner."""
        return self._references[block] > 0

    def count_owners(self, block: int) -> int:
        """References that are held to ``block``."""
        return self._references[block]

    def count_unreferenced(self, blocks: Iterable[int]) -> int:
        """How many of ``blocks`` have no owner, so that acquiring them makes fewer available."""
        return sum(self._references[block] == 0 for block in blocks)

    def allocate(self, count: int) -> list[int]:
        """Give out ``count`` blocks, with one reference each; evicts cached blocks when no free ones are left.

        Raises:
            CapacityError: if fewer are available. Nothing is given out then.
        """
        if count > self.num_available:
            raise CapacityError(f"{count} blocks asked for, {self.num_available} of {self.num_blocks} are available")
        blocks = [self._take() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        self.num_used += count
        self.peak_used = max(self.peak_used, self.num_used)
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add one reference to each of ``blocks``, which are used or cached.

        Raises:
            IntegrityError: if one of them is free.
        """
        for block in blocks:
            references = self._references[block]
            if references == 0:
                if not self._kept[block]:
                    raise IntegrityError(f"block {block} is free and cannot be shared")
                self.num_cached -= 1
                self.num_used += 1
            elif references == 1:
                self.num_shared += 1
            self._references[block] = references + 1
        self.peak_used = max(self.peak_used, self.num_used)

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each of ``blocks``, the last first; blocks without an owner become cached or free.

        Raises:
            IntegrityError: if one of them has no owner.
        """
        for block in reversed(blocks):
            references = self._references[block]
            if references == 0:
                raise IntegrityError(f"block {block} is released but has no owner")
            self._references[block] = references - 1
            if references == 2:
                self.num_shared -= 1
            elif references == 1:
                self.num_used -= 1
                if self._kept[block]:
                    self.num_cached += 1
                    if self.keeper is not None:
                        self.keeper.released(block)
                else:
                    self._make_free(block)

    def keep(self, block: int) -> None:
        """Keep the content of a used block for reuse once its last owner has released it."""
        if self._references[block] == 0:
            raise IntegrityError(f"block {block} has no owner, so its content cannot be kept")
        self._kept[block] = 1

    def forget(self, block: int) -> None:
        """Give up the content of a kept block; it becomes free at once if it has no owner."""
        if not self._kept[block]:
            raise IntegrityError(f"block {block} holds no kept content that could be given up")
        self._kept[block] = 0
        if self._references[block] == 0:
            self.num_cached -= 1
            self._make_free(block)

    def take_scrubs(self) -> list[int]:
        """Blocks that became free since this was called last, to be wiped before anything is written to them."""
        blocks = sorted(self._unwiped or ())
        if self._unwiped is not None:
            self._unwiped.clear()
        return blocks

    def kept_blocks(self) -> set[int]:
        """Blocks whose content is registered for reuse, with an owner or without."""
        return {block for block, kept in enumerate(self._kept) if kept}

    def check_integrity(self, owned: Iterable[Iterable[int]] | None = None) -> None:
        """Assert every invariant of the pool, in time linear in its blocks.

        Args:
            owned: the blocks that each owner refers to; given, the reference counts must be exactly these.

        Raises:
            IntegrityError: naming the invariant that does not hold.
        """
        references = self._references
        free = set(self._free)
        _require(len(free) == len(self._free), "a block stands twice in the free list")
        _require(0 <= self._first_fresh <= self.num_blocks, "the fresh blocks start outside of the pool")
        _require(all(0 <= block < self._first_fresh for block in free), "a fresh block stands in the free list")
        _require(not any(references[self._first_fresh :]), "a block that was never given out has an owner")
        _require(not any(self._kept[self._first_fresh :]), "a block that was never given out has kept content")
        _require(min(references, default=0) >= 0, "a reference count is negative")
        cached = 0
        for block in range(self._first_fresh):
            kept_only = references[block] == 0 and self._kept[block] == 1
            state = (references[block] > 0) + (block in free) + kept_only
            _require(state == 1, f"block {block} is in {state} of the states free, used and cached")
            cached += kept_only
        _require(self.num_cached == cached, "the count of cached blocks is wrong")
        _require(self.num_used == sum(count > 0 for count in references), "the count of used blocks is wrong")
        _require(self.num_shared == sum(count > 1 for count in references), "the count of shared blocks is wrong")
        _require(self.num_used <= self.peak_used <= self.num_blocks, "the peak of used blocks is wrong")
        if owned is not None:
            counts = Counter(block for blocks in owned for block in blocks)
            wrong = [block for block, count in enumerate(references) if count != counts[block]]
            _require(not wrong, f"the references of blocks {wrong[:8]} are not those that the owners hold")

    def _make_free(self, block: int) -> None:
        self._free.append(block)
        if self._unwiped is not None:
            self._unwiped.add(block)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        if self._first_fresh < self.num_blocks:
            self._first_fresh += 1
            return self._first_fresh - 1
        if self.keeper is not None:
            self.keeper.make_room()
            self.evictions += len(self._free)
        _require(bool(self._free), "no content was given up to make room")
        return self._free.pop()


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise IntegrityError(message)
