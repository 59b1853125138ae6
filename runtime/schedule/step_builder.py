"""What a step computes: which running sequences go on and how far, who starts, and who has to make room."""

from __future__ import annotations

import sys

from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.prefix.pins import Pins
from kvpass.runtime.prefix.prefix_nodes import Branch
from kvpass.runtime.schedule.queues import Queues, rank_of
from kvpass.runtime.sequences.holdings import Holdings
from kvpass.runtime.sequences.sequence import Sequence
from kvpass.runtime.sequences.step import SchedulerCounts, TokenRange
from kvpass.runtime.sequences.step_registry import StepRegistry

# Seconds that a request waits for what is read for it, where nobody else could compute meanwhile.
_LONGEST_WAIT = 30.0


class StepBuilder:
    """Chooses the token ranges of one step after the other, and gives their tokens their blocks."""

    def __init__(
        self,
        pool: BlockPool,
        queues: Queues,
        holdings: Holdings,
        registry: StepRegistry,
        pins: Pins | None,
        max_batch_tokens: int,
        counts: SchedulerCounts,
        prefix: int = 0,
    ) -> None:
        self._pool = pool
        self._queues = queues
        self._holdings = holdings
        self._registry = registry
        self._pins = pins
        self._max_batch_tokens = max_batch_tokens
        self._counts = counts
        # First tokens of each sequence that are computed in one step.
        self._prefix = prefix
        # Blocks of tokens that somebody has begun to compute, and what they follow.
        self._begun: set[tuple[Branch, bytes]] = set()
        # Whether somebody in the step being built computes more than one token.
        self._prefilling = False

    def build(self) -> list[TokenRange]:
        """The ranges of the next step, in the order of rank but for those who start."""
        if self._pins is not None:
            self._pins.expire()
        self._make_way()
        self._begun, self._prefilling = set(), False
        ranges: list[TokenRange] = []
        budget = self._advance(ranges)
        if budget is not None:
            self._admit(ranges, budget)
        # Where all who run are held, they wait for somebody who has no room: they go, the last first, until he has.
        while not ranges and self._queues.running and self._queues.waiting.first() is not None:
            self._preempt()
            self._admit(ranges, self._max_batch_tokens)
        return ranges

    def _advance(self, ranges: list[TokenRange]) -> int | None:
        """Put the running sequences into the step, in order.

        Returns:
            what is left of the token budget for others; None if somebody was preempted.
        """
        running, holdings = self._queues.running, self._holdings
        lacking = [n for sequence in running if (n := sequence.num_tokens - sequence.num_computed) > 1]
        # One token of the budget belongs to each sequence that decodes.
        spare = self._max_batch_tokens - (len(running) - len(lacking))
        shortest = self._shortest_waiting()
        preempted = False
        size = self._pool.block_size
        for sequence in running:  # preemption shortens the list from its end, never before the sequence at hand
            first, end = sequence.num_computed, sequence.num_tokens
            if first == end:
                continue  # it is held
            in_prefill = end - first > 1
            if not in_prefill and first % size and end % size and not (sequence.num_draft or sequence.shares_tail):
                ranges.append((sequence, first, end))  # its block is there, and will not be full
                continue
            if in_prefill:
                del lacking[0]
                if spare <= 0:
                    continue
                self._counts.prefix_hit_tokens += holdings.take_over_more(sequence)
                end = self._end_of_chunk(sequence, spare, min(lacking, default=shortest))
                if end == sequence.num_computed:
                    continue
            if holdings.missing(sequence, end) > self._pool.num_available:
                preempted = True
                if not self._make_room(sequence, end):
                    if not in_prefill:
                        self._preempt()
                        break
                    continue  # it keeps what it has, and those before it go on
            if in_prefill:
                spare -= end - sequence.num_computed
            # Who is forked after this step must not have written what comes after the prompt.
            takes_draft = end == sequence.num_tokens and sequence not in self._queues.followers
            # Nor can a recurrent state forget what turns out to be wrong.
            if sequence.num_draft and takes_draft and sequence.state_slot is None:
                drafted = holdings.longest(sequence, end + min(sequence.num_draft, max(0, spare))) - end
                spare -= drafted
                end += drafted
            ranges.append(self._place(sequence, end))
        return None if preempted else spare

    def _admit(self, ranges: list[TokenRange], budget: int) -> None:
        """Start waiting sequences, in order, as long as there are tokens and blocks for them."""
        # Blocks that running sequences will soon ask for. Without this reserve a sequence that has just started
        # would be the first to be preempted, again and again.
        reserve: int | None = None
        queues = self._queues
        while budget > 0 and not queues.is_full:
            sequence = queues.waiting.first()
            if sequence is None:
                break
            if sequence.ahead is not None:
                if queues.running and not sequence.ahead.is_done:
                    break  # the others compute meanwhile
                sequence.ahead.wait(_LONGEST_WAIT)
                sequence.ahead = None
            if reserve is None:
                reserve = sum(map(self._holdings.will_need, queues.running))
            swapped = sequence.swapped_tokens
            if not self._holdings.start(sequence, reserve, alone=not queues.running):
                if sequence.swapped_tokens != swapped or (not queues.running and self._unpin()):
                    continue  # what was swapped out is lost, or a pin was in the way
                break
            hits = sequence.num_computed
            if swapped and hits == swapped:
                hits = sequence.num_registered * self._pool.block_size
                self._counts.restored_tokens += swapped - hits
            self._counts.prefix_hit_tokens += hits
            self._counts.prefix_lookup_tokens += sequence.num_tokens
            queues.run(sequence)
            end = self._end_of_chunk(sequence, budget, self._shortest_waiting())
            if end > sequence.num_computed:
                budget -= end - sequence.num_computed
                ranges.append(self._place(sequence, end))
            reserve += self._holdings.will_need(sequence)

    def _shortest_waiting(self) -> int:
        """Tokens of the first waiting sequence, if it may start; else more than anybody has."""
        first = None if self._queues.is_full else self._queues.waiting.first()
        return sys.maxsize if first is None else first.num_tokens

    def _is_begun(self, sequence: Sequence) -> bool:
        """Whether somebody before ``sequence`` computes its very next block, which it can take over once it is full."""
        at_block = sequence.num_computed == sequence.num_registered * self._pool.block_size
        return bool(self._begun) and at_block and self._registry.next_block(sequence) in self._begun

    def _end_of_chunk(self, sequence: Sequence, spare: int, shortest: int) -> int:
        """How far a sequence is computed in this step, by tokens to spare and by blocks.

        By one token at least, but by none if somebody before it does what it can take over then, or if its prefix
        would be cut.

        Args:
            spare: tokens to spare, more than none.
            shortest: fewest tokens that somebody behind it lacks; if it lacks more, it leaves half of what is spare.
        """
        first, size = sequence.num_computed, self._pool.block_size
        if self._is_begun(sequence):
            return first
        lacking = sequence.num_tokens - first
        end = first + min(lacking, spare)
        if lacking > spare and shortest < lacking:
            end = first + max(1, spare // 2)
        # Chunks that end with a block let those behind take over what was computed, and go on from there.
        if sequence.branch is not None and end < sequence.num_tokens:
            if end - end % size > first:
                end -= end % size
            elif self._prefilling:
                return first
        if first < self._prefix:
            end = max(end, min(self._prefix, first + spare))
        end = max(first + 1, self._holdings.longest(sequence, end))
        return end if end >= self._prefix else first

    def _make_room(self, sequence: Sequence, end: int) -> bool:
        """Preempt those behind ``sequence`` until it can have its blocks up to ``end``; False if that is not enough."""
        while self._holdings.missing(sequence, end) > self._pool.num_available:
            if self._queues.running[-1] is not sequence:
                self._preempt()
            elif len(self._queues.running) > 1 or not self._unpin():
                return False
        return True

    def _make_way(self) -> None:
        """Preempt running sequences of a lower priority than the first waiting one, if it can run instead."""
        running, first = self._queues.running, self._queues.waiting.first()
        if first is None or not running or running[-1].priority >= first.priority:
            return
        need = self._holdings.most_held(0, first.num_tokens, self._max_batch_tokens)
        need += sum(map(self._holdings.will_need, running))
        gain, victims, full = self._pool.num_available, 0, self._queues.is_full
        for sequence in reversed(running):
            if gain >= need and not full:
                break
            if sequence.priority >= first.priority or rank_of(sequence) < rank_of(first):
                return
            gain += self._holdings.count_held(sequence)
            victims, full = victims + 1, False
        for _ in range(victims):
            self._preempt()

    def _unpin(self) -> bool:
        """End a pin, which only happens when nothing could run beside it; False if there is none."""
        return self._pins is not None and self._pins.release_oldest()

    def _preempt(self) -> None:
        """Stop the last running sequence; what it has computed is put aside, if there is room."""
        self._counts.preemptions += 1
        self._holdings.put_aside(self._queues.stop_last())

    def _place(self, sequence: Sequence, end: int) -> TokenRange:
        """Put tokens up to ``end`` into the step, and register the blocks that become full."""
        self._holdings.grow(sequence, end)
        # Proposed tokens may be rejected, and are registered once they are not.
        self._registry.register(sequence, min(end, sequence.num_tokens))
        self._prefilling |= end - sequence.num_computed > 1
        if end < sequence.num_tokens and end % self._pool.block_size:
            block = self._registry.next_block(sequence)
            if block is not None:
                self._begun.add(block)
        return sequence, sequence.num_computed, end
