"""Who is served next: priorities, and shares of the work between tenants.

Each sequence gets a rank when it arrives, which never changes, so the order is total and whoever comes first in it is
served whatever arrives later. It is start-time fair queueing (Goyal, Vin, Cheng: Start-time Fair Queueing, 1996): a
virtual clock counts tokens of work; a sequence starts where its tenant's earlier ones end, or at the clock if those are
behind it. A tenant that queues much is thus far ahead of the clock, and one that comes back starts at it. With one
tenant the order is that of arrival.

A level of priority moves a sequence :data:`TOKENS_PER_PRIORITY` tokens of work ahead, and no further: nobody starves.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from kvpass.runtime.sequences.sequence import Rank, Sequence

TOKENS_PER_PRIORITY = 1 << 15
# Tenants that the clock has overtaken are forgotten when there are more than this many.
_TENANTS_REMEMBERED = 1024


class WaitingQueue:
    """Sequences that wait, in the order in which they are to be served."""

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, int, Sequence]] = []
        # What is taken out elsewhere than at the front stays in the heap until it comes up.
        self._members: set[Sequence] = set()
        self._pushes = 0
        self._clock = 0
        self._ends: dict[str, int] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._members

    def __iter__(self) -> Iterator[Sequence]:
        """In no particular order."""
        return iter(self._members)

    def rank(self, sequence: Sequence) -> None:
        """Give a sequence that arrives its rank."""
        start = max(self._clock, self._ends.get(sequence.tenant, 0))
        if len(self._ends) > _TENANTS_REMEMBERED:
            self._ends = {tenant: end for tenant, end in self._ends.items() if end > self._clock}
        self._ends[sequence.tenant] = start + sequence.prompt_length + sequence.max_new_tokens
        sequence.rank = Rank(start - sequence.priority * TOKENS_PER_PRIORITY, self._arrivals)
        self._arrivals += 1

    def rank_after(self, sequence: Sequence, parent: Sequence) -> None:
        """Give a sequence the place of the one that it was forked from."""
        assert parent.rank is not None
        work = sequence.max_new_tokens - sequence.num_output
        self._ends[sequence.tenant] = max(self._clock, self._ends.get(sequence.tenant, 0)) + work
        sequence.rank = Rank(parent.rank.start, self._arrivals)
        self._arrivals += 1

    def push(self, sequence: Sequence) -> None:
        """Queue a sequence that has a rank."""
        assert sequence.rank is not None
        self._members.add(sequence)
        self._pushes += 1  # tells two entries of one sequence apart
        heapq.heappush(self._heap, (sequence.rank, self._pushes, sequence))

    def first(self) -> Sequence | None:
        """Who is next."""
        while self._heap:
            sequence = self._heap[0][2]
            if sequence in self._members:
                return sequence
            heapq.heappop(self._heap)
        return None

    def discard(self, sequence: Sequence) -> None:
        """Take a sequence out, if it waits."""
        self._members.discard(sequence)

    def start(self, sequence: Sequence) -> None:
        """Take out a sequence that is served now; the clock goes on to where its work starts."""
        self._members.discard(sequence)
        assert sequence.rank is not None
        self._clock = max(self._clock, sequence.rank.start + sequence.priority * TOKENS_PER_PRIORITY)

    def clear(self) -> None:
        """Take everybody out."""
        self._heap = []
        self._members = set()
