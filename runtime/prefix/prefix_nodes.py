"""The places of the prefix tree, and what is found there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpass.runtime.tiers.host_memory import StoredBlock

# Token ids as the runtime keeps them. The tree compares their bytes, so there must be one dtype.
TokenArray = NDArray[np.int32]


class Branch:
    """A place in the tree: a :class:`Root`, which stands for an empty prefix, or a :class:`PrefixNode`.

    Attributes:
        children: the nodes known to follow, by the bytes of their tokens.
        attached: False once the node was forgotten; sequences that stand there register nothing more.
        depth: blocks of the prefix that ends here.
    """

    __slots__ = ("attached", "children", "depth")

    def __init__(self, depth: int) -> None:
        self.children: dict[bytes, PrefixNode] = {}
        self.attached = True
        self.depth = depth


class Root(Branch):
    """Where the prefixes of one namespace begin.

    Attributes:
        namespace: what no block is shared across.
    """

    __slots__ = ("namespace",)

    def __init__(self, namespace: str) -> None:
        super().__init__(0)
        self.namespace = namespace


class PrefixNode(Branch):
    """One registered block of tokens.

    Attributes:
        parent: the prefix before it.
        key: bytes of its tokens, the edge that leads here from the parent.
        blocks: the block of each group that holds their cache; None where a window group has given it up.
        created: when it was registered, by the tree's clock.
        last_use: when one of its blocks lost its last owner.
        hits: times that it was taken over.
    """

    __slots__ = ("blocks", "created", "hits", "key", "last_use", "parent")

    def __init__(self, parent: Branch, key: bytes, blocks: tuple[int | None, ...], created: int) -> None:
        super().__init__(parent.depth + 1)
        self.parent = parent
        self.key = key
        self.blocks = blocks
        self.created = created
        self.last_use = created
        self.hits = 0


@dataclass(frozen=True, eq=False)
class Match:
    """The longest registered prefix that can be taken over.

    Attributes:
        branch: where it ends in the tree.
        path: the nodes that lead there, in the order of the tokens.
        partial: a node behind ``branch`` that begins with more of the tokens, and how many; its blocks have to be
            copied to be of use. None if there is no such node.
        stored: what has to be loaded of the blocks that follow ``path``, for each of them that of each group; None
            where ``beyond`` has it, or no window reaches back to it. There is no ``partial`` then.
        beyond: nodes of the tree for the first of those blocks: some window groups have given up what is needed there.
    """

    branch: Branch
    path: tuple[PrefixNode, ...]
    partial: tuple[PrefixNode, int] | None = None
    stored: tuple[tuple[StoredBlock | None, ...], ...] = ()
    beyond: tuple[PrefixNode, ...] = ()

    @property
    def length(self) -> int:
        """Blocks that are taken over, those that have to be loaded included."""
        return len(self.path) + len(self.stored)

    def blocks_of(self, group: int, first: int) -> list[int | None]:
        """The blocks of a group from ``first`` on that are on the device; None where one is stored or not needed."""
        held: list[int | None] = [node.blocks[group] for node in (*self.path, *self.beyond)[first:]]
        return held + [None] * (self.length - max(first, len(self.path) + len(self.beyond)))
