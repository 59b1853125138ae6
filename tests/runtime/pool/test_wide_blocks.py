"""Wide places: whatever settles, moves and is taken over, every sequence reads its own tokens."""

import random

import numpy as np
import pytest

from kvpass.errors import CapacityError, IntegrityError
from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.pool.wide_blocks import WideBlocks

SIZE = 4
SETTLED = "settled"


class Memory:
    """Blocks by their number in the caches: what stands in each slot, and whether it has been through settling."""

    def __init__(self, blocks):
        self.blocks = blocks
        self.cells = {}

    def move(self):
        """Make all moves; each batch twice, as after an exception."""
        while self.blocks.moves:
            for _ in range(2):
                read = [(t, -1 if s is None else s, self.cells.get(s, ({}, ""))) for s, t in self.blocks.moves]
                for target, source, (tokens, mark) in read:
                    self.cells[target] = (dict(tokens), SETTLED if source < 0 <= target else mark)
            self.blocks.done()

    def write(self, number, offset, token):
        assert number < 0, "a token is written to a settled block"
        tokens, mark = self.cells.get(number, ({}, ""))
        self.cells[number] = ({**tokens, offset: token}, "" if offset == 0 else mark)

    def read(self, number, offset):
        return self.cells[number][0][offset]


class Sequences:
    """A pool, sequences that grow and share their first blocks, and the steps that they would take."""

    def __init__(self, numbers, num_blocks, num_wide, window=None, scrub=False):
        self.numbers, self.pool, self.scrub = numbers, BlockPool(num_blocks, SIZE), scrub
        self.blocks = WideBlocks(num_blocks, num_wide, SIZE, (window,), self.pool.is_used, scrub)
        self.memory, self.window = Memory(self.blocks), window
        self.live = []  # [tokens, table]

    def start(self, other=None):
        shared = 0 if other is None else (len(other[0]) - 1) // SIZE
        tokens, table = ([], []) if other is None else (other[0][: shared * SIZE], other[1][:shared])
        self.pool.acquire(table)
        self.live.append([list(tokens), list(table)])

    def step(self, grown):
        """One step in which sequence i gets ``grown[i]`` new tokens; those that get none take no part."""
        tables, slots, old, new = [], [], [], []
        for (tokens, table), count in zip(self.live, grown, strict=True):
            if not count:
                continue
            need = -(-(len(tokens) + count) // SIZE) - len(table)
            table += self.pool.allocate(need)
            old.append(len(tokens))
            tokens += [self.numbers.random() for _ in range(count)]
            positions = range(old[-1], len(tokens))
            slots += [table[p // SIZE] * SIZE + p % SIZE for p in positions]
            new += [(table[p // SIZE], p % SIZE, tokens[p]) for p in positions]
            tables.append(table)
        width = max(map(len, tables))
        grid = np.array([[table + [0] * (width - len(table)) for table in tables]], dtype=np.int64)
        settled = {block for block, _, _ in new if self.number(block) >= 0}
        self.blocks.prepare(grid, np.array([slots], dtype=np.int64), np.array(old))
        self.memory.move()
        self.blocks.check_integrity()
        for block in {block for block, offset, _ in new if offset == 0 and block in settled and self.scrub}:
            assert not self.memory.cells.get(self.number(block), ({}, ""))[0], "a place was not wiped"
        for block, offset, token in new:
            self.memory.write(self.number(block), offset, token)
        for tokens, table in self.live:
            first = 0 if self.window is None else max(0, len(tokens) - self.window)
            for p in range(first, len(tokens)):
                assert self.memory.read(self.number(table[p // SIZE]), p % SIZE) == tokens[p]

    def reject(self, index, count):
        """The last tokens of a sequence were wrong proposals: others will be written in their slots."""
        tokens, table = self.live[index]
        del tokens[len(tokens) - count :]
        surplus = table[-(-len(tokens) // SIZE) :]
        del table[len(table) - len(surplus) :]
        self.pool.release(surplus)

    def end(self, index):
        _, table = self.live.pop(index)
        self.pool.release(table)

    def number(self, block):
        return int(self.blocks.number(np.array([block]))[0])

    def is_wide(self, table):
        return [self.number(block) < 0 for block in table]


@pytest.mark.parametrize("seed", range(12))
def test_every_sequence_reads_its_own_tokens(seed):
    numbers = random.Random(seed)
    # A step writes to at most 8 blocks, and 2 more sequences have one that is not full: 10 places will do.
    machine = Sequences(numbers, 60, numbers.choice((10, 10, 11, 40)), numbers.choice((None, None, 9)), seed % 2 == 1)
    for _ in range(80):
        if len(machine.live) < 6 and numbers.random() < 0.4:
            machine.start(numbers.choice(machine.live) if machine.live and numbers.random() < 0.5 else None)
        if machine.live and numbers.random() < 0.1:
            machine.end(numbers.randrange(len(machine.live)))
        for index in reversed([i for i, (tokens, _) in enumerate(machine.live) if len(tokens) > 40]):
            machine.end(index)
        chosen = set(numbers.sample(range(len(machine.live)), min(4, len(machine.live))))
        grown = [numbers.choice((1, 1, 3)) if i in chosen else 0 for i in range(len(machine.live))]
        if any(grown):
            machine.step(grown)
        for index, count in enumerate(grown):
            if count == 3 and numbers.random() < 0.5:
                machine.reject(index, 2)


def test_the_first_block_and_the_newest_stay_wide_and_the_others_settle():
    machine = Sequences(random.Random(0), 20, 20)
    machine.start()
    machine.step([4 * SIZE])
    assert machine.is_wide(machine.live[0][1]) == [True] * 4
    machine.step([1])
    assert machine.is_wide(machine.live[0][1]) == [True, False, False, True, True]
    for _ in range(SIZE - 1):
        machine.step([1])
        assert machine.is_wide(machine.live[0][1]) == [True, False, False, True, True]
    machine.step([1])
    assert machine.is_wide(machine.live[0][1]) == [True, False, False, False, True, True]
    marks = [machine.memory.cells[machine.number(block)][1] for block in machine.live[0][1]]
    assert marks == ["", SETTLED, SETTLED, SETTLED, "", ""]
    assert machine.blocks.num_used == 3


def test_a_block_that_is_taken_over_in_the_middle_is_wide_again():
    machine = Sequences(random.Random(0), 20, 20)
    machine.start()
    machine.step([4 * SIZE])
    machine.step([1])
    machine.start()
    source = machine.live[0][1][1]
    assert machine.number(source) >= 0
    (target,) = machine.pool.allocate(1)
    machine.blocks.copied([(source, target)])
    machine.memory.move()
    machine.live[1] = [machine.live[0][0][SIZE : SIZE + 2], [target]]
    machine.step([1, 1])
    assert machine.number(target) < 0


def test_whole_blocks_that_are_written_get_wide_places_and_give_them_up():
    machine = Sequences(random.Random(0), 20, 3, scrub=True)
    machine.start()
    machine.step([2 * SIZE])
    first, second = machine.live[0][1]
    taken = np.array([7, 8])
    machine.blocks.widen(taken, np.array([SIZE, 2]))  # one place is free; of the full ones the lowest goes first
    assert [machine.number(block) < 0 for block in (first, second, 7, 8)] == [False, True, True, True]
    assert [target for _, target in machine.blocks.moves] == [first]  # before its place is wiped
    machine.memory.move()
    assert machine.blocks.count_filled(taken).tolist() == [SIZE, 2]
    with pytest.raises(CapacityError, match="3 blocks of the cache may be in 16 bits at a time"):
        machine.pool.allocate(7)  # 8 among them, which is not full: its place cannot be had
        machine.blocks.widen(np.array([9, 10, 11]), np.array([SIZE] * 3))
    place = machine.number(7)
    machine.blocks.forget(np.array([7, 19]))
    assert machine.blocks.moves == ((None, place),) and machine.number(7) == 7
    machine.memory.move()
    assert machine.blocks.num_used == 2
    machine.blocks.check_integrity()


def test_too_few_wide_places_are_said_and_change_nothing():
    machine = Sequences(random.Random(0), 20, 2)
    machine.start()
    with pytest.raises(CapacityError, match=r"2 blocks of the cache may be in 16 bits at a time, and one step needs"):
        machine.step([3 * SIZE])
    assert machine.blocks.num_used == 0
    machine.blocks.check_integrity()


def test_moves_that_were_not_made_are_noticed():
    machine = Sequences(random.Random(0), 20, 20)
    machine.start()
    machine.step([4 * SIZE])
    tables = np.array([machine.live[0][1]])[None]
    machine.blocks.prepare(tables, tables[:, 0, -1:] * SIZE + 3, np.array([4 * SIZE]))
    assert machine.blocks.moves
    with pytest.raises(IntegrityError, match="were to be settled"):
        machine.blocks.check_integrity()
    with pytest.raises(IntegrityError, match="were not made"):
        machine.blocks.prepare(tables, tables[:, 0, -1:] * SIZE + 3, np.array([4 * SIZE]))
