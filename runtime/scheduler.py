"""The scheduler: what is computed in the next step, and which blocks it is written to.

Sequences are served in the order of their arrival. Every running sequence takes part in every step: those that
decode with one token, and the one still in prefill, which is always the youngest, with as much of its prompt as the
token budget leaves. The blocks of a whole prompt are taken when it is admitted, so that only decoding ever asks for
one more block; if there is none, the youngest running sequence is preempted and recomputed later. The oldest sequence
is never preempted by another one, and its need is checked against the whole pool when it is added: it always comes
to its end, and then the next one is the oldest.

Where every cache has a window, the blocks that all of them have passed are given back as soon as the step that looked
at them is committed. Their entries in the block table stay, as 0: no kernel follows an entry that no query sees.

A step that fails is undone by ``recover``, which unregisters the blocks that it registered for reuse (see
:mod:`kvpass.runtime.step_registry`) and takes the blocks from everybody who may refer to them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Ordered
from contextlib import contextmanager

from kvpass.errors import CapacityError, IntegrityError
from kvpass.runtime.block_pool import BlockPool
from kvpass.runtime.prefix_cache import PrefixCache
from kvpass.runtime.sequence import Sequence, SequenceState
from kvpass.runtime.step import SchedulerCounts, Step, TokenRange
from kvpass.runtime.step_registry import StepRegistry


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
        window: int | None = None,
    ) -> None:
        self._pool = pool
        self._prefix_cache = prefix_cache
        # Newest tokens, its own included, that a query may look at in any cache; None when one cache has no window.
        self._window = window
        self._max_batch_tokens = max_batch_tokens
        # No more run than there are tokens in a step, so that each running sequence gets one in every step.
        self._max_running = min(max_sequences, max_batch_tokens)
        self.counts = SchedulerCounts()
        self._arrivals = 0
        # Both oldest first, and everything that runs is older than everything that waits. Between steps all running
        # sequences but the last lack exactly one token; those that wait have no blocks.
        self._running: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        # The step between schedule and commit, and what it registered.
        self._in_flight: Step | None = None
        self._registry = StepRegistry(pool, prefix_cache)
        # False while blocks change hands: if an exception leaves it so, nothing is known but the tokens. Even then
        # each unfinished sequence is in at least one of the two queues, so that none is lost.
        self._intact = True

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that are queued, preempted ones included."""
        return len(self._waiting)

    @property
    def decoding(self) -> list[Sequence]:
        """Running sequences of which nothing but the newest token is left to compute."""
        return [sequence for sequence in self._running if sequence.num_computed == sequence.num_tokens - 1]

    def check_fits(self, sequence: Sequence) -> None:
        """Raise :class:`CapacityError` if the pool is too small for ``sequence`` even when nothing else runs."""
        tokens = sequence.max_cached_tokens
        need = self._pool.blocks_for(tokens)
        if need > self._pool.num_blocks:
            raise CapacityError(
                f"a request with a prompt of {sequence.prompt_length} tokens and max_new_tokens="
                f"{sequence.max_new_tokens} needs {need} blocks of {self._pool.block_size} tokens, and the pool has "
                f"{self._pool.num_blocks}: give the cache more memory (CacheConfig memory or num_blocks), or lower "
                f"max_new_tokens, or shorten the prompt"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence.

        Raises:
            CapacityError: if it could never be computed.
        """
        self.check_fits(sequence)
        if sequence.state is not SequenceState.NEW:
            raise IntegrityError("a sequence can be added only once")
        with self._changing():
            sequence.arrival = self._arrivals
            self._arrivals += 1
            sequence.state = SequenceState.WAITING
            self._waiting.append(sequence)

    def schedule(self) -> Step:
        """Choose the next step and give its tokens their blocks; :meth:`commit` it once it is computed."""
        self._require_no_step("schedule")
        with self._changing():
            preemptions = self.counts.preemptions
            ranges: list[TokenRange] = []
            budget = self._max_batch_tokens
            # _grow may shorten the list from its end, never before the sequence at hand.
            while len(ranges) < len(self._running):
                sequence = self._running[len(ranges)]
                end = min(sequence.num_tokens, sequence.num_computed + budget)
                if not self._grow(sequence, end):
                    break
                if sequence.num_draft and end == sequence.num_tokens:
                    # One token of the budget belongs to each sequence that follows.
                    spare = budget - (end - sequence.num_computed) - (len(self._running) - len(ranges) - 1)
                    end += self._grow_for_draft(sequence, spare)
                ranges.append(self._place(sequence, end))
                budget -= end - ranges[-1].start
            if self._waiting and preemptions == self.counts.preemptions:
                ranges += self._admit(budget)
            reached = [(sequence, end - sequence.num_tokens) for sequence, _, end in ranges]
            reached = [(sequence, drafted) for sequence, drafted in reached if drafted >= 0]
            sampled = tuple(sequence for sequence, _ in reached)
            step = Step(tuple(ranges), sampled, tuple(drafted for _, drafted in reached))
            if ranges:
                self._in_flight = step
        return step

    def commit(self, step: Step, tokens: Ordered[Ordered[int] | None]) -> None:
        """Take note that ``step`` is computed, and of the new ``tokens`` of each of ``step.sampled``, at least one.

        What was computed of proposed tokens is kept as far as the new tokens are the proposed ones; of the others, and
        of the last one, nothing is computed yet. Tokens after the one that ends a sequence are dropped. None instead of
        tokens ends a sequence in error; what it registered is forgotten. Finished sequences give their blocks back.
        """
        if step is not self._in_flight or len(tokens) != len(step.sampled) or [] in tokens:
            raise IntegrityError("commit takes the step in flight, and at least one token for each sampled sequence")
        with self._changing():
            self._count(step)
            for sequence, _, end in step.ranges:
                sequence.num_computed = min(end, sequence.num_tokens)
            for sequence, drafted, new in zip(step.sampled, step.drafted, tokens, strict=True):
                if new is None:
                    self._registry.forget_content(sequence)
                    sequence.finish("error")
                else:
                    self._accept(sequence, drafted, new)
            self._registry.settle()
            for sequence in step.sampled:
                if sequence.state is SequenceState.FINISHED:
                    self._pool.release(sequence.take_blocks())
            self._running = [sequence for sequence in self._running if sequence.state is SequenceState.RUNNING]
            for sequence in self._running:
                self._give_back_passed(sequence)
            self._in_flight = None

    def cancel(self, sequences: Iterable[Sequence]) -> None:
        """Drop sequences wherever they are, and give their blocks back; finished ones are left as they are."""
        self._require_no_step("cancel")
        dropped = {sequence for sequence in sequences if sequence.state is not SequenceState.FINISHED}
        if not dropped:
            return
        with self._changing():
            for sequence in dropped:
                self._pool.release(sequence.take_blocks())
                sequence.finish(None)
            self._running = [sequence for sequence in self._running if sequence not in dropped]
            self._waiting = deque(sequence for sequence in self._waiting if sequence not in dropped)

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
                while self._running:
                    self._requeue_youngest()
                self._in_flight = None
            return True
        return False

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
        tables = [sequence.blocks for sequence in self._running]
        self._pool.check_integrity([*tables, self._registry.referenced_blocks])
        if self._prefix_cache is not None:
            self._prefix_cache.check_integrity()
        arrivals = [sequence.arrival for sequence in (*self._running, *self._waiting)]
        _require(arrivals == sorted(set(arrivals)), "the sequences are not in the order of their arrival")
        _require(len(self._running) <= self._max_running, "more sequences run than may")
        _require(self._in_flight is not None or self._registry.is_settled, "a step was left half done")
        for sequence in self._running:
            _require(sequence.state is SequenceState.RUNNING, "a sequence runs that should not")
            lacking = sequence.num_tokens - sequence.num_computed
            _require(lacking > 0, "a sequence runs that has nothing left to compute")
            if self._in_flight is None and sequence is not self._running[-1]:
                _require(lacking == 1, "a sequence is in prefill that is not the youngest")
            _require(sequence.num_computed <= sequence.num_blocks * self._pool.block_size, "tokens without a block")
            passed = self._count_passed(sequence.num_computed)
            _require(sequence.num_passed <= passed, "a block was given back that is still seen")
            _require(not sequence.table[: sequence.num_passed].any(), "a block that was given back is in a table")
        for sequence in self._waiting:
            _require(sequence.state is SequenceState.WAITING, "a sequence waits that should not")
            _require(sequence.num_blocks == sequence.num_computed == 0, "a waiting sequence holds blocks")

    def _admit(self, budget: int) -> list[TokenRange]:
        """Start waiting sequences, in order, as long as there are tokens and blocks for them."""
        ranges: list[TokenRange] = []
        # Blocks that running sequences will soon ask for. Without this reserve a sequence that has just started
        # would be the first to be preempted, again and again.
        reserve = sum(self._will_grow(sequence) for sequence in self._running)
        while budget and self._waiting and len(self._running) < self._max_running:
            sequence = self._waiting[0]
            if not self._start(sequence, reserve):
                break
            self._running.append(sequence)
            self._waiting.popleft()
            sequence.state = SequenceState.RUNNING
            reserve += self._will_grow(sequence)
            end = min(sequence.num_tokens, sequence.num_computed + budget)
            budget -= end - sequence.num_computed
            ranges.append(self._place(sequence, end))
        return ranges

    def _start(self, sequence: Sequence, reserve: int) -> bool:
        """Give a waiting sequence the blocks of all its tokens, registered ones as far as there are any."""
        match = self._registry.find_prefix(sequence)
        path = () if match is None else match.path
        passed = self._count_passed(len(path) * self._pool.block_size)
        shared = self._pool.count_unreferenced(b for node in path[passed:] if (b := node.blocks[0]) is not None)
        need = self._pool.blocks_for(sequence.num_tokens) - len(path)
        if self._pool.num_available - shared - need < reserve:
            return False
        if match is not None:
            self._registry.take_over(sequence, match, passed)
        sequence.add_blocks(self._pool.allocate(need))
        self.counts.prefix_hit_tokens += sequence.num_computed
        self.counts.prefix_lookup_tokens += sequence.num_tokens
        return True

    def _count_passed(self, num_computed: int) -> int:
        """Blocks from the front of a table that neither the token at ``num_computed`` nor any later one looks at."""
        if self._window is None:
            return 0
        return max(0, num_computed - self._window + 1) // self._pool.block_size

    def _give_back_passed(self, sequence: Sequence) -> None:
        self._pool.release(sequence.pass_blocks(self._count_passed(sequence.num_computed)))

    def _will_grow(self, sequence: Sequence) -> bool:
        return self._pool.blocks_for(sequence.max_cached_tokens) > sequence.num_blocks

    def _grow(self, sequence: Sequence, length: int) -> bool:
        """Give a running sequence blocks for ``length`` tokens; False if it was preempted for lack of them."""
        need = self._pool.blocks_for(length) - sequence.num_blocks
        if need <= 0:
            return True
        while self._pool.num_available < need:
            youngest = self._running[-1]
            self._requeue_youngest()
            self.counts.preemptions += 1
            if youngest is sequence:
                return False
        sequence.add_blocks(self._pool.allocate(need))
        return True

    def _grow_for_draft(self, sequence: Sequence, spare: int) -> int:
        """Give a running sequence blocks for proposed tokens, at most ``spare``; gives for how many there are blocks.

        Nobody is preempted for them.
        """
        wanted = min(sequence.num_draft, spare)
        need = self._pool.blocks_for(sequence.num_tokens + wanted) - sequence.num_blocks
        count = max(0, min(need, self._pool.num_available))
        sequence.add_blocks(self._pool.allocate(count))
        slots = sequence.num_blocks * self._pool.block_size
        return min(wanted, slots - sequence.num_tokens)

    def _accept(self, sequence: Sequence, drafted: int, new: Ordered[int]) -> None:
        """Append new tokens; as far as they were proposed, and but for the last one, they are computed already."""
        matching = 0
        for token, proposed in zip(new[:-1], sequence.draft[:drafted], strict=False):
            if token != proposed:
                break
            matching += 1
        sequence.num_computed += matching
        self.counts.drafted_tokens += drafted
        self.counts.accepted_tokens += matching
        for token in new:
            sequence.append(token)
            if sequence.state is SequenceState.FINISHED:
                break
        if matching:
            self._registry.register(sequence, min(sequence.num_computed, sequence.num_tokens))

    def _requeue_youngest(self) -> None:
        sequence = self._running[-1]
        self._waiting.appendleft(sequence)
        self._running.pop()
        self._pool.release(sequence.take_blocks())
        sequence.state = SequenceState.WAITING

    def _place(self, sequence: Sequence, end: int) -> TokenRange:
        """Put tokens up to ``end`` into the step, and register the blocks that become full."""
        # Proposed tokens may be rejected, and are registered once they are not.
        self._registry.register(sequence, min(end, sequence.num_tokens))
        return TokenRange(sequence, sequence.num_computed, end)

    def _count(self, step: Step) -> None:
        counts = self.counts
        counts.steps += 1
        for sequence, start, end in step.ranges:
            known = min(end, sequence.num_tokens)
            if known - start == 1 and start >= sequence.prompt_length:
                counts.decode_tokens += 1
            else:
                counts.prefill_tokens += known - start
            counts.unused_slots += sequence.num_blocks * self._pool.block_size - end
        counts.allocated_slots += self._pool.num_used * self._pool.block_size

    def _reset(self) -> None:
        """Free all blocks and recompute every unfinished sequence; may itself be interrupted and done again."""
        self._pool.reset()
        if self._prefix_cache is not None:
            self._prefix_cache.reset()
        unfinished = {s for s in (*self._running, *self._waiting) if s.state is not SequenceState.FINISHED}
        self._waiting = deque(sorted(unfinished, key=lambda sequence: sequence.arrival))
        self._running = []
        for sequence in self._waiting:
            sequence.take_blocks()
            sequence.state = SequenceState.WAITING
        self._registry.start_anew()
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
