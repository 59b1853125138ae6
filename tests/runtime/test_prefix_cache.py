import numpy as np
import pytest

from kvpass.errors import IntegrityError
from kvpass.runtime.block_pool import BlockPool
from kvpass.runtime.prefix_cache import PrefixCache

SIZE = 2


def ids(*tokens):
    return np.array(tokens, dtype=np.int32)


class Trie:
    """A prefix cache and its pool, with sequences registered whole."""

    def __init__(self, num_blocks=8, windowed=False):
        self.pool = BlockPool(num_blocks, SIZE)
        self.cache = PrefixCache(self.pool, windowed)

    def register(self, *tokens):
        branch, blocks = self.cache.match(ids(*tokens), len(tokens))
        self.pool.acquire(blocks)
        for start in range(len(blocks) * SIZE, len(tokens) - SIZE + 1, SIZE):
            blocks += self.pool.allocate(1)
            branch = self.cache.insert(branch, ids(*tokens[start : start + SIZE]), blocks[-1])
        return blocks

    def match(self, *tokens, max_blocks=99):
        return self.cache.match(ids(*tokens), max_blocks)[1]

    def check(self, *owned):
        self.pool.check_integrity(owned)
        self.cache.check_integrity()


def test_the_longest_registered_prefix_is_found():
    trie = Trie()
    blocks = trie.register(1, 2, 3, 4, 5, 6)
    assert trie.match(1, 2, 3, 4, 5, 6, 7) == blocks
    assert trie.match(1, 2, 3, 4, 9, 9) == blocks[:2]
    assert trie.match(1, 2, 3) == blocks[:1]
    assert trie.match(3, 4) == []
    assert trie.match(1) == trie.match() == []
    assert trie.match(1, 2, 3, 4, max_blocks=1) == blocks[:1]
    trie.check(blocks)


def test_the_same_tokens_after_other_tokens_are_another_block():
    trie = Trie()
    first, second = trie.register(1, 1, 7, 7), trie.register(2, 2, 7, 7)
    assert first[1] != second[1]
    assert trie.match(2, 2, 7, 7) == second


def test_tokens_are_compared_and_not_their_hash(monkeypatch):
    class Colliding(bytes):
        def __hash__(self):
            return 0

    trie = Trie(num_blocks=64)
    for token in range(20):
        branch = trie.cache.root
        block = trie.pool.allocate(1)[0]
        node = trie.cache.insert(branch, ids(token, token), block)
        branch.children[Colliding(node.key)] = branch.children.pop(node.key)
    matches = [trie.cache.root.children[Colliding(ids(t, t).tobytes())].block for t in range(20)]
    assert matches == list(range(20))


def test_equal_content_is_registered_once():
    trie = Trie()
    (block,) = trie.register(1, 2)
    (other,) = trie.pool.allocate(1)
    assert trie.cache.insert(trie.cache.root, ids(1, 2), other).block == block
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
    branch, _ = trie.cache.match(ids(1, 2, 3, 4), 2)
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
    branch, _ = trie.cache.match(ids(1, 2, 3, 4), 2)
    trie.cache.clear()
    assert not branch.attached and len(trie.cache) == 0
    assert trie.match(1, 2, 3, 4) == []
    trie.check(blocks)
    trie.pool.release(blocks)
    assert trie.pool.num_free == trie.pool.num_blocks


def test_nothing_is_registered_below_a_forgotten_node():
    trie = Trie()
    trie.register(1, 2)
    branch, _ = trie.cache.match(ids(1, 2), 1)
    trie.cache.clear()
    with pytest.raises(IntegrityError, match="forgotten"):
        trie.cache.insert(branch, ids(3, 4), trie.pool.allocate(1)[0])


def test_check_integrity_sees_an_order_of_eviction_that_would_cut_a_prefix_off():
    trie = Trie()
    head, tail = trie.register(1, 2, 3, 4)
    trie.pool.release([head])
    with pytest.raises(IntegrityError, match="would be evicted before"):
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


def test_a_prefix_whose_first_block_is_taken_is_forgotten_whole():
    trie = Trie(num_blocks=4, windowed=True)
    first, second, third = trie.register(1, 2, 3, 4, 5, 6)
    other = trie.register(1, 2, 7, 8)[1]
    trie.pool.release([first])
    trie.pool.release([first])  # both sequences have passed it
    trie.check([second, third], [other])
    assert trie.match(1, 2, 3, 4, 5, 6) == [first, second, third]
    assert trie.pool.allocate(1) == [first]  # cached blocks are evicted where nothing is free
    assert trie.match(1, 2, 3, 4, 5, 6) == trie.match(1, 2, 7, 8) == []
    trie.check([first], [second, third], [other])
    trie.pool.release([second, third])
    assert trie.pool.num_free == 2  # nobody could find them any more, so they are not kept
    trie.check([first], [other])


def test_without_windows_a_first_block_is_never_taken_before_the_others():
    trie = Trie(num_blocks=2)
    first, second = trie.register(1, 2, 3, 4)
    trie.pool.release([first])
    with pytest.raises(IntegrityError, match="evicted before the blocks that follow it"):
        trie.pool.allocate(1)
    assert trie.match(1, 2, 3, 4) == [first, second]
