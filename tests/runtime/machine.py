"""A machine that really reads and writes slots, and whose tokens depend on every one of them."""

import random
from dataclasses import dataclass

import numpy as np
import torch

from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.pool.state_slots import StateSlots, move_states
from kvpass.runtime.prefix.prefix_cache import PrefixCache
from kvpass.runtime.schedule.scheduler import Scheduler
from kvpass.runtime.sequences.draft_tree import merge_paths
from kvpass.runtime.sequences.sequence import Sequence, SequenceState
from kvpass.runtime.speculation.accepted_rows import rows_to_move
from kvpass.types import Sampling

VOCABULARY = 5


def extend(history: int, token: int) -> int:
    """What a slot holds: it depends on its token and on all tokens before it, as the cache of a deep layer does."""
    return (history * 1_000_003 + token + 1) % (2**61 - 1)


def histories(tokens):
    found, history = [], 0
    for token in tokens:
        history = extend(history, token)
        found.append(history)
    return found


def expected_output(prompt, max_new_tokens, stop_ids=()):
    history = histories(prompt)[-1]
    output = []
    while len(output) < max_new_tokens and not (output and output[-1] in stop_ids):
        output.append(history % VOCABULARY)
        history = extend(history, output[-1])
    return output


class HostMemory:
    """Keeps what blocks held, as far as there is room; may be told to lose it."""

    def __init__(self, machine, num_blocks):
        self.machine = machine
        self.room = num_blocks
        self.kept = {}
        self.lost = False

    def swap_out(self, blocks, places, computed):
        assert len(blocks) == len(places) and max(places) * self.machine.pool.block_size < computed
        if len(blocks) > self.room:
            return None
        self.room -= len(blocks)
        handle = object()
        self.kept[handle] = self.machine.block_view()[list(blocks)].copy()
        return handle

    def swap_in(self, handle, targets):
        if self.lost:
            return False
        for place, block in targets:
            self.machine.block_view()[block] = self.kept[handle][place]
        return True

    def discard(self, handle):
        self.room += len(self.kept.pop(handle))

    def clear(self):
        for handle in list(self.kept):
            self.discard(handle)


@dataclass
class Search:
    """A beam search whose choices are drawn.

    Attributes:
        beams: sequences that are followed.
        count: most of them at once.
        steps: how often they still go on.
        numbers: what draws who goes on, and with which token.
        outputs: the tokens that each beam has got.
    """

    beams: list[Sequence]
    count: int
    steps: int
    numbers: random.Random
    outputs: dict[Sequence, list[int]]


class Machine:
    """Scheduler, pool and the slots of imaginary caches, one for each group.

    With ``recurrent`` each sequence also has a state, which takes in token after token, and tokens follow from it.

    Attributes:
        stretch: what the lengths of random requests are multiplied with.
    """

    stretch = 1

    def __init__(
        self,
        num_blocks=16,
        block_size=4,
        sharing=True,
        max_batch_tokens=16,
        max_sequences=4,
        window=None,
        windows=None,
        host_blocks=0,
        recurrent=False,
    ):
        self.windows = windows or (window,)
        self.pool = BlockPool(num_blocks, block_size)
        self.prefix = PrefixCache(self.pool, self.windows) if sharing else None
        self.host = HostMemory(self, host_blocks) if host_blocks else None
        self.now = 0.0
        most = min(max_sequences, max_batch_tokens)
        self.states = np.full(most, -1, dtype=np.int64) if recurrent else None
        self.scheduler = Scheduler(
            self.pool,
            self.prefix,
            max_batch_tokens,
            max_sequences,
            self.windows,
            self.host,
            lambda: self.now,
            slots=StateSlots(most) if recurrent else None,
        )
        self.max_batch_tokens = max_batch_tokens
        self.slots = np.full(num_blocks * block_size, -1, dtype=np.int64)
        self.sequences: list[tuple[Sequence, list[int]]] = []
        self.num_copied = 0
        self.num_moved = 0
        self.num_states_copied = 0
        self.searches: list[Search] = []

    def block_view(self):
        return self.slots.reshape(-1, self.pool.block_size)

    def add(self, prompt, max_new_tokens=4, stop_ids=(), **options):
        sequence = Sequence(list(prompt), max_new_tokens, Sampling(), 0, stop_ids)
        for name, value in options.items():
            setattr(sequence, name, value)
        self.scheduler.add(sequence)
        self.sequences.append((sequence, expected_output(prompt, max_new_tokens, stop_ids)))
        return sequence

    def add_samples(self, count, prompt, max_new_tokens=4, stop_ids=(), **options):
        first = self.add(prompt, max_new_tokens, stop_ids, **options)
        return [first, *(self.add(prompt, max_new_tokens, stop_ids, **options, leader=first) for _ in range(count - 1))]

    def fork(self, sequence, count):
        expected = next(expected for known, expected in self.sequences if known is sequence)
        twins = self.scheduler.fork(sequence, range(count))
        self.sequences += [(twin, expected) for twin in twins]
        return twins

    def add_beams(self, count, steps, numbers, prompt, **options):
        """A search that follows up to ``count`` beams for so many steps, which go on as ``numbers`` will have it."""
        root = self.add(prompt, steps + 1, **options)
        self.sequences.pop()
        self.searches.append(Search([root], count, steps, numbers, {root: list(root.output)}))
        self.sequences.append((root, self.searches[-1].outputs[root]))

    def held_later(self, sequence):
        """Whether a sequence is a beam, which gets its tokens from :meth:`advance_beams`."""
        return any(sequence in search.beams for search in self.searches)

    def advance_beams(self):
        """Where all beams of a search are held, some are forked, some are dropped, and each gets any token."""
        for search in self.searches:
            search.beams = [beam for beam in search.beams if beam.state is not SequenceState.FINISHED]
            if not search.beams or not all(beam.held for beam in search.beams):
                continue
            search.steps -= 1
            if search.steps < 0:
                self.scheduler.cancel(search.beams)
                continue
            parents = search.numbers.choices(search.beams, k=search.numbers.randint(1, search.count))
            self.scheduler.cancel([beam for beam in search.beams if beam not in parents])
            beams = []
            for parent in parents:
                beam = parent
                if parent in beams:
                    (beam,) = self.scheduler.fork(parent, [0])
                    search.outputs[beam] = list(search.outputs[parent])
                    self.sequences.append((beam, search.outputs[beam]))
                beams.append(beam)
            for beam in beams:
                search.outputs[beam].append(search.numbers.randrange(VOCABULARY))
                self.scheduler.extend(beam, search.outputs[beam][-1])
            search.beams = beams
        self.searches = [search for search in self.searches if search.beams]

    def step(self):
        self.advance_beams()
        step = self.scheduler.schedule()
        if step.ranges:
            self.compute(step)
            self.scheduler.commit(step, self.next_tokens(step))
        return step

    def propose(self, sequence, accepted, rejected, wrong=0):
        """Propose the next ``accepted`` tokens, and ``rejected`` wrong ones after them; in a tree, behind wrong ones.

        The tree begins with a path of ``wrong`` wrong tokens, so that the right ones are not where they belong.
        """
        history, draft = histories(sequence.tokens.tolist())[-1], []
        for i in range(accepted + rejected):
            token = (history + (i >= accepted)) % VOCABULARY
            history = extend(history, token)
            draft.append(token)
        if wrong and draft:
            tree = merge_paths([[(draft[0] + 1) % VOCABULARY] * wrong, draft])
            sequence.propose(tree.tokens, tree.parents)
        else:
            sequence.propose(draft)

    def values_of(self, sequence, end):
        """What the first ``end`` slots of a sequence have to hold."""
        known = histories(sequence.tokens_to_compute(0, min(end, sequence.num_tokens)).tolist())
        tree = sequence.draft_tree(max(0, end - sequence.num_tokens))
        for token, parent in zip(tree.tokens, tree.parents, strict=True):
            known.append(extend(known[sequence.num_tokens + parent], token))
        return known

    def compute(self, step):
        """Make the copies, write all slots, then check that every sequence reads its own tokens and nothing else.

        With a window each reads what its oldest new token sees, and what comes after.
        """
        if step.copies:
            self.copy(*map(list, zip(*step.copies, strict=True)))
        assert sum(end - start for _, start, end in step.ranges) <= self.max_batch_tokens
        for group in range(len(self.windows)):
            self.check_writes(step, group)
        self.write(step)
        for group, window in enumerate(self.windows):
            for sequence, start, end in step.ranges:
                self.check_reads(sequence, group, 0 if window is None else max(0, start - window + 1), end)
        if self.states is not None:
            self.compute_states(step)

    def compute_states(self, step):
        """Move the states, have each take in its new tokens, and check that it knows all of its own and no other."""
        move_states((torch.from_numpy(self.states),), step.state_moves)
        self.num_states_copied += sum(move.source is not None for move in step.state_moves)
        owned = [sequence.state_slot for sequence in self.scheduler._queues.running]
        self.states[np.setdiff1d(np.arange(len(self.states)), owned)] = -1  # worth nothing from here on
        assert len({sequence.state_slot for sequence, _, _ in step.ranges}) == len(step.ranges)
        for sequence, start, end in step.ranges:
            state = int(self.states[sequence.state_slot])
            for token in sequence.tokens_to_compute(start, end).tolist():
                state = extend(state, token)
            assert state == histories(sequence.tokens[:end].tolist())[-1], "a state is not that of its tokens"
            self.states[sequence.state_slot] = state

    def copy(self, sources, targets):
        assert len(set(targets)) == len(targets)
        self.block_view()[targets] = self.block_view()[sources]
        self.num_copied += len(sources)

    def check_writes(self, step, group):
        """Nobody writes to what others own, or what is registered."""
        size = self.pool.block_size
        pending = self.scheduler._registry.pending_blocks
        untouchable = self.pool.kept_blocks() - pending
        writers: dict[int, Sequence] = {}
        for sequence, start, end in step.ranges:
            assert start < end <= sequence.num_tokens + sequence.num_draft
            for block in sequence.tables[group].entries[start // size : (end - 1) // size + 1].tolist():
                assert block not in untouchable, "a registered block is written again"
                assert writers.setdefault(block, sequence) is sequence, "two sequences write one block"
                held = sum(source == block for source, _ in step.copies)
                assert block in pending or self.pool.count_owners(block) - held == 1, "a block of two owners is written"

    def write(self, step):
        size = self.pool.block_size
        for sequence, start, end in step.ranges:
            positions, values = np.arange(start, end), np.array(self.values_of(sequence, end)[start:])
            for group, table in enumerate(sequence.tables):
                slots = table.entries[positions // size] * size + positions % size
                self.slots[slots] = values + self.mark(sequence, group)

    def check_reads(self, sequence, group, first, end):
        """A sequence reads its own tokens from ``first`` to ``end``."""
        size, positions = self.pool.block_size, np.arange(first, end)
        read = self.slots[sequence.tables[group].entries[positions // size] * size + positions % size]
        assert (read - self.mark(sequence, group)).tolist() == self.values_of(sequence, end)[first:]

    def mark(self, sequence, group):
        """What tells the slots of a group, and of a namespace, from those of others; a multiple of 5 for group 0."""
        return group + (1_000_000_000 if sequence.namespace else 0)

    def next_tokens(self, step):
        """For each sampled sequence the tokens that follow, as far as what was proposed is right, and one more.

        What is accepted of trees is moved to its place.
        """
        found = []
        for sequence, drafted in zip(step.sampled, step.drafted, strict=True):
            if self.held_later(sequence):
                found.append([])
                continue
            tree, new = sequence.draft_tree(drafted), [self.token_after(sequence, sequence.num_tokens - 1)]
            while len(path := tree.follow(new)) == len(new):
                new.append(self.token_after(sequence, sequence.num_tokens + path[-1]))
            found.append(new)
        moves = rows_to_move(step, found, self.pool.block_size)
        for source, target in () if moves is None else zip(*moves, strict=True):
            self.slots[target] = self.slots[source]
            self.num_moved += len(source)
        return found

    def token_after(self, sequence, position):
        block, offset = divmod(position, self.pool.block_size)
        owner = sequence.leader or sequence
        if self.states is not None:
            return int(self.states[owner.state_slot] % VOCABULARY)
        return self.read(owner.tables[0][block], offset) % VOCABULARY

    def read(self, block, offset):
        return int(self.slots[block * self.pool.block_size + offset])

    def run(self, limit=10_000):
        steps = 0
        while self.step().ranges or self.searches:
            self.scheduler.check_integrity()
            steps += 1
            assert steps < limit, "the scheduler does not come to an end"
        return steps

    def forget_finished(self):
        """Check and drop the sequences that have ended."""
        self.check_outputs()
        self.sequences = [pair for pair in self.sequences if pair[0].state is not SequenceState.FINISHED]

    def check_outputs(self):
        for sequence, expected in self.sequences:
            if sequence.finish_reason in ("length", "stop"):
                assert sequence.output == expected
            else:
                assert sequence.output == expected[: sequence.num_output]

    def check_empty(self):
        self.scheduler.check_integrity()
        if self.prefix is not None:
            self.prefix.pins.clear()
        assert (self.pool.num_used, self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0, 0)
        self.scheduler.clear_prefix_cache()
        assert self.pool.num_free == self.pool.num_blocks
        assert self.host is None or not self.host.kept
