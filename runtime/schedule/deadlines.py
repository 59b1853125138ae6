"""When sequences are ended whether they are done or not."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from kvpass.runtime.sequences.sequence import Sequence, SequenceState


class Deadlines:
    """The sequences that have a deadline, the next one first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._heap: list[tuple[float, int, Sequence]] = []
        self._added = 0

    def add(self, sequence: Sequence) -> None:
        """Watch a sequence, if it has a deadline."""
        if sequence.deadline is not None:
            self._added += 1
            heapq.heappush(self._heap, (sequence.deadline, self._added, sequence))

    def expired(self) -> list[Sequence]:
        """Sequences whose deadline is over and that have not finished; each is given once."""
        found: list[Sequence] = []
        now = self._clock() if self._heap else 0.0
        while self._heap and (self._heap[0][0] <= now or self._heap[0][2].state is SequenceState.FINISHED):
            sequence = heapq.heappop(self._heap)[2]
            if sequence.state is not SequenceState.FINISHED:
                found.append(sequence)
        return found
