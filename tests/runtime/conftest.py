"""A machine that really reads and writes slots, and whose tokens depend on every one of them."""

import numpy as np
import pytest

from kvpass.runtime.block_pool import BlockPool
from kvpass.runtime.prefix_cache import PrefixCache
from kvpass.runtime.scheduler import Scheduler
from kvpass.runtime.sequence import Sequence
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


class Machine:
    """Scheduler, pool and the slots of one imaginary cache."""

    def __init__(self, num_blocks=16, block_size=4, sharing=True, max_batch_tokens=16, max_sequences=4, window=None):
        self.pool = BlockPool(num_blocks, block_size)
        self.prefix = PrefixCache(self.pool, (window,)) if sharing else None
        self.scheduler = Scheduler(self.pool, self.prefix, max_batch_tokens, max_sequences, window)
        self.window = window
        self.max_batch_tokens = max_batch_tokens
        self.slots = np.full(num_blocks * block_size, -1, dtype=np.int64)
        self.sequences: list[tuple[Sequence, list[int]]] = []

    def add(self, prompt, max_new_tokens=4, stop_ids=()):
        sequence = Sequence(list(prompt), max_new_tokens, Sampling(), 0, stop_ids)
        self.scheduler.add(sequence)
        self.sequences.append((sequence, expected_output(prompt, max_new_tokens, stop_ids)))
        return sequence

    def step(self):
        step = self.scheduler.schedule()
        if step.ranges:
            self.compute(step)
            self.scheduler.commit(step, self.next_tokens(step))
        return step

    def propose(self, sequence, accepted, rejected):
        """Propose the next ``accepted`` tokens, and ``rejected`` wrong ones after them."""
        history, draft = histories(sequence.tokens.tolist())[-1], []
        for i in range(accepted + rejected):
            token = (history + (i >= accepted)) % VOCABULARY
            history = extend(history, token)
            draft.append(token)
        sequence.propose(draft)

    def compute(self, step):
        """Write all slots of the step, then check that every sequence reads its own tokens and nothing else.

        With a window each reads what its oldest new token sees, and what comes after.
        """
        size = self.pool.block_size
        untouchable = self.pool.kept_blocks() - self.scheduler._registry.pending_blocks
        writers: dict[int, Sequence] = {}
        assert sum(end - start for _, start, end in step.ranges) <= self.max_batch_tokens
        for sequence, start, end in step.ranges:
            assert start < end <= sequence.num_tokens + sequence.num_draft
            values = histories(sequence.tokens_to_compute(0, end).tolist())
            for position in range(start, end):
                block = int(sequence.table[position // size])
                assert block not in untouchable, "a registered block is written again"
                assert writers.setdefault(block, sequence) is sequence, "two sequences write one block"
                self.slots[block * size + position % size] = values[position]
        for sequence, start, end in step.ranges:
            first = 0 if self.window is None else max(0, start - self.window + 1)
            positions = np.arange(first, end)
            read = self.slots[sequence.table[positions // size] * size + positions % size]
            assert read.tolist() == histories(sequence.tokens_to_compute(0, end).tolist())[first:]

    def next_tokens(self, step):
        """For each sampled sequence the tokens that follow, as far as what was proposed is right, and one more."""
        found = []
        for sequence, drafted in zip(step.sampled, step.drafted, strict=True):
            draft, new = sequence.draft[:drafted], [self.token_after(sequence, sequence.num_tokens - 1)]
            while len(new) <= drafted and new[-1] == draft[len(new) - 1]:
                new.append(self.token_after(sequence, sequence.num_tokens - 1 + len(new)))
            found.append(new)
        return found

    def token_after(self, sequence, position):
        block, offset = divmod(position, self.pool.block_size)
        return int(self.slots[sequence.table[block] * self.pool.block_size + offset] % VOCABULARY)

    def run(self, limit=10_000):
        steps = 0
        while self.step().ranges:
            self.scheduler.check_integrity()
            steps += 1
            assert steps < limit, "the scheduler does not come to an end"
        return steps

    def check_outputs(self):
        for sequence, expected in self.sequences:
            if sequence.finish_reason in ("length", "stop"):
                assert sequence.output == expected
            else:
                assert sequence.output == expected[: sequence.num_output]

    def check_empty(self):
        self.scheduler.check_integrity()
        assert (self.pool.num_used, self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0, 0)
        self.scheduler.clear_prefix_cache()
        assert self.pool.num_free == self.pool.num_blocks


@pytest.fixture
def make_machine():
    return Machine
