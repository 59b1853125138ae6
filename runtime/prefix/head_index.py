"""Finding, among the many children of one place in the prefix tree, one that begins with the same tokens."""

from __future__ import annotations

from itertools import islice

from kvpass.runtime.prefix.prefix_nodes import Branch, PrefixNode

# Fewer tokens in common are not worth the copy of a block.
HEAD_TOKENS = 4
# Places with fewer children are searched one by one, and not indexed.
_FEW = 8
# The newest children that begin with the same head and are compared in full.
_MOST_COMPARED = 16


class HeadIndex:
    """Children by their first :data:`HEAD_TOKENS` tokens, where there are many; each operation takes constant time."""

    def __init__(self, token_bytes: int) -> None:
        self._token_bits = 8 * token_bytes
        self._head = HEAD_TOKENS * token_bytes
        self._heads: dict[Branch, dict[bytes, dict[bytes, PrefixNode]]] = {}

    def add(self, node: PrefixNode) -> None:
        """Take note that ``node`` became a child of its parent."""
        heads = self._heads.get(node.parent)
        if heads is not None:
            heads.setdefault(node.key[: self._head], {})[node.key] = node
        elif len(node.parent.children) > _FEW:
            self._heads[node.parent] = {}
            for child in node.parent.children.values():
                self.add(child)

    def remove(self, node: PrefixNode) -> None:
        """Take note that ``node`` is no child of its parent any more."""
        heads = self._heads.get(node.parent)
        if heads is None:
            return
        nodes = heads[node.key[: self._head]]
        del nodes[node.key]
        if not nodes:
            del heads[node.key[: self._head]]
        if not heads:
            del self._heads[node.parent]

    def discard(self, branch: Branch) -> None:
        """Take note that ``branch`` has lost all its children."""
        self._heads.pop(branch, None)

    def find(self, branch: Branch, following: bytes) -> tuple[PrefixNode, int] | None:
        """A child that holds all its blocks and begins with the most tokens of ``following``; and how many they are.

        None if those are fewer than :data:`HEAD_TOKENS`. Only the newest of many such children are looked at.
        """
        head = following[: self._head]
        if len(head) < self._head or not branch.children:
            return None
        heads = self._heads.get(branch)
        nodes = branch.children if heads is None else heads.get(head, {})
        best: tuple[PrefixNode, int] | None = None
        for node in islice(reversed(nodes.values()), _MOST_COMPARED):
            if node.key.startswith(head) and None not in node.blocks:
                common = self._common_tokens(node.key, following)
                if best is None or common > best[1]:
                    best = node, common
        return best

    def clear(self) -> None:
        """Forget everything."""
        self._heads = {}

    def check_integrity(self, branch: Branch) -> bool:
        """Whether the index of one place says what its children are."""
        heads = self._heads.get(branch)
        if heads is None:
            return len(branch.children) <= _FEW
        indexed = {key: node for head, nodes in heads.items() for key, node in nodes.items() if key.startswith(head)}
        return indexed == branch.children and all(heads.values())

    def _common_tokens(self, first: bytes, second: bytes) -> int:
        length = min(len(first), len(second))
        # In this byte order the lowest bit that differs is in the first token that does.
        differ = int.from_bytes(first[:length], "little") ^ int.from_bytes(second[:length], "little")
        bits = 8 * length if differ == 0 else (differ & -differ).bit_length() - 1
        return bits // self._token_bits
