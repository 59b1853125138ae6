"""What sequences hold: how many blocks they need, and how they get, share, copy and give them back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Ordered

import numpy as np
from numpy.typing import NDArray

from kvpass.errors import IntegrityError
from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.pool.block_table import BlockTable
from kvpass.runtime.pool.state_slots import StateMove, StateSlots
from kvpass.runtime.prefix.prefix_nodes import Match, PrefixNode
from kvpass.runtime.sequences.sequence import Sequence
from kvpass.runtime.sequences.step import Step
from kvpass.runtime.sequences.step_registry import StepRegistry
from kvpass.runtime.tiers.host_memory import StoredBlock
from kvpass.runtime.tiers.swap_space import SwapSpace
from kvpass.types import AttentionSinks, HeavyHitters


class Holdings:
    """The block tables of sequences over one pool.

    In a group with a window, blocks that neither the next token nor any later one looks at are given back; their
    entries in the table stay, as 0: no kernel follows an entry that no query sees.

    Attributes:
        copies: pairs (source, destination) of blocks that the step being scheduled copies before it is computed.
    """

    def __init__(
        self,
        pool: BlockPool,
        registry: StepRegistry,
        windows: Ordered[int | None],
        max_chunk: int,
        swap: SwapSpace | None = None,
        forgetting: AttentionSinks | HeavyHitters | None = None,
        slots: StateSlots | None = None,
    ) -> None:
        self._pool = pool
        # Where the recurrent states of those who run are; None where there are none.
        self._slots = slots
        self._registry = registry
        # Of each group the newest tokens, its own included, that a query may look at; None for all.
        self._windows = tuple(windows)
        # What sequences forget; only where no group has a window. None where everything is remembered.
        self._forgetting = forgetting.ends if isinstance(forgetting, HeavyHitters) else forgetting
        # Blocks beside the sinks and the newest that stay for the attention they have received; None where none do.
        self._heavy = forgetting.heavy_blocks(pool.block_size) if isinstance(forgetting, HeavyHitters) else None
        self._bounded = forgetting is not None or any(window is not None for window in windows)
        self._max_chunk = max_chunk
        self._swap = swap
        self.copies: list[tuple[int, int]] = []

    def open(self, sequence: Sequence) -> None:
        """Give a new sequence its empty tables."""
        kept = 0 if self._forgetting is None else self._forgetting.kept_blocks(self._pool.block_size)
        sequence.tables = tuple(BlockTable(kept) for _ in self._windows)

    def count_passed(self, num_computed: int) -> list[int]:
        """In each group the first blocks that neither the token at ``num_computed`` nor any later one looks at."""
        size = self._pool.block_size
        if self._forgetting is not None:
            return [self._forgetting.count_passed(num_computed, size)] * len(self._windows)
        return [0 if window is None else max(0, num_computed - window + 1) // size for window in self._windows]

    def count_held(self, sequence: Sequence) -> int:
        """Blocks that a sequence owns, in all groups."""
        return sum(table.num_blocks - table.num_given_back for table in sequence.tables)

    def most_held(self, start: int, length: int, chunk: int) -> int:
        """Most blocks that a sequence holds at once while it grows from ``start`` to ``length`` tokens in chunks."""
        if self._forgetting is not None:
            return self._most_remembered(self._forgetting, start, length) * len(self._windows)
        most = 0
        for window, passed in zip(self._windows, self.count_passed(start), strict=True):
            blocks = self._pool.blocks_for(length) - passed
            if window is not None:
                # The newest tokens that a chunk's first query sees, and the chunk, wherever a block begins.
                span = window - 1 + min(chunk, length)
                blocks = min(blocks, self._pool.blocks_for(span + self._pool.block_size - 1))
            most += blocks
        return most

    def _most_remembered(self, forgetting: AttentionSinks, start: int, length: int) -> int:
        """The same in one group, where sequences forget."""
        size = self._pool.block_size
        kept = forgetting.kept_blocks(size)
        passed, heavy = forgetting.count_passed(start, size), self._heavy or 0
        span = self._pool.blocks_for(forgetting.window + forgetting.stride + size - 1)
        # Before the first block is given back there may be one more than the sinks and the span.
        return min(self._pool.blocks_for(length) - max(0, passed - kept - heavy), kept + heavy + 1 + span)

    def will_need(self, sequence: Sequence) -> int:
        """Blocks that a sequence will ask for to compute the tokens it has, and one for each group if it goes on."""
        lacking = sequence.num_tokens - sequence.num_computed
        slots = sequence.tables[0].num_blocks * self._pool.block_size
        more = len(self._windows) if sequence.max_cached_tokens > max(slots, sequence.num_tokens) else 0
        more += len(self._windows) if sequence.shares_tail else 0
        if sequence.num_tokens <= slots:
            return more
        most = self.most_held(sequence.num_computed, sequence.num_tokens, min(lacking, self._max_chunk))
        return max(0, most - self.count_held(sequence)) + more

    def missing(self, sequence: Sequence, length: int) -> int:
        """Blocks that have to be allocated before the tokens up to ``length`` can be computed."""
        tables = sequence.tables
        need = (self._pool.blocks_for(length) - tables[0].num_blocks) * len(tables)
        return max(0, need) + (len(self._shared_tail(sequence)) if sequence.shares_tail else 0)

    def longest(self, sequence: Sequence, length: int) -> int:
        """How far, up to ``length``, the available blocks let a sequence be computed."""
        spare = self._pool.num_available - (len(self._shared_tail(sequence)) if sequence.shares_tail else 0)
        if spare < 0:
            return sequence.num_computed
        blocks = sequence.tables[0].num_blocks + spare // len(self._windows)
        if self._forgetting is not None:
            # What is seen changes there, and has to be the same for all tokens of a step.
            length = min(length, self._forgetting.next_change(sequence.num_computed))
        return min(length, max(sequence.num_computed, blocks * self._pool.block_size))

    def grow(self, sequence: Sequence, length: int) -> None:
        """Give a sequence the blocks for its tokens up to ``length``; :meth:`missing` ones are available."""
        if sequence.shares_tail:
            self._own_tail(sequence)
        need = self._pool.blocks_for(length) - sequence.tables[0].num_blocks
        if need > 0:
            for table in sequence.tables:
                table.extend(self._pool.allocate(need))

    def start(self, sequence: Sequence, reserve: int, alone: bool) -> bool:
        """Give a waiting sequence what is there of its tokens' cache: registered blocks, and those swapped out.

        Only if the pool has room for the rest of its tokens beside ``reserve`` blocks; if it is ``alone``, for one
        token after the other is enough.
        """
        match, size = self._registry.find_prefix(sequence), self._pool.block_size
        if match is not None and match.stored and match.length * size <= sequence.swapped_tokens:
            match = Match(match.branch, match.path)  # the rest was swapped out
        found = max(0 if match is None else match.length * size, sequence.swapped_tokens)
        passed = self.count_passed(found)
        known = [] if match is None else [b for g, count in enumerate(passed) for b in match.blocks_of(g, count)]
        shared = [block for block in known if block is not None]
        chunk = 1 if alone else min(self._max_chunk, sequence.num_tokens - found)
        need = self.most_held(found, sequence.num_tokens, chunk) - len(shared)
        if self._pool.num_available - self._pool.count_unreferenced(shared) - need < reserve:
            return False
        if match is not None:
            self._registry.take_over(sequence, match, passed)
            if match.stored:
                self._load(sequence, match, passed)
        if found > sequence.num_computed and not self._swap_in(sequence, passed):
            # Of what was matched it has no more than a window beyond the rest needs.
            self.give_back_all(sequence)
            return False
        self._forget_swapped(sequence)
        if match is not None and match.partial is not None and sequence.num_computed == len(match.path) * size:
            self._copy_part(sequence, *match.partial)
        if self._slots is not None:
            sequence.state_slot = self._slots.take()
        return True

    def take_over_more(self, sequence: Sequence) -> int:
        """Take over what others have registered since of the tokens to be computed; gives how many tokens."""
        before = sequence.num_computed
        if any(table.num_blocks != sequence.num_registered for table in sequence.tables):
            return 0
        match = self._registry.find_more(sequence)
        if match is not None:
            self._registry.take_over(sequence, match, self.count_passed(len(match.path) * self._pool.block_size))
        return sequence.num_computed - before

    def share(self, sequence: Sequence, twin: Sequence) -> None:
        """Let ``twin``, which has the same tokens, own all that ``sequence`` has computed."""
        used = self._pool.blocks_for(sequence.num_computed)
        twin.tables = tuple(table.twin(used) for table in sequence.tables)
        for table in twin.tables:
            self._pool.acquire(table.owned)
        twin.num_computed, twin.received = sequence.num_computed, sequence.received.copy()
        twin.num_registered, twin.branch = sequence.num_registered, sequence.branch
        twin.shares_tail = sequence.shares_tail = sequence.num_computed % self._pool.block_size != 0
        if self._slots is not None:
            twin.state_slot = self._slots.take(like=sequence.state_slot)

    def give_back_passed(self, sequences: Iterable[Sequence]) -> None:
        """Give back what no token to come of running sequences looks at."""
        if not self._bounded:
            return
        bounded = [(group, window - 1) for group, window in enumerate(self._windows) if window is not None]
        size = self._pool.block_size
        for sequence in sequences:
            if self._forgetting is not None:
                self._give_back_forgotten(sequence, self._forgetting.count_passed(sequence.num_computed, size))
            for group, reach in bounded:
                table = sequence.tables[group]
                if (sequence.num_computed - reach) // size > table.num_passed and table.num_blocks:
                    self._pool.release(table.pass_front((sequence.num_computed - reach) // size))

    def _give_back_forgotten(self, sequence: Sequence, count: int) -> None:
        if count <= sequence.tables[0].num_passed or not sequence.tables[0].num_blocks:
            return
        if self._heavy is None:
            for table in sequence.tables:
                self._pool.release(table.pass_front(count))
            return
        passed = len(sequence.tables[0].present(count))
        kept = self._choose_kept(sequence, passed)
        for table in sequence.tables:
            self._pool.release(table.thin_front(count, kept))
        sequence.received = np.concatenate((sequence.received[kept], sequence.received[passed:]))

    def _choose_kept(self, sequence: Sequence, passed: int) -> list[int]:
        """Of the first ``passed`` blocks that are there, the places of the sinks and of the heaviest others."""
        assert self._forgetting is not None and self._heavy is not None
        sinks = self._forgetting.kept_blocks(self._pool.block_size)
        heaviest = np.argsort(-sequence.received[sinks:passed], kind="stable")[: self._heavy]
        return [*range(sinks), *(sinks + np.sort(heaviest)).tolist()]

    def note_attention(self, step: Step, received: NDArray[np.float64]) -> None:
        """Add up the attention that blocks have received in a step that is computed.

        Args:
            step: what was computed.
            received: ``[N, W]``, of the sequences of its ranges by the columns of their block tables.
        """
        for (sequence, _, _), row in zip(step.ranges, received, strict=True):
            table = sequence.tables[0]
            total = np.zeros(table.num_blocks - table.num_forgotten)
            total[: len(sequence.received)] = sequence.received
            total[: len(row)] += row[: len(total)]
            sequence.received = total

    def give_back_all(self, sequence: Sequence) -> None:
        """Empty the tables of a sequence."""
        self._pool.release(sequence.take_blocks())
        self._forget_swapped(sequence)
        self._release_slot(sequence)

    def put_aside(self, sequence: Sequence) -> None:
        """Empty the tables of a sequence that will go on later; what it has computed is swapped out if there is room.

        All of it must be there already: nothing of it is left to the step that is being scheduled.
        """
        computed, swap = sequence.num_computed, None if self._forgetting is not None else self._swap
        used = self._pool.blocks_for(computed)
        content = [block for table in sequence.tables for block in table.entries[table.num_passed : used].tolist()]
        places = [place for table in sequence.tables for place in range(table.num_passed, used)]
        handle = swap.swap_out(content, places, computed) if swap is not None and content else None
        self._pool.release(sequence.take_blocks())
        self._forget_swapped(sequence)
        self._release_slot(sequence)
        if handle is not None:
            sequence.swapped, sequence.swapped_tokens = handle, computed

    def take_state_moves(self) -> tuple[StateMove, ...]:
        """As :meth:`kvpass.runtime.pool.state_slots.StateSlots.take_moves`."""
        return () if self._slots is None else self._slots.take_moves()

    def _release_slot(self, sequence: Sequence) -> None:
        if self._slots is not None and sequence.state_slot is not None:
            self._slots.release(sequence.state_slot)
        sequence.state_slot = None

    def _load(self, sequence: Sequence, match: Match, passed: list[int]) -> None:
        """Own what the device has behind the path of a match, and fill new blocks with what is stored there."""
        first = sequence.num_registered
        for table, count in zip(sequence.tables, passed, strict=True):
            table.skip(max(0, count - first))
        known = [match.blocks_of(group, table.num_blocks) for group, table in enumerate(sequence.tables)]
        # Before anything is allocated, which may evict it.
        self._pool.acquire(block for blocks in known for block in blocks if block is not None)
        for node in match.beyond:
            node.hits += 1
        targets: dict[int, StoredBlock] = {}
        for group, (table, blocks) in enumerate(zip(sequence.tables, known, strict=True)):
            new, rows = self._pool.allocate(blocks.count(None)), match.stored[match.length - first - len(blocks) :]
            content = [row[group] for row, block in zip(rows, blocks, strict=True) if block is None]
            targets |= zip(new, (stored for stored in content if stored is not None), strict=True)
            rest = iter(new)
            table.extend([next(rest) if block is None else block for block in blocks])
        sequence.num_computed = match.length * self._pool.block_size
        self._registry.fill(targets)
        self._registry.register(sequence, sequence.num_computed, written=True)

    def _swap_in(self, sequence: Sequence, passed: list[int]) -> bool:
        """Allocate blocks for what was swapped out, beyond the matched part, and fill them; False if it was lost."""
        assert self._swap is not None and sequence.swapped is not None
        computed, hits, place = sequence.swapped_tokens, sequence.num_registered, 0
        used = self._pool.blocks_for(computed)
        targets: list[tuple[int, int]] = []
        for table, count in zip(sequence.tables, passed, strict=True):
            table.skip(max(0, count - hits))
            first = table.num_blocks
            table.extend(self._pool.allocate(used - first))
            targets += [(place + index - count, table[index]) for index in range(first, used)]
            place += used - count
        if max(passed) > hits:
            sequence.branch = None  # the blocks after it cannot be registered: some are not there
        sequence.num_computed = computed
        return self._swap.swap_in(sequence.swapped, targets)

    def _copy_part(self, sequence: Sequence, node: PrefixNode, count: int) -> None:
        """Begin the next block of a sequence as a copy of a registered one that begins with the same tokens."""
        sources = [block for block in node.blocks if block is not None]
        spare = self._pool.num_available - self._pool.count_unreferenced(sources)
        if len(sources) < len(sequence.tables) or spare < len(sources) or self._registry.is_pending(node):
            return
        self._pool.acquire(sources)
        for table, source, block in zip(sequence.tables, sources, self._pool.allocate(len(sources)), strict=True):
            table.extend([block])
            self.copies.append((source, block))
        sequence.num_computed += count

    def _forget_swapped(self, sequence: Sequence) -> None:
        if self._swap is not None and sequence.swapped is not None:
            self._swap.discard(sequence.swapped)
        sequence.swapped, sequence.swapped_tokens = None, 0

    def _shared_tail(self, sequence: Sequence) -> list[BlockTable]:
        """The tables whose block of the next token has other owners."""
        position = sequence.num_computed // self._pool.block_size
        sources = Counter(source for source, _ in self.copies)
        blocks = [table[position] for table in sequence.tables]
        owners = [self._pool.count_owners(block) - sources[block] for block in blocks]
        return [table for table, count in zip(sequence.tables, owners, strict=True) if count > 1]

    def _own_tail(self, sequence: Sequence) -> None:
        """Copy the blocks that the next token is written to, where they have other owners.

        The sources are owned until the step is computed, see :meth:`let_go`.
        """
        position = sequence.num_computed // self._pool.block_size
        for table in self._shared_tail(sequence):
            (block,) = self._pool.allocate(1)
            self.copies.append((table.replace(position, block), block))
        sequence.shares_tail = False

    def let_go(self) -> None:
        """The step has ended: nothing is copied any more, and nobody owns the sources on its behalf."""
        self._pool.release([source for source, _ in self.copies])
        self.copies = []

    def start_anew(self, sequences: Ordered[Sequence]) -> None:
        """Nobody holds anything, over a pool that was reset."""
        self.copies = []
        if self._swap is not None:
            self._swap.clear()
        if self._slots is not None:
            self._slots.reset()
        for sequence in sequences:
            sequence.take_blocks()
            sequence.state_slot = None
            sequence.swapped, sequence.swapped_tokens = None, 0

    def check_running(self, running: Ordered[Sequence], in_flight: bool) -> None:
        """As :meth:`check_integrity` for all who run; and each has a state slot of its own, and nobody else has one."""
        for sequence in running:
            self.check_integrity(sequence, in_flight)
        if self._slots is not None:
            self._slots.check_integrity(sequence.state_slot for sequence in running)

    def check_integrity(self, sequence: Sequence, in_flight: bool) -> None:
        """Assert that the tables of a running sequence are as they should be.

        Args:
            in_flight: whether a step is, so that others may own blocks that are being filled.

        Raises:
            IntegrityError: naming the invariant that does not hold.
        """
        size = self._pool.block_size
        for table, passed in zip(sequence.tables, self.count_passed(sequence.num_computed), strict=True):
            _require(sequence.num_computed <= table.num_blocks * size, "tokens without a block")
            _require(table.num_passed <= passed, "a block was given back that is still seen")
            gone = table.entries[table.num_kept : table.num_passed]
            _require(not gone.any(), "a block that was given back is in a table")
            there = table.num_blocks - table.num_forgotten
            _require(len(sequence.received) <= there, "attention is noted of a block that was given back")
            _require(table.num_blocks == sequence.tables[0].num_blocks, "the tables of a sequence differ in length")
            tail = sequence.num_computed // size
            if sequence.num_computed % size and not sequence.shares_tail and not in_flight:
                _require(self._pool.count_owners(table[tail]) == 1, "a block that one may write has two owners")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise IntegrityError(message)
