"""Trees of proposed tokens: several ways in which a sequence may go on, which share what they begin with.

All nodes are computed in one step (tree attention, SpecInfer, arXiv 2305.09781): each sees the sequence, its ancestors
and itself, and has the position that it would have if its path were the sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class DraftTree(NamedTuple):
    """Proposed tokens, each behind its parent.

    Attributes:
        tokens: one for each node; those of one parent's children differ.
        parents: place of each node's parent in ``tokens``, before its own; -1 for those that may follow the sequence's
            newest token.
    """

    tokens: list[int]
    parents: list[int]

    @property
    def is_chain(self) -> bool:
        """Whether each token follows the one before it."""
        return self.parents == list(range(-1, len(self.parents) - 1))

    @property
    def is_valid(self) -> bool:
        """Whether parents come before their children, and the children of one parent differ."""
        if len(self.tokens) != len(self.parents):
            return False
        behind = all(type(parent) is int and -1 <= parent < node for node, parent in enumerate(self.parents))
        return behind and len(set(zip(self.parents, self.tokens, strict=True))) == len(self.tokens)

    def cut(self, count: int) -> DraftTree:
        """The first ``count`` nodes, which are a tree as well."""
        return DraftTree(self.tokens[:count], self.parents[:count])

    def depths(self) -> list[int]:
        """Of each node the tokens from the sequence's newest one to it; 1 for the first ones."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    def visible(self) -> NDArray[np.bool_]:
        """``[n, n]``: which nodes, the columns, each node sees: its ancestors and itself."""
        seen = np.eye(len(self.parents), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen

    def follow(self, tokens: Iterable[int]) -> list[int]:
        """The nodes that ``tokens`` go through, up to the first token that is not proposed there."""
        children = {key: node for node, key in enumerate(zip(self.parents, self.tokens, strict=True))}
        path: list[int] = []
        for token in tokens:
            node = children.get((path[-1] if path else -1, token))
            if node is None:
                break
            path.append(node)
        return path


def chain(tokens: list[int]) -> DraftTree:
    """The tree in which each token follows the one before it."""
    return DraftTree(tokens, list(range(-1, len(tokens) - 1)))


def merge_paths(paths: Iterable[Ordered[int]]) -> DraftTree:
    """The tree of all ``paths``, which begin at its root; what they begin with alike is there once.

    The nodes of the first path come first: where a tree is cut, and where the first path is right, it is as if there
    were no others.
    """
    tree = DraftTree([], [])
    children: dict[tuple[int, int], int] = {}
    for path in paths:
        parent = -1
        for token in path:
            node = children.setdefault((parent, token), len(tree.tokens))
            if node == len(tree.tokens):
                tree.tokens.append(token)
                tree.parents.append(parent)
            parent = node
    return tree
