"""Block-wise prefix reuse: which block already holds the cache of which tokens.

What a block holds depends on its tokens and on all tokens before it. Its key is therefore a path in a trie whose edges
are the tokens of one full block. Edges compare the tokens themselves, so that two prefixes are never taken for one
another: a hash decides where to look, not what is equal.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpass.errors import IntegrityError
from kvpass.runtime.block_pool import BlockPool

# Token ids as the runtime keeps them. The trie compares their bytes, so there must be one dtype.
TokenArray = NDArray[np.int32]


class Branch:
    """A place in the trie: the root, which stands for the empty prefix, or a :class:`PrefixNode`.

    Attributes:
        children: the blocks known to follow, by the bytes of their tokens.
        attached: False once the node was forgotten; sequences that stand there register nothing more.
    """

    __slots__ = ("attached", "children")

    def __init__(self) -> None:
        self.children: dict[bytes, PrefixNode] = {}
        self.attached = True


class PrefixNode(Branch):
    """One registered block.

    Attributes:
        parent: the prefix before this block.
        key: bytes of the block's tokens, the edge that leads here from the parent.
        block: number of the block that holds their cache.
    """

    __slots__ = ("block", "key", "parent")

    def __init__(self, parent: Branch, key: bytes, block: int) -> None:
        super().__init__()
        self.parent = parent
        self.key = key
        self.block = block


class PrefixCache:
    """The trie of registered blocks over one :class:`BlockPool`.

    Whoever owns a registered block owns the blocks of all its ancestors too, and releases them after it. So an
    ancestor always has an owner if a descendant has one, and stands behind it in the order of eviction: what is
    evicted is always a leaf, and no node is ever cut off from the root.

    Where windows let sequences give back the first blocks of a prefix before the last ones, an ancestor may be evicted
    first. All that follows it is forgotten with it: nobody could find it any more.

    Attributes:
        windowed: sequences give blocks back in the order of the tokens.
    """

    def __init__(self, pool: BlockPool, windowed: bool = False) -> None:
        self._pool = pool
        self.windowed = windowed
        self.root = Branch()
        # The attached node of each registered block: exactly the blocks whose content the pool keeps.
        self._nodes: dict[int, PrefixNode] = {}
        pool.on_evict = self._evict

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, tokens: TokenArray, max_blocks: int) -> tuple[Branch, list[int]]:
        """The longest registered prefix of ``tokens``: where it ends in the trie, and its blocks in order.

        The blocks are not acquired. At most ``max_blocks`` full blocks are looked up.
        """
        size = self._pool.block_size
        branch: Branch = self.root
        blocks: list[int] = []
        for start in range(0, min(max_blocks * size, len(tokens) - size + 1), size):
            node = branch.children.get(tokens[start : start + size].tobytes())
            if node is None:
                break
            blocks.append(node.block)
            branch = node
        return branch, blocks

    def insert(self, parent: Branch, tokens: TokenArray, block: int) -> PrefixNode:
        """Register ``block`` as the cache of one block of ``tokens`` after ``parent``.

        Where equal content is registered already, that node comes back and ``block`` is not registered.
        """
        key = tokens.tobytes()
        node = parent.children.get(key)
        if node is None:
            if not parent.attached or block in self._nodes:
                raise IntegrityError(f"block {block} cannot be registered: it is already, or its prefix was forgotten")
            node = PrefixNode(parent, key, block)
            self._pool.keep(block)
            self._nodes[block] = node
            parent.children[key] = node
        return node

    def forget(self, node: PrefixNode) -> None:
        """Forget a node and all that follows it; owners keep their blocks, which nobody finds any more."""
        if not node.attached:
            return
        del node.parent.children[node.key]
        stack = [node]
        while stack:
            lost = stack.pop()
            stack.extend(lost.children.values())
            lost.children = {}
            lost.attached = False
            del self._nodes[lost.block]
            self._pool.forget(lost.block)

    def clear(self) -> None:
        """Forget everything."""
        for node in list(self.root.children.values()):
            self.forget(node)

    def reset(self) -> None:
        """Start with an empty trie over a pool that was reset."""
        self.root = Branch()
        self._nodes = {}

    def check_integrity(self) -> None:
        """Assert that trie and pool agree.

        Raises:
            IntegrityError: naming what does not hold.
        """
        seen: dict[int, PrefixNode] = {}
        stack: list[Branch] = [self.root]
        while stack:
            branch = stack.pop()
            for key, node in branch.children.items():
                if node.parent is not branch or node.key != key or not node.attached or node.block in seen:
                    raise IntegrityError(f"the trie is broken at block {node.block}")
                seen[node.block] = node
                stack.append(node)
        if seen != self._nodes:
            raise IntegrityError("the registered blocks are not those of the trie")
        if self._pool.kept_blocks() != seen.keys():
            raise IntegrityError("the registered blocks are not those whose content the pool keeps")
        rank = {block: index for index, block in enumerate(self._pool.cached_blocks())}
        for node in seen.values():
            parent = node.parent
            if self.windowed or not isinstance(parent, PrefixNode):
                continue
            if rank.get(parent.block, len(rank)) < rank.get(node.block, len(rank)):
                raise IntegrityError(f"block {parent.block} would be evicted before block {node.block} that follows it")

    def _evict(self, block: int) -> None:
        node = self._nodes[block]
        if node.children and not self.windowed:
            raise IntegrityError(f"block {block} is evicted before the blocks that follow it")
        for child in list(node.children.values()):
            self.forget(child)
        del self._nodes[block]
        del node.parent.children[node.key]
        node.attached = False
