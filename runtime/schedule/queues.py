"""Who runs and who waits."""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection

from kvpass.errors import IntegrityError
from kvpass.runtime.schedule.waiting_queue import WaitingQueue
from kvpass.runtime.sequences.sequence import Rank, Sequence, SequenceState


class Queues:
    """The unfinished sequences of a scheduler. An exception leaves each of them in at least one of the queues.

    Attributes:
        running: those that hold blocks, in the order of rank.
        waiting: those that do not, but the following.
        followers: of each leader that has no new token yet, the samples that wait for it to compute their prompt.
        parked: those that are held and were stopped; there is nothing to be computed of them.
    """

    def __init__(self, max_running: int) -> None:
        self.running: list[Sequence] = []
        self.waiting = WaitingQueue()
        self.followers: dict[Sequence, list[Sequence]] = {}
        self.parked: set[Sequence] = set()
        self._max_running = max_running

    @property
    def is_full(self) -> bool:
        """No more sequences may run."""
        return len(self.running) >= self._max_running

    @property
    def num_waiting(self) -> int:
        """Unfinished sequences that do not run."""
        return len(self.waiting) + len(self.following) + len(self.parked)

    @property
    def following(self) -> list[Sequence]:
        """All followers."""
        return [sequence for followers in self.followers.values() for sequence in followers]

    def follow(self, sequence: Sequence, leader: Sequence) -> None:
        """Have a sequence that has a rank wait for the prompt of ``leader``, which is queued."""
        self.followers.setdefault(leader, []).append(sequence)
        sequence.leader = leader
        sequence.state = SequenceState.WAITING

    def release(self, leader: Sequence) -> list[Sequence]:
        """The followers of ``leader`` wait for themselves from now on; gives them."""
        released = self.followers.get(leader, [])
        for sequence in released:
            self.wait(sequence)
        self.followers.pop(leader, None)
        return released

    def wait(self, sequence: Sequence) -> None:
        """Queue a sequence that has a rank, for itself; one that is held is put where nobody looks for work."""
        sequence.leader = None
        if sequence.held:
            self.parked.add(sequence)
        else:
            self.waiting.push(sequence)
            self.parked.discard(sequence)
        sequence.state = SequenceState.WAITING

    def run(self, sequence: Sequence) -> None:
        """A waiting sequence runs from now on."""
        insort(self.running, sequence, key=rank_of)
        self.waiting.start(sequence)
        self.parked.discard(sequence)
        sequence.state = SequenceState.RUNNING

    def stop_last(self) -> Sequence:
        """The running sequence of the last rank waits from now on."""
        sequence = self.running[-1]
        self.wait(sequence)
        self.running.pop()
        return sequence

    def take_out(self, sequences: Collection[Sequence]) -> None:
        """Forget sequences, wherever they are. Of the followers of one the first computes the prompt for the others."""
        self.parked -= set(sequences)
        for sequence in sequences:
            self.waiting.discard(sequence)
            if sequence.leader in self.followers:
                left = [s for s in self.followers[sequence.leader] if s is not sequence]
                self.followers[sequence.leader] = left
        for leader in self.followers.keys() & sequences:
            if heirs := self.followers[leader]:
                self.wait(heirs[0])
                for sequence in heirs[1:]:
                    self.follow(sequence, heirs[0])
            del self.followers[leader]
        if sequences:
            self.running = [sequence for sequence in self.running if sequence not in sequences]

    def make_all_wait(self) -> list[Sequence]:
        """Stop everybody; gives the unfinished sequences. May itself be interrupted and done again."""
        known = (*self.running, *self.waiting, *self.following, *self.parked)
        unfinished = {sequence for sequence in known if sequence.state is not SequenceState.FINISHED}
        for sequence in unfinished:
            self.wait(sequence)
        self.running, self.followers = [], {}
        for sequence in [s for s in self.waiting if s.state is SequenceState.FINISHED]:
            self.waiting.discard(sequence)
        self.parked &= unfinished
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
            done = sequence.num_computed == sequence.num_tokens
            _require(done == sequence.held, "a sequence runs that has nothing left to compute, and is not held")
        for leader, followers in self.followers.items():
            found = leader in self.waiting if leader.state is SequenceState.WAITING else leader in self.running
            _require(found and leader.num_output == 0, "samples wait for the prompt of one that does not compute it")
            _require(all(s.leader is leader for s in followers), "a sample waits for the prompt of another one")
        _require(all(s.held for s in self.parked), "a sequence that is not held was put aside")
        _require(not any(s.held for s in self.waiting), "a sequence that is held waits for blocks")
        for sequence in (*self.waiting, *self.following, *self.parked):
            _require(sequence.state is SequenceState.WAITING, "a sequence waits that should not")
            held = any(table.owned for table in sequence.tables) or sequence.state_slot is not None
            _require(not held and sequence.num_computed == 0, "a waiting sequence holds blocks")


def rank_of(sequence: Sequence) -> Rank:
    """The rank of a sequence that was added."""
    assert sequence.rank is not None
    return sequence.rank


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise IntegrityError(message)
