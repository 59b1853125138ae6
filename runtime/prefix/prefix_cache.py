"""Block-wise prefix reuse: which blocks already hold the cache of which tokens.

What a block holds depends on its tokens and on all tokens before it. Its key is therefore a path in a radix tree whose
edges are the tokens of one full block. Edges compare the tokens themselves, so that two prefixes are never taken for
one another: a hash decides where to look, not what is equal. Each namespace has a root of its own.

Caches are divided into groups. A sequence has one block for each group where it has one block of tokens, and so has a
node of the tree. In a group with a window a query looks at the newest blocks only; the older ones are given back and
evicted one by one, and a prefix can be taken over where each group holds what the next token looks at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvpass.errors import IntegrityError
from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.prefix.eviction import EvictionPolicy, EvictionQueue, LeastRecentlyUsed
from kvpass.runtime.prefix.head_index import HeadIndex
from kvpass.runtime.prefix.pins import Pin, Pins
from kvpass.runtime.prefix.prefix_nodes import Branch, Match, PrefixNode, Root, TokenArray
from kvpass.runtime.tiers.host_memory import TOKEN_BYTES
from kvpass.runtime.tiers.shelf import Shelf
from kvpass.runtime.tiers.tiers import Prefetch, Wanted


class PrefixCache:
    """The tree of registered blocks over one :class:`BlockPool`.

    Whoever owns a block of a group without a window owns those of all ancestors too. So what is evicted is always a
    leaf, and no node is ever cut off from its root. Blocks of window groups are evicted one by one, and a node that has
    none left and leads nowhere goes with the last of them.

    Attributes:
        pins: the prefixes that are held whatever else wants their blocks.
        shelf: where evicted content goes; None to lose it.
    """

    def __init__(
        self, pool: BlockPool, windows: Sequence[int | None] = (None,), policy: EvictionPolicy | None = None
    ) -> None:
        """Register blocks of ``pool``.

        Args:
            windows: of each group the newest tokens, its own included, that a query may look at; None for all.
            policy: what is evicted first; least recently used by default.
        """
        self._pool = pool
        self._windows = tuple(windows)
        # Newest blocks of a prefix that the token after it looks at, for each window group.
        self._reach = {g: pool.blocks_for(window - 1) for g, window in enumerate(windows) if window is not None}
        self._full = tuple(g for g, window in enumerate(windows) if window is None)
        self._queue = EvictionQueue(policy or LeastRecentlyUsed())
        self._heads = HeadIndex(TOKEN_BYTES)
        self.pins = Pins(pool)
        self.shelf: Shelf | None = None
        self._clock = 0
        self._roots: dict[str, Root] = {}
        # The attached node of each registered block: exactly the blocks whose content the pool keeps.
        self._nodes: dict[int, PrefixNode] = {}
        pool.keeper = self

    def __len__(self) -> int:
        """Registered blocks."""
        return len(self._nodes)

    def root(self, namespace: str = "") -> Root:
        """Where the prefixes of ``namespace`` begin."""
        return self._roots.get(namespace) or Root(namespace)

    def match(self, tokens: TokenArray, max_tokens: int, namespace: str = "") -> Match:
        """The longest registered prefix of ``tokens`` after which every group holds what the next token looks at.

        Nothing is acquired. At most ``max_tokens`` tokens are matched.
        """
        step = self._pool.block_size * tokens.itemsize
        raw = tokens[:max_tokens].tobytes()
        nodes, count, present = self._walk(raw, step, namespace)
        path = tuple(nodes[:count])
        branch = path[-1] if path else self.root(namespace)
        # Where a token looks at nothing but itself, there is nothing to bring back.
        if self.shelf is not None and (self._full or any(self._reach.values())):
            stored = self.shelf.find(Wanted(namespace, raw, step, count, present, _groups_held(nodes[count:])))
            if stored:
                beyond = tuple(nodes[count : count + len(stored)])
                return Match(branch, path, stored=tuple(map(tuple, stored)), beyond=beyond)
        return Match(branch, path, self._heads.find(branch, raw[count * step : (count + 1) * step]))

    def prefetch(self, tokens: TokenArray, max_tokens: int, namespace: str = "") -> Prefetch | None:
        """Begin to bring nearer what is stored far away of a prefix, so that :meth:`match` finds it when that is done.

        None if there is nothing far away.
        """
        if self.shelf is None:
            return None
        step = self._pool.block_size * tokens.itemsize
        raw = tokens[:max_tokens].tobytes()
        nodes, count, present = self._walk(raw, step, namespace)
        return self.shelf.prefetch(Wanted(namespace, raw, step, count, present, _groups_held(nodes[count:])))

    def acquire(self, match: Match, passed: Sequence[int] = (0,)) -> list[list[int]]:
        """Take over a match: one reference to each of its blocks, without the first ``passed[g]`` ones of group g.

        Returns:
            the blocks of each group, 0 where they were passed.
        """
        for node in match.path:
            node.hits += 1
        tables = []
        for group, count in enumerate(passed):
            blocks = [block for node in match.path[count:] if (block := node.blocks[group]) is not None]
            if len(blocks) != max(0, len(match.path) - count):
                raise IntegrityError(f"a match lacks blocks of group {group} after the first {count}")
            self._pool.acquire(blocks)
            tables.append([0] * min(count, len(match.path)) + blocks)
        return tables

    def insert(self, parent: Branch, tokens: TokenArray, blocks: Sequence[int | None]) -> PrefixNode:
        """Register the cache of one block of ``tokens`` after ``parent``.

        ``blocks`` has one for each group, None where its window has passed it. Where equal content is registered
        already, that node comes back; a block of ``blocks`` is registered where the node has none in its group.
        """
        if not parent.attached:
            raise IntegrityError(f"the blocks {list(blocks)} cannot be registered: their prefix was forgotten")
        if isinstance(parent, Root):
            # A root without children is not kept, and another one may have taken its place.
            parent = self._roots.setdefault(parent.namespace, parent)
        key = tokens.tobytes()
        node = parent.children.get(key)
        if node is None:
            node = PrefixNode(parent, key, (None,) * len(blocks), self._tick())
            parent.children[key] = node
            self._heads.add(node)
        for group, block in enumerate(blocks):
            if block is not None and node.blocks[group] is None:
                if block in self._nodes:
                    raise IntegrityError(f"block {block} cannot be registered: it is already")
                self._pool.keep(block)
                self._nodes[block] = node
                node.blocks = (*node.blocks[:group], block, *node.blocks[group + 1 :])
        return node

    def pin(self, tokens: TokenArray, ttl: float | None, namespace: str = "") -> Pin:
        """Hold the longest registered prefix of ``tokens`` in full blocks for ``ttl`` seconds; for ever if None."""
        match = self.match(tokens, len(tokens), namespace)
        length = len(match.path)
        passed = [max(0, length - self._reach.get(group, length)) for group in range(len(self._windows))]
        tables = [table[count:] for table, count in zip(self.acquire(match, passed), passed, strict=True)]
        return self.pins.hold(namespace, length * self._pool.block_size, ttl, tables)

    def forget(self, node: PrefixNode) -> None:
        """Forget a node and all that follows it; owners keep their blocks, which nobody finds any more."""
        if not node.attached:
            return
        stack = [node]
        while stack:
            lost = stack.pop()
            stack.extend(lost.children.values())
            lost.children = {}
            lost.attached = False
            self._heads.discard(lost)
            for block in lost.blocks:
                self._give_up(block)
        self._unlink(node)

    def clear(self) -> None:
        """Forget everything, and end all pins."""
        self.pins.clear()
        for root in list(self._roots.values()):
            self._forget_all(root)
        if self.shelf is not None:
            self.shelf.drop(None)

    def drop(self, namespace: str) -> None:
        """Forget everything of one namespace, and end its pins."""
        self.pins.drop(namespace)
        self._forget_all(self.root(namespace))
        if self.shelf is not None:
            self.shelf.drop(namespace)

    def held_blocks(self) -> Iterator[tuple[str, int, bytes, int]]:
        """Namespace, group, bytes of the tokens of the whole prefix, and block: of all, tails before heads."""
        stack: list[Branch] = list(self._roots.values())
        nodes: list[Branch] = []
        while stack:
            nodes.append(stack.pop())
            stack.extend(nodes[-1].children.values())
        for node in reversed(nodes):
            if isinstance(node, PrefixNode):
                namespace, tokens = _key_of(node)
                for group, block in enumerate(node.blocks):
                    if block is not None:
                        yield namespace, group, tokens, block

    def reset(self) -> None:
        """Start with an empty tree over a pool that was reset."""
        self._roots = {}
        self._nodes = {}
        self._queue.clear()
        self._heads.clear()
        self.pins.reset()

    def released(self, block: int) -> None:
        """As :meth:`kvpass.runtime.pool.block_pool.Keeper.released`."""
        node = self._nodes[block]
        node.last_use = self._tick()
        if self._windows[node.blocks.index(block)] is not None:
            self._queue.push(block, node)
        self._queue_leaf(node)

    def make_room(self) -> None:
        """As :meth:`kvpass.runtime.pool.block_pool.Keeper.make_room`."""
        block = self._queue.pop(self._is_evictable)
        if block is None:
            raise IntegrityError("nothing can be evicted: every block without an owner leads to one with an owner")
        node = self._nodes[block]
        group = node.blocks.index(block)
        if self._windows[group] is None:
            self._shelve(node, *range(len(node.blocks)))
            self.forget(node)
            return
        self._shelve(node, group)
        node.blocks = (*node.blocks[:group], None, *node.blocks[group + 1 :])
        self._give_up(block)
        # A node that holds nothing stays as long as it leads to one that holds something.
        if not node.children and not any(block is not None for block in node.blocks):
            self._unlink(node)

    def check_integrity(self) -> None:
        """Assert that tree and pool agree.

        Raises:
            IntegrityError: naming what does not hold.
        """
        seen: dict[int, PrefixNode] = {}
        for namespace, root in self._roots.items():
            if root.namespace != namespace or not root.attached or not root.children:
                raise IntegrityError(f"the root of namespace {namespace!r} is broken")
        stack: list[Branch] = list(self._roots.values())
        while stack:
            branch = stack.pop()
            if not self._heads.check_integrity(branch):
                raise IntegrityError("the index of the children of a node is not what its children are")
            for key, node in branch.children.items():
                if node.parent is not branch or node.key != key or not node.attached or node.depth != branch.depth + 1:
                    raise IntegrityError(f"the tree is broken at the blocks {node.blocks}")
                held = {block: node for block in node.blocks if block is not None}
                if held.keys() & seen.keys() or not (held or node.children):
                    raise IntegrityError(f"the blocks {node.blocks} are registered twice, or none of them is there")
                self._check_groups(node)
                seen |= held
                stack.append(node)
        if seen != self._nodes:
            raise IntegrityError("the registered blocks are not those of the tree")
        if self._pool.kept_blocks() != seen.keys():
            raise IntegrityError("the registered blocks are not those whose content the pool keeps")

    def _walk(self, raw: bytes, step: int, namespace: str) -> tuple[list[PrefixNode], int, dict[int, int]]:
        """All nodes of a prefix, how many of them every group can be taken over from, and each window group's run.

        The run is how many blocks it has at the end of those without a gap.
        """
        branch: Branch = self.root(namespace)
        path: list[PrefixNode] = []
        present = dict.fromkeys(self._reach, 0)
        usable, there = 0, present.copy()
        for end in range(step, len(raw) + 1, step):
            node = branch.children.get(raw[end - step : end])
            if node is None:
                break
            path.append(node)
            branch = node
            for group in present:
                present[group] = 0 if node.blocks[group] is None else present[group] + 1
            if all(count >= min(len(path), self._reach[group]) for group, count in present.items()):
                usable, there = len(path), present.copy()
        return path, usable, there

    def _shelve(self, node: PrefixNode, *groups: int) -> None:
        if self.shelf is not None:
            namespace, tokens = _key_of(node)
            for group in groups:
                block = node.blocks[group]
                if block is not None:
                    self.shelf.shelve(namespace, group, tokens, block)

    def _forget_all(self, root: Root) -> None:
        for node in list(root.children.values()):
            self.forget(node)

    def _check_groups(self, node: PrefixNode) -> None:
        for group, block in enumerate(node.blocks):
            windowed = self._windows[group] is not None
            if block is None:
                if not windowed:
                    raise IntegrityError("a node has given up a block that no window has passed")
                continue
            parent = node.parent.blocks[group] if isinstance(node.parent, PrefixNode) else None
            if not windowed and self._pool.is_used(block) and parent is not None and not self._pool.is_used(parent):
                raise IntegrityError(f"block {parent} could be evicted before block {block} that follows it")
            if self._is_evictable(block, node) and (windowed or group == self._full[0]) and block not in self._queue:
                raise IntegrityError(f"block {block} can be evicted and is not queued for it")

    def _is_evictable(self, block: int, node: PrefixNode | None = None) -> bool:
        node = node or self._nodes[block]
        if self._windows[node.blocks.index(block)] is not None:
            return not self._pool.is_used(block)
        return not node.children and not any(self._pool.is_used(b) for b in node.blocks if b is not None)

    def _queue_leaf(self, node: PrefixNode) -> None:
        """Queue a node, as its first block without a window, if it can be evicted as a whole."""
        if self._full:
            block = node.blocks[self._full[0]]
            if block is not None and self._is_evictable(block, node):
                self._queue.push(block, node)

    def _unlink(self, node: PrefixNode) -> None:
        """Take a node without children out of the tree, and with it the ones before it that then hold nothing."""
        while True:
            parent = node.parent
            del parent.children[node.key]
            self._heads.remove(node)
            node.attached = False
            if parent.children:
                return
            if isinstance(parent, Root):
                del self._roots[parent.namespace]
            if not isinstance(parent, PrefixNode):
                return
            if any(block is not None for block in parent.blocks):
                self._queue_leaf(parent)
                return
            node = parent

    def _give_up(self, block: int | None) -> None:
        if block is not None:
            del self._nodes[block]
            self._queue.discard(block)
            self._pool.forget(block)

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def _key_of(node: PrefixNode) -> tuple[str, bytes]:
    """The namespace of an attached node, and the bytes of all tokens of its prefix."""
    keys = []
    branch: Branch = node
    while isinstance(branch, PrefixNode):
        keys.append(branch.key)
        branch = branch.parent
    assert isinstance(branch, Root)
    return branch.namespace, b"".join(reversed(keys))


def _groups_held(nodes: list[PrefixNode]) -> list[list[bool]]:
    """For each node which groups have their blocks."""
    return [[block is not None for block in node.blocks] for node in nodes]
