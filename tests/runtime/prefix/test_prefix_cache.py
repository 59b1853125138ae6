import numpy as np
import pytest

from kvpass.errors import IntegrityError
from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.prefix.prefix_cache import PrefixCache
from tests.runtime.trie import SIZE, Trie, ids


def test_the_longest_registered_prefix_is_found():
    trie = Trie()
    blocks = trie.register(1, 2, 3, 4, 5, 6)
    assert trie.match(1, 2, 3, 4, 5, 6, 7) == blocks
    assert trie.match(1, 2, 3, 4, 9, 9) == blocks[:2]
    assert trie.match(1, 2, 3) == blocks[:1]
    assert trie.match(3, 4) == []
    assert trie.match(1) == trie.match() == []
    assert trie.match(1, 2, 3, 4, max_tokens=3) == blocks[:1]
    trie.check(blocks)


def test_the_same_tokens_after_other_tokens_are_another_block():
    trie = Trie()
    first, second = trie.register(1, 1, 7, 7), trie.register(2, 2, 7, 7)
    assert first[1] != second[1]
    assert trie.match(2, 2, 7, 7) == second


def test_tokens_are_compared_and_not_their_hash():
    class Colliding(bytes):
        def __hash__(self):
            return 0

    trie = Trie(num_blocks=64)
    for token in range(20):
        block = trie.pool.allocate(1)[0]
        node = trie.cache.insert(trie.cache.root(), ids(token, token), [block])
        children = node.parent.children
        children[Colliding(node.key)] = children.pop(node.key)
    children = trie.cache.root().children
    assert [children[Colliding(ids(t, t).tobytes())].blocks for t in range(20)] == [(t,) for t in range(20)]


def test_equal_content_is_registered_once():
    trie = Trie()
    (block,) = trie.register(1, 2)
    (other,) = trie.pool.allocate(1)
    assert trie.cache.insert(trie.cache.root(), ids(1, 2), [other]).blocks == (block,)
    trie.pool.release([other])
    assert trie.pool.num_cached == 0 and len(trie.cache) == 1
    trie.check([block])


def test_released_blocks_are_found_until_they_are_evicted_from_the_tail():
    trie = Trie(num_blocks=3)
    blocks = trie.register(1, 2, 3, 4, 5, 6)
    trie.pool.release(blocks)
    trie.check()
    assert trie.match(1, 2, 3, 4, 5, 6) == blocks
    taken = trie.pool.allocate(1)
    assert taken == [blocks[2]]
    assert trie.match(1, 2, 3, 4, 5, 6) == blocks[:2]
    trie.check(taken)


def test_forget_drops_a_node_with_all_that_follows():
    trie = Trie()
    first = trie.register(1, 2, 3, 4, 5, 6)
    second = trie.register(1, 2, 8, 8)
    trie.pool.release(first)
    trie.pool.release(second)
    branch = trie.node(1, 2, 3, 4)
    trie.cache.forget(branch)
    trie.cache.forget(branch)
    assert trie.match(1, 2, 3, 4, 5, 6) == first[:1]
    assert trie.match(1, 2, 8, 8) == second
    assert trie.pool.num_cached == 2
    trie.check()


def test_clear_leaves_owners_their_blocks():
    trie = Trie()
    blocks = trie.register(1, 2, 3, 4)
    gone = trie.register(5, 6)
    trie.pool.release(gone)
    branch = trie.node(1, 2, 3, 4)
    trie.cache.clear()
    assert not branch.attached and len(trie.cache) == 0
    assert trie.match(1, 2, 3, 4) == []
    trie.check(blocks)
    trie.pool.release(blocks)
    assert trie.pool.num_free == trie.pool.num_blocks


def test_nothing_is_registered_below_a_forgotten_node():
    trie = Trie()
    trie.register(1, 2)
    branch = trie.node(1, 2)
    trie.cache.clear()
    with pytest.raises(IntegrityError, match="forgotten"):
        trie.cache.insert(branch, ids(3, 4), trie.pool.allocate(1))


def test_check_integrity_sees_an_order_of_eviction_that_would_cut_a_prefix_off():
    trie = Trie()
    head, tail = trie.register(1, 2, 3, 4)
    trie.pool.release([head])
    with pytest.raises(IntegrityError, match="could be evicted before"):
        trie.cache.check_integrity()
    assert trie.pool.num_cached == 1 and tail != head


def test_check_integrity_sees_kept_blocks_that_no_node_holds():
    trie = Trie()
    (block,) = trie.pool.allocate(1)
    trie.pool.keep(block)
    with pytest.raises(IntegrityError, match="keeps"):
        trie.cache.check_integrity()


@pytest.mark.parametrize("seed", range(6))
def test_matches_equal_those_of_a_list_of_prefixes(seed):
    """Random registering, releasing and evicting: a match always leads to blocks that hold exactly these tokens."""
    random = np.random.default_rng(seed)
    trie = Trie(num_blocks=12)
    content: dict[int, tuple[int, ...]] = {}
    owners: list[list[int]] = []
    for _ in range(400):
        tokens = tuple(random.integers(0, 2, size=random.integers(0, 11)).tolist())
        matched = trie.match(*tokens)
        assert [content[block] for block in matched] == [tokens[: (i + 1) * SIZE] for i in range(len(matched))]
        missing = len(tokens) // SIZE - len(matched)
        if missing <= trie.pool.num_available - trie.pool.count_unreferenced(matched):
            blocks = trie.register(*tokens)
            content |= {block: tokens[: (i + 1) * SIZE] for i, block in enumerate(blocks)}
            owners.append(blocks)
        while owners and (random.random() < 0.4 or len(owners) > 4):
            trie.pool.release(owners.pop(random.integers(len(owners))))
        if random.random() < 0.01:
            trie.cache.clear()
        trie.check(*owners)


def test_without_windows_a_first_block_is_never_taken_before_the_others():
    trie = Trie(num_blocks=2)
    first, second = trie.register(1, 2, 3, 4)
    trie.pool.release([first])
    with pytest.raises(IntegrityError, match="nothing can be evicted"):
        trie.pool.allocate(1)
    assert trie.match(1, 2, 3, 4) == [first, second]


def test_a_window_needs_the_newest_blocks_of_a_prefix_alone():
    trie = Trie(num_blocks=3, window=3)  # a token looks at itself and two more, of one block at a block's start
    first, second, third = trie.register(1, 2, 3, 4, 5, 6)
    trie.pool.release([first])
    trie.check([second, third])
    assert trie.match(1, 2, 3, 4, 5, 6) == [first, second, third]
    assert trie.pool.allocate(1) == [first]
    assert trie.match(1, 2, 3, 4, 5, 6) == [None, second, third]
    assert trie.match(1, 2) == [] and trie.match(1, 2, 3, 4) == [None, second]
    match = trie.cache.match(ids(1, 2, 3, 4, 5, 6), 6)
    assert trie.cache.acquire(match, (2,)) == [[0, 0, third]]
    with pytest.raises(IntegrityError, match="lacks blocks of group 0"):
        trie.cache.acquire(match)
    trie.check([first], [second, third], [third])


def test_a_window_that_reaches_into_a_given_up_block_ends_the_match_before_it():
    trie = Trie(num_blocks=4, window=4)  # two blocks
    blocks = trie.register(1, 2, 3, 4, 5, 6, 7, 8)
    trie.pool.release(blocks[:2])
    trie.pool.allocate(2)  # the second goes first
    assert trie.match(1, 2, 3, 4, 5, 6, 7, 8) == [None, None, *blocks[2:]]
    assert trie.match(1, 2, 3, 4, 5, 6) == []


def test_a_block_that_a_window_gave_up_is_registered_again():
    trie = Trie(num_blocks=4, window=3)
    first, second = trie.register(1, 2, 3, 4)
    trie.pool.release([first])
    assert first in trie.pool.allocate(3)
    assert trie.match(1, 2) == []
    node = trie.cache.insert(trie.cache.root(), ids(1, 2), [first])
    assert node.blocks == (first,) and trie.match(1, 2, 3, 4) == [first, second]


def test_nodes_that_hold_nothing_and_lead_nowhere_are_dropped():
    trie = Trie(num_blocks=3, window=3)
    trie.pool.release(trie.register(1, 2, 3, 4, 5, 6))
    trie.check()
    blocks = trie.pool.allocate(3)
    assert len(trie.cache) == 0 and not trie.cache.root().children
    trie.check(blocks)


@pytest.mark.parametrize("seed", range(4))
def test_groups_match_where_each_holds_what_the_next_token_looks_at(seed):
    """Two groups, one with a window, registered and released at random, against a list of what was registered."""
    random = np.random.default_rng(seed)
    window = int(random.integers(1, 7))
    pool = BlockPool(24, SIZE)
    cache = PrefixCache(pool, (None, window))
    reach = -(-(window - 1) // SIZE)
    content: dict[int, tuple[int, ...]] = {}
    owners: list[list[list[int]]] = []
    found = 0
    for _ in range(400):
        tokens = tuple(random.integers(0, 2, size=random.integers(0, 11)).tolist())
        match = cache.match(ids(*tokens), 99)
        hits = len(match.path)
        found += hits
        passed = max(0, hits - reach)
        for index, node in enumerate(match.path):
            full, windowed = node.blocks
            assert content[full] == (0, *tokens[: (index + 1) * SIZE])
            if index >= passed or windowed is not None:
                assert content[windowed] == (1, *tokens[: (index + 1) * SIZE])
        missing = len(tokens) // SIZE - hits
        taken = pool.count_unreferenced(b for i, n in enumerate(match.path) for b in n.blocks[: 1 + (i >= passed)])
        if 2 * missing <= pool.num_available - taken:
            tables = cache.acquire(match, (0, passed))
            branch = match.branch
            for start in range(hits * SIZE, len(tokens) - SIZE + 1, SIZE):
                blocks = pool.allocate(2)
                branch = cache.insert(branch, ids(*tokens[start : start + SIZE]), blocks)
                for group, (table, block, registered) in enumerate(zip(tables, blocks, branch.blocks, strict=True)):
                    content[registered] = (group, *tokens[: start + SIZE])
                    if registered != block:
                        pool.acquire([registered])
                        pool.release([block])
                    table.append(registered)
            count = max(0, len(tables[1]) - reach) if random.random() < 0.5 else passed
            pool.release(tables[1][passed:count])
            owners.append([tables[0], tables[1][max(passed, count) :]])
        while owners and (random.random() < 0.4 or len(owners) > 3):
            for blocks in owners.pop(random.integers(len(owners))):
                pool.release(blocks)
        pool.check_integrity([blocks for tables in owners for blocks in tables])
        cache.check_integrity()
    assert found > 50


def test_namespaces_never_cross_and_are_dropped_one_by_one():
    trie = Trie()
    ours, theirs = trie.register(1, 2, 3, 4, namespace="us"), trie.register(1, 2, 3, 4, namespace="them")
    assert not set(ours) & set(theirs)
    assert trie.match(1, 2, 3, 4) == []
    assert trie.match(1, 2, 3, 4, namespace="us") == ours
    branch = trie.cache.match(ids(1, 2, 3, 4), 4, "us").branch
    trie.cache.drop("us")
    trie.cache.drop("nobody")
    assert not branch.attached
    assert trie.match(1, 2, 3, 4, namespace="us") == []
    assert trie.match(1, 2, 3, 4, namespace="them") == theirs
    trie.check(ours, theirs)


def test_a_sequence_that_stands_at_a_root_registers_there_even_if_others_came_and_went():
    trie = Trie()
    root = trie.cache.root("us")
    trie.pool.release(trie.register(1, 2, namespace="us"))
    trie.cache.drop("us")
    other = trie.register(5, 6, namespace="us")
    blocks = trie.pool.allocate(1)
    trie.cache.insert(root, ids(3, 4), blocks)
    assert trie.match(3, 4, namespace="us") == blocks
    assert trie.match(5, 6, namespace="us") == other
    trie.check(blocks, other)
