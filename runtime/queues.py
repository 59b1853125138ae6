"""Who runs and who waits."""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection

from kvpass.errors import IntegrityError
from kvpass.runtime.sequence import Rank, Sequence, SequenceState
from kvpass.runtime.waiting_queue import WaitingQueue


class Queues:
    """The unfinished sequences of a scheduler. An exception leaves each of them in at least one of the two queues.

    Attributes:
        running: those that hold blocks, in the order of rank.
        waiting: the others.
    """

    def __init__(self, max_running: int) -> None:
        self.running: list[Sequence] = []
        self.waiting = WaitingQueue()
        self._max_running = max_running

    @property
    def is_full(self) -> bool:
        """No more sequences may run."""
        return len(self.running) >= self._max_running

    def wait(self, sequence: Sequence) -> None:
        """Queue a sequence that has a rank."""
        self.waiting.push(sequence)
        sequence.state = SequenceState.WAITING

    def run(self, sequence: Sequence) -> None:
        """A waiting sequence runs from now on."""
        insort(self.running, sequence, key=rank_of)
        self.waiting.start(sequence)
        sequence.state = SequenceState.RUNNING

    def stop_last(self) -> Sequence:
        """The running sequence of the last rank waits from now on."""
        sequence = self.running[-1]
        self.wait(sequence)
        self.running.pop()
        return sequence

    def take_out(self, sequences: Collection[Sequence]) -> None:
        """Forget sequences, wherever they are."""
        for sequence in sequences:
            self.waiting.discard(sequence)
        if sequences:
            self.running = [sequence for sequence in self.running if sequence not in sequences]

    def make_all_wait(self) -> list[Sequence]:
        """Stop everybody; gives the unfinished sequences. May itself be interrupted and done again."""
        unfinished = {s for s in (*self.running, *self.waiting) if s.state is not SequenceState.FINISHED}
        for sequence in unfinished:
            self.wait(sequence)
        self.running = []
        for sequence in [s for s in self.waiting if s.state is SequenceState.FINISHED]:
            self.waiting.discard(sequence)
        return list(unfinished)

    def check_integrity(self) -> None:
        """Assert that everybody is where he should be.

        Raises:
            IntegrityError: naming the invariant that does not hold.
        """
        _require(len(self.running) <= self._max_running, "more sequences run than may")
        ranks = [rank_of(sequence) for sequence in self.running]
        _require(ranks == sorted(set(ranks)), "the running sequences are not in the order of their ranks")
        for sequence in self.running:
            _require(sequence.state is SequenceState.RUNNING, "a sequence runs that should not")
            _require(sequence.num_tokens > sequence.num_computed, "a sequence runs that has nothing left to compute")
        for sequence in self.waiting:
            _require(sequence.state is SequenceState.WAITING, "a sequence waits that should not")
            held = any(table.owned for table in sequence.tables)
            _require(not held and sequence.num_computed == 0, "a waiting sequence holds blocks")


def rank_of(sequence: Sequence) -> Rank:
    """The rank of a sequence that was added."""
    assert sequence.rank is not None
    return sequence.rank


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise IntegrityError(message)
