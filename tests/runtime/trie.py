"""A prefix tree and its pool, with sequences registered whole."""

import numpy as np

from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.prefix.prefix_cache import PrefixCache

SIZE = 2


def ids(*tokens):
    return np.array(tokens, dtype=np.int32)


class Trie:
    """A prefix cache and its pool, with sequences registered whole."""

    def __init__(self, num_blocks=8, window=None):
        self.pool = BlockPool(num_blocks, SIZE)
        self.cache = PrefixCache(self.pool, (window,))

    def register(self, *tokens, namespace=""):
        match = self.cache.match(ids(*tokens), len(tokens), namespace)
        branch, (blocks,) = match.branch, self.cache.acquire(match)
        for start in range(len(blocks) * SIZE, len(tokens) - SIZE + 1, SIZE):
            blocks += self.pool.allocate(1)
            branch = self.cache.insert(branch, ids(*tokens[start : start + SIZE]), blocks[-1:])
        return blocks

    def node(self, *tokens):
        return self.cache.match(ids(*tokens), 99).branch

    def match(self, *tokens, max_tokens=99, namespace=""):
        return [node.blocks[0] for node in self.cache.match(ids(*tokens), max_tokens, namespace).path]

    def check(self, *owned):
        self.pool.check_integrity(owned)
        self.cache.check_integrity()
