"""Blocks that a step registers for reuse, until it is known whether the step came to its end.

Full blocks are registered as soon as they are scheduled, so that sequences which arrive together share them. This is
sound because each layer writes the tokens of a step before its attention reads. Until :meth:`StepRegistry.settle` they
are pending, and :meth:`StepRegistry.undo` takes them back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.prefix.prefix_cache import PrefixCache
from kvpass.runtime.prefix.prefix_nodes import Branch, Match, PrefixNode
from kvpass.runtime.sequences.sequence import Sequence
from kvpass.runtime.tiers.host_memory import StoredBlock
from kvpass.runtime.tiers.tiers import Prefetch


class Replacement(NamedTuple):
    """A block of a sequence whose content turned out to be registered already, in ``block``."""

    sequence: Sequence
    group: int
    position: int
    block: int


class StepRegistry:
    """Registers the blocks of sequences in a prefix cache, if there is one."""

    def __init__(self, pool: BlockPool, prefix_cache: PrefixCache | None) -> None:
        self._pool = pool
        self._prefix_cache = prefix_cache
        # The nodes that the step in flight registered, and the references it took for replacements.
        self._pending: dict[PrefixNode, None] = {}
        self._replacements: list[Replacement] = []

    @property
    def is_settled(self) -> bool:
        """Nothing is pending."""
        return not (self._pending or self._replacements)

    @property
    def pending_blocks(self) -> set[int]:
        """Blocks that are registered, and that the step in flight writes."""
        return {block for node in self._pending for block in node.blocks if block is not None}

    @property
    def referenced_blocks(self) -> list[int]:
        """Blocks that sequences will come to own when the step has come to its end; owned on their behalf."""
        return [replacement.block for replacement in self._replacements]

    def find_prefix(self, sequence: Sequence) -> Match | None:
        """The registered blocks with which ``sequence`` begins."""
        if self._prefix_cache is None:
            return None
        # At least one token has to be computed, or there would be no logits; and all whose logits are asked for.
        most = sequence.num_tokens - 1
        if sequence.scored_from is not None:
            most = min(most, sequence.scored_from)
        return self._prefix_cache.match(sequence.tokens, most, sequence.namespace)

    def find_more(self, sequence: Sequence) -> Match | None:
        """What others have registered since of the tokens that ``sequence`` is about to compute; None if nothing."""
        branch, size = sequence.branch, self._pool.block_size
        first = sequence.num_registered
        if branch is None or not branch.attached or sequence.num_computed != first * size:
            return None
        if sequence.tokens[first * size : (first + 1) * size].tobytes() not in branch.children:
            return None
        match = self.find_prefix(sequence)
        if match is None or len(match.path) <= first or (first and match.path[first - 1] is not branch):
            return None
        return match

    def prefetch(self, sequence: Sequence) -> Prefetch | None:
        """Begin to bring nearer what is stored far away of the tokens of ``sequence``; None if nothing is."""
        if self._prefix_cache is None:
            return None
        return self._prefix_cache.prefetch(sequence.tokens, sequence.num_tokens - 1, sequence.namespace)

    def fill(self, targets: Mapping[int, StoredBlock]) -> None:
        """Write stored content to blocks, at once."""
        if self._prefix_cache is not None and self._prefix_cache.shelf is not None:
            self._prefix_cache.shelf.fill(targets)

    def take_over(self, sequence: Sequence, match: Match, passed: list[int]) -> None:
        """Make the blocks of ``match`` the first ones of ``sequence``; of group g those from ``passed[g]`` on.

        The sequence owns none of the nodes of ``match`` but a first part, up to its branch.
        """
        if self._prefix_cache is None:
            return
        first = sequence.num_registered
        new = Match(match.branch, match.path[first:])
        tables = self._prefix_cache.acquire(new, [max(0, count - first) for count in passed])
        for table, blocks, count in zip(sequence.tables, tables, passed, strict=True):
            self._pool.release(table.pass_front(min(count, first)))
            skipped = max(0, min(count, len(match.path)) - first)
            table.skip(skipped)
            table.extend(blocks[skipped:])
        sequence.branch = match.branch
        sequence.num_registered = len(match.path)
        sequence.num_computed = len(match.path) * self._pool.block_size

    def next_block(self, sequence: Sequence) -> tuple[Branch, bytes] | None:
        """The full block of tokens that follows what ``sequence`` has registered; None if none will be registered."""
        size, first = self._pool.block_size, sequence.num_registered
        if sequence.branch is None or not sequence.branch.attached or (first + 1) * size > sequence.num_tokens:
            return None
        return sequence.branch, sequence.tokens[first * size : (first + 1) * size].tobytes()

    def is_pending(self, node: PrefixNode) -> bool:
        """Whether the content of a node is written by the step in flight."""
        return node in self._pending

    def register(self, sequence: Sequence, length: int, written: bool = False) -> None:
        """Register the full blocks of the first ``length`` tokens of ``sequence``.

        Unless they are ``written`` already, it depends on the step in flight whether they stay registered.
        """
        branch = sequence.branch
        size = self._pool.block_size
        full = length // size
        if full <= sequence.num_registered or self._prefix_cache is None or branch is None or not branch.attached:
            return
        tokens = sequence.tokens
        for index in range(sequence.num_registered, full):
            blocks = [table[index] if index >= table.num_passed else None for table in sequence.tables]
            node = self._prefix_cache.insert(branch, tokens[index * size : (index + 1) * size], blocks)
            own_content = any(own == known is not None for own, known in zip(blocks, node.blocks, strict=True))
            if own_content and not written:
                self._pending[node] = None
            for group, (own, registered) in enumerate(zip(blocks, node.blocks, strict=True)):
                if registered is not None and own is not None and registered != own:
                    # Owning the registered block as well keeps it, and with it the path to the root, in place.
                    self._pool.acquire([registered])
                    self._replacements.append(Replacement(sequence, group, index, registered))
            branch = node
        sequence.branch = branch
        sequence.num_registered = full

    def settle(self) -> None:
        """The step has come to its end: what is pending is there, and equal blocks become one."""
        for sequence, group, position, block in self._replacements:
            self._pool.release([sequence.tables[group].replace(position, block)])
        self.start_anew()

    def undo(self) -> None:
        """The step has failed: forget what it registered. To be called before its sequences give back their blocks."""
        if self._prefix_cache is not None:
            for node in self._pending:
                self._prefix_cache.forget(node)
        # Before the tables: descendants are released before their ancestors.
        self._pool.release(self.referenced_blocks)
        self.start_anew()

    def start_anew(self) -> None:
        """Nothing is pending."""
        self._pending = {}
        self._replacements = []

    def forget_content(self, sequence: Sequence) -> None:
        """Unregister all that a sequence wrote or read: any of it may be what broke its logits."""
        branch = sequence.branch
        first: PrefixNode | None = None
        while isinstance(branch, PrefixNode):
            first, branch = branch, branch.parent
        if first is not None and self._prefix_cache is not None:
            self._prefix_cache.forget(first)
        if self._prefix_cache is not None and self._prefix_cache.shelf is not None:
            self._prefix_cache.shelf.drop(sequence.namespace)
