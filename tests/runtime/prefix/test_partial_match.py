import numpy as np
import pytest

from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.prefix.prefix_cache import PrefixCache
from tests.runtime.trie import ids

PARTIAL = 8


class Forest:
    """A prefix cache with blocks of 8 tokens and roots that hold many children."""

    def __init__(self, num_blocks=64):
        self.pool = BlockPool(num_blocks, PARTIAL)
        self.cache = PrefixCache(self.pool)

    def register(self, *tokens):
        return self.cache.insert(self.cache.root(), ids(*tokens), self.pool.allocate(1))

    def partial(self, *tokens, max_tokens=99):
        return self.cache.match(ids(*tokens), max_tokens).partial


@pytest.mark.parametrize("others", [0, 40])
def test_a_match_may_end_inside_a_block(others):
    forest = Forest()
    node = forest.register(1, 2, 3, 4, 5, 6, 7, 8)
    for token in range(others):
        forest.register(9, token, 3, 4, 5, 6, 7, 8)
    better = forest.register(1, 2, 3, 4, 5, 0, 0, 0)
    forest.cache.check_integrity()
    assert forest.partial(1, 2, 3, 4, 5, 6, 0, 0, 0) == (node, 6)
    assert forest.partial(1, 2, 3, 4, 5, 0, 0) == (better, 7)
    assert forest.partial(1, 2, 3, 4) in ((node, 4), (better, 4))
    assert forest.partial(1, 2, 3, 4, 5, 6, 7, 8, max_tokens=7) == (node, 7)
    assert forest.partial(1, 2, 3, 0, 5, 6, 7, 8) is None  # fewer tokens than are worth a copy
    assert forest.partial(1, 2, 3) is None
    assert forest.partial(1, 2, 3, 4, 5, 6, 7, 8) is None  # all of it matches; nothing is left to look for
    forest.cache.forget(node)
    forest.cache.check_integrity()
    assert forest.partial(1, 2, 3, 4, 5, 6, 0, 0, 0) == (better, 5)


def test_a_partial_match_does_not_cross_namespaces():
    forest = Forest()
    forest.register(1, 2, 3, 4, 5, 6, 7, 8)
    assert forest.cache.match(ids(1, 2, 3, 4, 5, 6, 0, 0), 99, "other").partial is None


@pytest.mark.parametrize("seed", range(4))
def test_partial_matches_equal_those_of_a_search_through_all_children(seed):
    random = np.random.default_rng(seed)
    forest = Forest(num_blocks=40)
    nodes = []
    for _ in range(500):
        tokens = random.integers(0, 2, size=PARTIAL)
        if len(nodes) < 40 and not any(node.key == ids(*tokens).tobytes() for node in nodes):
            nodes.append(forest.register(*tokens))
        if random.random() < 0.45:
            node = nodes.pop(random.integers(len(nodes)))
            (block,) = node.blocks
            forest.cache.forget(node)
            forest.pool.release([block])
        forest.cache.check_integrity()
        asked = ids(*random.integers(0, 2, size=random.integers(1, PARTIAL)))
        keys = [np.frombuffer(node.key, np.int32)[: len(asked)] for node in nodes]
        common = [int((key != asked).argmax()) if (key != asked).any() else len(asked) for key in keys]
        best = max(common, default=0)
        found = forest.partial(*asked)
        assert (found is None) == (best < 4)
        if found is not None:
            assert found[1] == best == common[nodes.index(found[0])]
