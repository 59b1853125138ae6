from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.prefix.eviction import POLICIES, CostAware, EvictionQueue
from kvpass.runtime.prefix.prefix_cache import PrefixCache


@dataclass
class Used:
    depth: int = 1
    created: int = 0
    last_use: int = 0
    hits: int = 0


EXPECTED = {"lru": ["old", "mid", "new"], "fifo": ["mid", "new", "old"], "lfu": ["mid", "old", "new"]}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_policy_has_its_order(name):
    blocks = {
        "old": Used(created=9, last_use=10, hits=3),
        "mid": Used(created=1, last_use=11, hits=1),
        "new": Used(created=2, last_use=12, hits=7),
    }
    queue = EvictionQueue(POLICIES[name]())
    for number, usage in enumerate(blocks.values()):
        queue.push(number, usage)
    order = [list(blocks)[block] for _ in blocks if (block := queue.pop(lambda block: True)) is not None]
    assert order == EXPECTED[name]


def test_cost_aware_weighs_hits_by_depth_and_forgets_what_was_popular_long_ago():
    queue = EvictionQueue(CostAware())
    queue.push(0, Used(depth=1, hits=1))
    queue.push(1, Used(depth=2000, hits=1))
    queue.push(2, Used(depth=1, hits=5))
    assert queue.pop(lambda block: True) == 0
    # As many hits as block 2, one of them after block 0 was evicted.
    queue.push(3, Used(depth=1, hits=5))
    assert [queue.pop(lambda block: True) for _ in range(4)] == [2, 3, 1, None]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(("push", "discard", "pop")), st.integers(0, 7), st.integers(0, 4))))
def test_the_queue_is_a_dictionary_sorted_by_rank_and_time(operations):
    queue, plain = EvictionQueue(POLICIES["lru"]()), {}
    for time, (operation, block, number) in enumerate(operations):
        match operation:
            case "push":
                queue.push(block, Used(last_use=number))
                plain[block] = (number, time)
            case "discard":
                queue.discard(block)
                plain.pop(block, None)
            case _:
                order = sorted(plain, key=lambda block: plain[block])
                first = next((block for block in order if block % 4 != number), None)
                assert queue.pop(lambda block, number=number: block % 4 != number) == first
                for passed in order[: len(order) if first is None else order.index(first) + 1]:
                    del plain[passed]
        assert len(queue) == len(plain) and all(block in queue for block in plain)


def test_what_was_overtaken_does_not_pile_up():
    queue = EvictionQueue(POLICIES["lru"]())
    for time in range(10_000):
        queue.push(time % 3, Used(last_use=time))
    assert len(queue) == 3 and len(queue._heap) < 100


@pytest.mark.parametrize("name", POLICIES)
def test_only_leaves_without_an_owner_are_evicted(name):
    """Random prefixes under pressure: whoever holds a prefix keeps it, and no block is cut off from its root."""
    random = np.random.default_rng(0)
    pool = BlockPool(16, 1)
    cache = PrefixCache(pool, policy=POLICIES[name]())
    owners: list[list[int]] = []
    for _ in range(500):
        tokens = random.integers(0, 3, size=random.integers(1, 6)).astype(np.int32)
        match = cache.match(tokens, len(tokens))
        held = [node.blocks[0] for node in match.path]
        if len(tokens) - len(held) <= pool.num_available - pool.count_unreferenced(held):
            (blocks,) = cache.acquire(match)
            branch = match.branch
            for start in range(len(blocks), len(tokens)):
                blocks += pool.allocate(1)
                branch = cache.insert(branch, tokens[start : start + 1], blocks[-1:])
            assert [node.blocks[0] for node in cache.match(tokens, len(tokens)).path] == blocks
            owners.append(blocks)
        while owners and (random.random() < 0.5 or len(owners) > 3):
            pool.release(owners.pop(random.integers(len(owners))))
        pool.check_integrity(owners)
        cache.check_integrity()
    assert pool.num_free == 0
