from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvpass.errors import CapacityError, IntegrityError
from kvpass.runtime.pool.block_pool import BlockPool


def test_blocks_are_given_out_once_and_come_back():
    pool = BlockPool(num_blocks=4, block_size=16)
    blocks = pool.allocate(4)
    assert sorted(blocks) == [0, 1, 2, 3]
    assert (pool.num_free, pool.num_used, pool.num_cached) == (0, 4, 0)
    pool.release(blocks)
    assert (pool.num_free, pool.num_used, pool.num_cached) == (4, 0, 0)
    pool.check_integrity([])


def test_too_many_blocks_are_refused_and_none_is_taken():
    pool = BlockPool(num_blocks=4, block_size=16)
    pool.allocate(1)
    with pytest.raises(CapacityError, match="4 blocks asked for, 3 of 4 are available"):
        pool.allocate(4)
    assert pool.num_used == 1
    pool.check_integrity()


def test_blocks_for_rounds_up():
    pool = BlockPool(num_blocks=1, block_size=16)
    assert [pool.blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_a_shared_block_is_free_only_after_its_last_owner():
    pool = BlockPool(num_blocks=2, block_size=16)
    (block,) = pool.allocate(1)
    pool.acquire([block])
    assert pool.num_shared == 1
    pool.release([block])
    assert (pool.num_shared, pool.num_used) == (0, 1)
    pool.release([block])
    assert pool.num_free == 2


class Oldest:
    """A keeper that gives up what was released first."""

    def __init__(self, pool):
        self.pool = pool
        self.order: list[int] = []
        self.evicted: list[int] = []
        pool.keeper = self

    def released(self, block):
        self.order.append(block)

    def make_room(self):
        block = next(b for b in self.order if not self.pool.is_used(b) and b in self.pool.kept_blocks())
        self.order.remove(block)
        self.evicted.append(block)
        self.pool.forget(block)


def test_the_keeper_hears_of_releases_last_block_first_and_is_asked_for_room():
    pool = BlockPool(num_blocks=4, block_size=16)
    keeper = Oldest(pool)
    first, second = pool.allocate(2), pool.allocate(2)
    for block in first + second:
        pool.keep(block)
    pool.release(first)
    pool.release(second)
    assert keeper.order == [*reversed(first), *reversed(second)]
    assert pool.num_cached == 4
    pool.acquire(first)
    pool.allocate(2)
    assert keeper.evicted == [*reversed(second)]
    pool.check_integrity()


def test_a_keeper_that_gives_nothing_up_is_an_integrity_error():
    pool = BlockPool(num_blocks=1, block_size=16)
    (block,) = pool.allocate(1)
    pool.keep(block)
    pool.release([block])
    with pytest.raises(IntegrityError, match="no content was given up"):
        pool.allocate(1)


def test_free_blocks_are_used_before_cached_ones():
    pool = BlockPool(num_blocks=3, block_size=16)
    Oldest(pool)
    (kept,) = pool.allocate(1)
    pool.keep(kept)
    pool.release([kept])
    assert kept not in pool.allocate(2)
    assert pool.allocate(1) == [kept]


@pytest.mark.parametrize(
    "misuse",
    [
        lambda pool, block: pool.release([block, block]),
        lambda pool, block: pool.acquire([block + 1]),
        lambda pool, block: pool.keep(block + 1),
        lambda pool, block: pool.forget(block),
    ],
)
def test_misuse_is_an_integrity_error(misuse):
    pool = BlockPool(num_blocks=2, block_size=16)
    (block,) = pool.allocate(1)
    with pytest.raises(IntegrityError):
        misuse(pool, block)


def test_check_integrity_sees_references_that_nobody_holds():
    pool = BlockPool(num_blocks=2, block_size=16)
    pool.allocate(1)
    with pytest.raises(IntegrityError, match="references"):
        pool.check_integrity([])


@pytest.mark.parametrize("break_it", ["_references", "_free", "num_used", "num_shared", "_kept", "num_cached"])
def test_check_integrity_sees_broken_books(break_it):
    pool = BlockPool(num_blocks=3, block_size=16)
    block, _ = pool.allocate(2)
    match break_it:
        case "_references":
            pool._references[block] = 0
        case "_free":
            pool._free.append(block)
        case "_kept":
            pool._kept[2] = 1
        case _:
            setattr(pool, break_it, 3)
    with pytest.raises(IntegrityError):
        pool.check_integrity()


def test_a_large_pool_costs_nothing_before_it_is_used():
    pool = BlockPool(num_blocks=1 << 20, block_size=16)
    assert pool._free == [] and pool.num_free == 1 << 20


def test_blocks_that_became_free_are_named_once_for_wiping():
    pool = BlockPool(num_blocks=5, block_size=16, scrub=True)
    keeper = Oldest(pool)
    assert pool.take_scrubs() == []
    first, second, third = pool.allocate(3)
    pool.keep(second)
    pool.keep(third)
    pool.release([first, second])
    assert pool.take_scrubs() == [first]  # the second one's content is kept
    assert pool.take_scrubs() == []
    pool.allocate(4)
    assert keeper.evicted == [second] and pool.take_scrubs() == [second]  # given out again, and still to be wiped
    pool.forget(third)
    pool.release([third])
    assert pool.take_scrubs() == [third]
    pool.reset()
    assert pool.take_scrubs() == [0, 1, 2, 3, 4]
    plain = BlockPool(num_blocks=1, block_size=16)
    plain.release(plain.allocate(1))
    assert plain.take_scrubs() == []


class PoolMachine(RuleBasedStateMachine):
    """The pool against a plain model: a multiset of references and a set of kept blocks."""

    SIZE = 6

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.SIZE, 4)
        self.pool.keeper = self
        self.owners: list[list[int]] = []
        self.kept: set[int] = set()

    def released(self, block):
        assert block in self.kept

    def make_room(self):
        owned = {block for blocks in self.owners for block in blocks}
        block = min(self.kept - owned)
        self.kept.remove(block)
        self.pool.forget(block)

    @rule(count=st.integers(0, SIZE + 1))
    def allocate(self, count):
        available = self.SIZE - len({block for blocks in self.owners for block in blocks})
        if count > available:
            with pytest.raises(CapacityError):
                self.pool.allocate(count)
        else:
            self.owners.append(self.pool.allocate(count))

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def share(self, data):
        blocks = data.draw(st.sampled_from(self.owners))
        self.pool.acquire(blocks)
        self.owners.append(list(blocks))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def revive(self, data):
        block = data.draw(st.sampled_from(sorted(self.kept)))
        self.pool.acquire([block])
        self.owners.append([block])

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data):
        self.pool.release(self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1))))

    @precondition(lambda self: any(self.owners))
    @rule(data=st.data())
    def keep(self, data):
        block = data.draw(st.sampled_from(sorted({block for blocks in self.owners for block in blocks})))
        self.pool.keep(block)
        self.kept.add(block)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def forget(self, data):
        block = data.draw(st.sampled_from(sorted(self.kept)))
        self.pool.forget(block)
        self.kept.remove(block)

    @invariant()
    def books_agree(self):
        self.pool.check_integrity(self.owners)
        assert self.pool.kept_blocks() == self.kept
        counts = Counter(block for blocks in self.owners for block in blocks)
        assert self.pool.num_used == len(counts)
        assert self.pool.num_shared == sum(count > 1 for count in counts.values())
        assert self.pool.num_cached == len(self.kept - counts.keys())


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
