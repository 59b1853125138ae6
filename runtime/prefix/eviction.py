"""Which content is given up first when there is no room: the policies, and the queue that they put in order."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Protocol

# Entries of the heap that nobody will ever see are swept out once they are more than the others by this many.
_STALE_SLACK = 64


class Usage(Protocol):
    """What a policy may look at.

    Attributes:
        depth: blocks before this one in its prefix.
        created: when it was registered, on a clock that counts events.
        last_use: when its last owner released it, on the same clock.
        hits: times that it was taken over instead of being computed.
    """

    depth: int
    created: int
    last_use: int
    hits: int


class EvictionPolicy(Protocol):
    """Puts evictable blocks in order. The rank is asked for whenever a block becomes evictable."""

    def rank(self, usage: Usage) -> float:
        """The smallest goes first; among equals, what became evictable first."""

    def evicted(self, rank: float) -> None:
        """Take note that the block of this rank was evicted, the smallest of all."""


class LeastRecentlyUsed:
    """What was released longest ago goes first."""

    def rank(self, usage: Usage) -> float:
        """As :meth:`EvictionPolicy.rank`."""
        return usage.last_use

    def evicted(self, rank: float) -> None:
        """As :meth:`EvictionPolicy.evicted`."""


class FirstInFirstOut(LeastRecentlyUsed):
    """What was registered first goes first, however often it is used."""

    def rank(self, usage: Usage) -> float:
        """As :meth:`EvictionPolicy.rank`."""
        return usage.created


class LeastFrequentlyUsed(LeastRecentlyUsed):
    """What was taken over least often goes first; among equals, what became evictable first."""

    def rank(self, usage: Usage) -> float:
        """As :meth:`EvictionPolicy.rank`."""
        return usage.hits


class CostAware:
    """What saves least goes first: hits times the cost of computing the block again, beside how long ago it was used.

    Greedy-Dual-Size-Frequency (Cherkasova, 1998, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency
    caching policy") with blocks of one size. A rank is the value of a block plus the rank of what was evicted last when
    it was used last, so that what was once popular does not stay for ever.
    """

    # Blocks of history after which the attention of a block costs as much again as all else in it.
    BLOCKS_UNTIL_ATTENTION_DOUBLES = 256

    def __init__(self) -> None:
        self._last_rank = 0.0

    def rank(self, usage: Usage) -> float:
        """As :meth:`EvictionPolicy.rank`."""
        return self._last_rank + (1 + usage.hits) * (1 + usage.depth / self.BLOCKS_UNTIL_ATTENTION_DOUBLES)

    def evicted(self, rank: float) -> None:
        """As :meth:`EvictionPolicy.evicted`."""
        self._last_rank = rank


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LeastRecentlyUsed,
    "lfu": LeastFrequentlyUsed,
    "fifo": FirstInFirstOut,
    "cost": CostAware,
}


class EvictionQueue:
    """Blocks by rank. Each operation takes logarithmic time in C, so near-constant time.

    A block that is pushed again keeps its newest rank only. Nothing is ever searched for: what was overtaken stays in
    the heap until it comes up, or until there is more of it than of the rest.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._heap: list[tuple[float, int, int]] = []
        # The ticket of each block's newest entry; tickets tell entries of equal rank and of one block apart.
        self._tickets: dict[int, int] = {}
        self._next_ticket = 0

    def __contains__(self, block: int) -> bool:
        return block in self._tickets

    def __len__(self) -> int:
        return len(self._tickets)

    def push(self, block: int, usage: Usage) -> None:
        """Queue ``block``, or give it a new rank."""
        self._next_ticket += 1
        self._tickets[block] = self._next_ticket
        heapq.heappush(self._heap, (self._policy.rank(usage), self._next_ticket, block))
        if len(self._heap) > 2 * len(self._tickets) + _STALE_SLACK:
            self._heap = [entry for entry in self._heap if self._tickets.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def discard(self, block: int) -> None:
        """Take ``block`` out, if it is queued."""
        self._tickets.pop(block, None)

    def pop(self, evictable: Callable[[int], bool]) -> int | None:
        """Take out the block of the smallest rank that is ``evictable``, and those before it; None if there is none."""
        while self._heap:
            rank, ticket, block = heapq.heappop(self._heap)
            if self._tickets.get(block) == ticket:
                del self._tickets[block]
                if evictable(block):
                    self._policy.evicted(rank)
                    return block
        return None

    def clear(self) -> None:
        """Take out everything."""
        self._heap = []
        self._tickets = {}
