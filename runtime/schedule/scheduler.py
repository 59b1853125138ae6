"""The scheduler: what is computed in the next step, and which blocks it is written to.

Sequences are served in the order of their ranks (:mod:`kvpass.runtime.schedule.waiting_queue`). Every running sequence
that decodes takes part in every step with one token, and with those proposed for it if there is room; what the token
budget leaves goes to prompts in the order of rank. A prompt that would take all of it leaves half to those behind it.

A sequence is admitted when the pool has room for all the tokens it has, beside what the running ones are about to ask
for; it takes its blocks as its tokens are scheduled. When there are none left, the running sequence of the last rank is
preempted: its blocks are swapped out, or it is computed again later. The sequence of the first rank is never preempted,
and its need is checked against the whole pool when it is added: it always comes to its end, and then the next one is
the first. A sequence may also displace running ones of a lower priority.

A step that fails is undone by ``recover``, which unregisters the blocks that it registered for reuse (see
:mod:`kvpass.runtime.sequences.step_registry`) and takes the blocks from everybody who may refer to them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Ordered
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from kvpass.errors import CapacityError, IntegrityError
from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.pool.state_slots import StateSlots
from kvpass.runtime.prefix.prefix_cache import PrefixCache
from kvpass.runtime.schedule.deadlines import Deadlines
from kvpass.runtime.schedule.queues import Queues
from kvpass.runtime.schedule.step_builder import StepBuilder
from kvpass.runtime.sequences.holdings import Holdings
from kvpass.runtime.sequences.sequence import Sequence, SequenceState
from kvpass.runtime.sequences.step import SchedulerCounts, Step
from kvpass.runtime.sequences.step_registry import StepRegistry
from kvpass.runtime.tiers.swap_space import SwapSpace
from kvpass.types import AttentionSinks, FinishReason, HeavyHitters


class Scheduler:
    """Continuous batching over one block pool: ``add``, then ``schedule``, compute, ``commit``, as often as needed.

    Attributes:
        counts: what was done so far.
    """

    def __init__(
        self,
        pool: BlockPool,
        prefix_cache: PrefixCache | None,
        max_batch_tokens: int,
        max_sequences: int,
        windows: Ordered[int | None] = (None,),
        swap: SwapSpace | None = None,
        clock: Callable[[], float] = time.monotonic,
        forgetting: AttentionSinks | HeavyHitters | None = None,
        prefix: int = 0,
        slots: StateSlots | None = None,
    ) -> None:
        """Schedule over ``pool``.

        Args:
            prefix_cache: where full blocks are registered for reuse; None for no sharing.
            max_batch_tokens: most tokens of a step.
            max_sequences: most sequences that run at once.
            windows: of each group of caches the newest tokens that a query may look at, see
                :attr:`kvpass.types.CachePlan.group_windows`.
            swap: where the blocks of preempted sequences go; None to compute them again.
            clock: what deadlines are measured by, in seconds.
            forgetting: what long sequences forget; None where they remember everything. It goes with neither windows
                nor a prefix cache: what a block holds would depend on what was forgotten before it.
            slots: of recurrent states, of which blocks tell nothing: they go with neither a prefix cache nor a swap.
            prefix: first tokens of each sequence that have to be computed in one step, at most ``max_batch_tokens``;
                see :attr:`kvpass.types.CachePlan.prefix`. It does not go with a prefix cache either.
        """
        self._pool = pool
        self._prefix_cache = prefix_cache
        self.counts = SchedulerCounts()
        # No more run than there are tokens in a step, so that each one that decodes gets one in every step, beside
        # a prefix.
        self._queues = Queues(min(max_sequences, max_batch_tokens - max(0, prefix - 1)))
        self._deadlines = Deadlines(clock)
        # The step between schedule and commit, what it registered and copies, and who was cancelled meanwhile.
        self._in_flight: Step | None = None
        self._registry = StepRegistry(pool, prefix_cache)
        _require(
            forgetting is None or (prefix_cache is None and set(windows) == {None}), "forgetting goes with no windows"
        )
        _require(slots is None or (prefix_cache is None and swap is None), "states are neither shared nor swapped")
        self._holdings = Holdings(pool, self._registry, windows, max_batch_tokens, swap, forgetting, slots)
        self._dropped: set[Sequence] = set()
        pins = None if prefix_cache is None else prefix_cache.pins
        self._builder = StepBuilder(
            pool, self._queues, self._holdings, self._registry, pins, max_batch_tokens, self.counts, prefix
        )
        # False while blocks change hands: if an exception leaves it so, nothing is known but the tokens.
        self._intact = True

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._queues.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that are queued, preempted ones included."""
        return self._queues.num_waiting

    @property
    def decoding(self) -> list[Sequence]:
        """Running sequences of which nothing but the newest token is left to compute."""
        return [sequence for sequence in self._queues.running if sequence.num_computed == sequence.num_tokens - 1]

    def has_room(self, length: int) -> bool:
        """Whether the pool has room for a sequence of so many tokens when nothing else runs."""
        return self._holdings.most_held(0, length, 1) <= self._pool.num_blocks

    def check_fits(self, sequence: Sequence) -> None:
        """Raise :class:`CapacityError` if the pool is too small for ``sequence`` even when nothing else runs."""
        need = self._holdings.most_held(0, sequence.max_cached_tokens, 1)
        if need > self._pool.num_blocks:
            raise CapacityError(
                f"a request with a prompt of {sequence.prompt_length} tokens and max_new_tokens="
                f"{sequence.max_new_tokens} needs {need} blocks of {self._pool.block_size} tokens, and the pool has "
                f"{self._pool.num_blocks}: give the cache more memory (CacheConfig memory or num_blocks), or lower "
                f"max_new_tokens, or shorten the prompt"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; also while a step is in flight.

        One that has a ``leader`` is forked from it as soon as the prompt, which they share, is computed; unless that
        has happened already.

        Raises:
            CapacityError: if it could never be computed.
        """
        self.check_fits(sequence)
        if sequence.state is not SequenceState.NEW:
            raise IntegrityError("a sequence can be added only once")
        leader, sequence.leader = sequence.leader, None
        with self._changing():
            if leader is not None and self._can_lead(leader):
                self._queues.waiting.rank_after(sequence, leader)
                self._holdings.open(sequence)
                self._queues.follow(sequence, leader)
                self._deadlines.add(sequence)
                return
            self._queues.waiting.rank(sequence)
            self._enter(sequence)
            sequence.ahead = self._registry.prefetch(sequence)

    def fork(self, sequence: Sequence, seeds: Ordered[int]) -> list[Sequence]:
        """New sequences that go on from where ``sequence`` is, one for each seed.

        They own its blocks as well; whoever writes to a block that is not full copies it first. Where not all of them
        may run at once, and where ``sequence`` does not run, they wait and are computed from what is registered.

        Raises:
            IntegrityError: if the sequence has ended, or was not added.
        """
        twins = [sequence.forked(seed) for seed in seeds]
        self.add_twins(sequence, twins)
        return twins

    def add_twins(self, sequence: Sequence, twins: Iterable[Sequence]) -> None:
        """As :meth:`fork`, with sequences that ``sequence`` has made by :meth:`Sequence.forked`."""
        self._require_no_step("fork")
        _require(sequence.state in (SequenceState.RUNNING, SequenceState.WAITING), "only what is queued can be forked")
        with self._changing():
            for twin in twins:
                self._queues.waiting.rank_after(twin, sequence)
                self._enter(twin)
                self._run_beside(twin, sequence)

    def extend(self, sequence: Sequence, token: int) -> None:
        """Give a sequence that is held its next token; it goes on with the next step."""
        self._require_no_step("extend")
        _require(sequence.held and sequence.state is not SequenceState.FINISHED, "only what is held can be extended")
        with self._changing():
            sequence.held = False
            sequence.append(token)
            if sequence.state is SequenceState.FINISHED:
                self._drop([sequence], sequence.finish_reason)
            elif sequence.state is SequenceState.WAITING:
                self._queues.wait(sequence)

    def schedule(self) -> Step:
        """Choose the next step and give its tokens their blocks; :meth:`commit` it once it is computed."""
        self._require_no_step("schedule")
        with self._changing():
            expired = self._deadlines.expired()
            self._drop(expired, "deadline")
            ranges = self._builder.build()
            reached = [(s, end - s.num_tokens) for s, _, end in ranges if end >= s.num_tokens]
            if followers := self._queues.followers:
                reached = [pair for s, n in reached for pair in ((s, n), *((f, 0) for f in followers.get(s, ())))]
            sampled, drafted = zip(*reached, strict=True) if reached else ((), ())
            moves = self._holdings.take_state_moves() if ranges else ()
            step = Step(tuple(ranges), sampled, drafted, tuple(self._holdings.copies), tuple(expired), moves)
            if ranges:
                self._in_flight = step
        return step

    def commit(
        self, step: Step, tokens: Ordered[Ordered[int] | None], received: NDArray[np.float64] | None = None
    ) -> None:
        """Take note that ``step`` is computed, and of the new ``tokens`` of each of ``step.sampled``.

        What was computed of proposed tokens is kept as far as the new tokens are the proposed ones; of the others, and
        of the last one, nothing is computed yet. Tokens after the one that ends a sequence are dropped. None instead of
        tokens ends a sequence in error; what it registered is forgotten. Finished sequences give their blocks back.
        With no tokens a sequence is held until :meth:`extend`. Where attention decides what is forgotten, ``received
        [N, W]`` is what blocks have received of it in the step.
        """
        if step is not self._in_flight or len(tokens) != len(step.sampled):
            raise IntegrityError("commit takes the step in flight, and the tokens of each sampled sequence")
        with self._changing():
            step.finish(self.counts, self._pool.num_used, self._pool.block_size)
            if received is not None:
                self._holdings.note_attention(step, received)
            forked = self._fork_followers(step) if self._queues.followers else []
            ended: set[Sequence] = set()
            finished = SequenceState.FINISHED
            for sequence, drafted, new in zip(step.sampled, step.drafted, tokens, strict=True):
                if self._dropped and sequence in self._dropped:
                    continue
                if new is None:
                    self._registry.forget_content(sequence)
                    sequence.finish("error")
                elif not new:
                    sequence.held, sequence.num_draft = True, 0
                elif drafted or len(new) > 1:
                    self._accept(sequence, drafted, new)
                else:
                    sequence.append(new[0])
                if sequence.state is finished:
                    ended.add(sequence)
            self._registry.settle()
            self._holdings.let_go()
            self._in_flight = None
            self._drop(self._dropped, None)
            self._dropped = set()
            for sequence in ended:
                self._holdings.give_back_all(sequence)
            self._queues.take_out(ended)
            self._holdings.give_back_passed(sequence for sequence, _, _ in step.ranges)
            self._holdings.give_back_passed(forked)

    def cancel(self, sequences: Iterable[Sequence]) -> None:
        """Drop sequences wherever they are, and give their blocks back; finished ones are left as they are.

        What a step in flight computes is dropped when it is committed.
        """
        with self._changing():
            step = self._in_flight
            # Who runs and is not computed may have begun with a copy, which is made in this step.
            computed = {*self._queues.running, *step.sampled} if step else set()
            unfinished = {sequence for sequence in sequences if sequence.state is not SequenceState.FINISHED}
            self._dropped |= unfinished & computed
            self._drop(unfinished - computed, None)

    def recover(self) -> bool:
        """Undo what an exception left half done; False if there is no such thing.

        A step in flight is dropped: the blocks it registered are forgotten, and all running sequences give their
        blocks back and wait to be computed again, with the tokens they have. If the exception came while blocks
        changed hands, the pool and the prefix cache start anew.
        """
        if not self._intact:
            self._reset()
            return True
        if self._in_flight is not None:
            with self._changing():
                self._registry.undo()
                self._holdings.let_go()
                self._stop_all()
                self._in_flight = None
                self._drop(self._dropped, None)
                self._dropped = set()
            return True
        return False

    def start_over(self) -> None:
        """Have all that is unfinished computed again, with the tokens it has: what was computed is worth nothing."""
        self._require_no_step("start_over")
        with self._changing():
            self._stop_all()
            for sequence in (*self._queues.waiting, *self._queues.parked):
                self._holdings.give_back_all(sequence)  # what was swapped out

    def clear_prefix_cache(self) -> None:
        """Forget all registered blocks; running sequences keep theirs but register nothing more."""
        self._require_no_step("clear_prefix_cache")
        if self._prefix_cache is not None:
            with self._changing():
                self._prefix_cache.clear()

    def check_integrity(self) -> None:
        """Assert every invariant of scheduler, prefix cache and pool.

        Raises:
            IntegrityError: naming the invariant that does not hold.
        """
        self._queues.check_integrity()
        running = self._queues.running
        tables = [table.owned for sequence in running for table in sequence.tables]
        pinned = self._prefix_cache.pins.tables if self._prefix_cache is not None else []
        sources = [source for source, _ in self._holdings.copies]
        self._pool.check_integrity([*tables, *pinned, self._registry.referenced_blocks, sources])
        if self._prefix_cache is not None:
            self._prefix_cache.check_integrity()
        if self._in_flight is None:
            _require(self._registry.is_settled and not sources and not self._dropped, "a step was left half done")
        self._holdings.check_running(running, self._in_flight is not None)

    def _stop_all(self) -> None:
        """Take the blocks of all running sequences; they wait."""
        while self._queues.running:
            self._holdings.give_back_all(self._queues.stop_last())

    def _enter(self, sequence: Sequence) -> None:
        """Queue a sequence that has a rank."""
        self._holdings.open(sequence)
        self._queues.wait(sequence)
        self._deadlines.add(sequence)

    def _can_lead(self, sequence: Sequence) -> bool:
        """Whether the prompt of a sequence is still to be computed, so that others may wait for it."""
        queued = sequence.leader is None and sequence.state in (SequenceState.RUNNING, SequenceState.WAITING)
        sampled = self._in_flight.sampled if self._in_flight is not None else ()
        return queued and sequence.num_output == 0 and sequence not in sampled

    def _fork_followers(self, step: Step) -> list[Sequence]:
        """Fork those whose prompt a step has computed, before anybody gets a token; gives them."""
        self._registry.settle()  # what follows goes by the blocks that are registered
        forked = []
        for leader, _, _ in step.ranges:
            if leader in self._queues.followers and leader.num_computed == leader.num_tokens:
                for sequence in self._queues.release(leader):
                    self._run_beside(sequence, leader)
                    forked.append(sequence)
        return forked

    def _run_beside(self, twin: Sequence, sequence: Sequence) -> None:
        """Have ``twin``, which waits and has the same tokens, own what ``sequence`` does, if both may run."""
        if sequence.state is SequenceState.RUNNING and not self._queues.is_full:
            self._queues.run(twin)
            self._holdings.share(sequence, twin)

    def _drop(self, sequences: Iterable[Sequence], reason: FinishReason | None) -> None:
        """End sequences wherever they are."""
        gone = set(sequences)
        for sequence in gone:
            self._holdings.give_back_all(sequence)
            sequence.finish(reason)
        self._queues.take_out(gone)

    def _accept(self, sequence: Sequence, drafted: int, new: Ordered[int]) -> None:
        """Append new tokens; as far as they were proposed, and but for the last one, they are computed already."""
        tree = sequence.draft_tree(drafted)
        matching = len(tree.follow(new[:-1]))
        sequence.num_computed += matching
        self.counts.drafted_tokens += drafted
        self.counts.drafted_trees += not tree.is_chain
        self.counts.accepted_tokens += matching
        for token in new:
            sequence.append(token)
            if sequence.state is SequenceState.FINISHED:
                break
        if matching:
            self._registry.register(sequence, min(sequence.num_computed, sequence.num_tokens))

    def _reset(self) -> None:
        """Free all blocks and recompute every unfinished sequence; may itself be interrupted and done again."""
        self._pool.reset()
        if self._prefix_cache is not None:
            self._prefix_cache.reset()
        self._registry.start_anew()
        self._holdings.start_anew(self._queues.make_all_wait())
        self._dropped = set()
        self._in_flight = None
        self._intact = True

    def _require_no_step(self, operation: str) -> None:
        _require(self._in_flight is None, f"{operation} is not possible while a step is in flight")

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Mark that blocks change hands; the mark stays if an exception cuts the change short."""
        self._intact = False
        yield
        self._intact = True


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise IntegrityError(message)
