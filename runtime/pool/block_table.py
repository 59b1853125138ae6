"""Which blocks hold the cache of a sequence in one group, in the order of its tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_FIRST_CAPACITY = 16


class BlockTable:
    """Blocks of one sequence in one group.

    Attributes:
        num_blocks: entries, those that were given back included.
        num_kept: entries at the front that are not given back, while later ones are; 0 where there are no such. Kept
            blocks that are chosen move there, in their order.
        num_passed: entries from the front whose blocks no query to come can see; but for those kept they were given
            back and are 0.
        changes: how often entries were changed.
    """

    __slots__ = ("_blocks", "_first_kept", "changes", "num_blocks", "num_kept", "num_passed")

    def __init__(self, num_kept: int = 0) -> None:
        self.num_blocks = 0
        self.num_kept = self._first_kept = num_kept
        self.num_passed = 0
        self.changes = 0
        # Grows by doubling: what a request asks for at most is no measure of what it will need.
        self._blocks: NDArray[np.int64] = np.empty(_FIRST_CAPACITY, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        """The block of the tokens from ``position * P`` on."""
        return int(self._blocks[position])

    @property
    def entries(self) -> NDArray[np.int64]:
        """``[num_blocks]``, 0 where the block was given back; a view."""
        return self._blocks[: self.num_blocks]

    @property
    def owned(self) -> list[int]:
        """The blocks that were not given back."""
        owned: list[int] = self.present(self.num_blocks).tolist()
        return owned

    @property
    def num_given_back(self) -> int:
        """Entries whose blocks were given back."""
        return max(0, self.num_passed - self.num_kept)

    @property
    def num_forgotten(self) -> int:
        """Entries whose blocks were given back behind the kept ones. The kernels must not see these entries at all."""
        return self.num_given_back if self.num_kept else 0

    def present(self, count: int) -> NDArray[np.int64]:
        """Of the first ``count`` entries, or as many as there are, those whose blocks were not given back."""
        entries = self.entries[:count]
        if not self.num_given_back:
            return entries
        return np.concatenate((entries[: self.num_kept], entries[self.num_passed :]))

    def twin(self, count: int) -> BlockTable:
        """A table with the same first ``count`` entries."""
        twin = BlockTable(self._first_kept)
        twin.extend(self.entries[:count].tolist())
        twin.num_passed, twin.num_kept = min(self.num_passed, count), self.num_kept
        return twin

    def copy_to(self, row: NDArray[np.int64]) -> None:
        """Write the entries, without those forgotten, to ``row``, as far as it reaches; then zeros."""
        entries = (self.present(self.num_blocks) if self.num_forgotten else self.entries)[: len(row)]
        row[: len(entries)] = entries
        row[len(entries) :] = 0

    def extend(self, blocks: list[int]) -> None:
        """Append blocks."""
        end = self.num_blocks + len(blocks)
        if end > len(self._blocks):
            grown = np.empty(max(2 * len(self._blocks), end), dtype=np.int64)
            grown[: self.num_blocks] = self.entries
            self._blocks = grown
        self._blocks[self.num_blocks : end] = blocks
        self.num_blocks = end
        self.changes += 1

    def replace(self, position: int, block: int) -> int:
        """Put ``block`` at ``position`` and return the block that was there."""
        old = int(self._blocks[position])
        self._blocks[position] = block
        self.changes += 1
        return old

    def skip(self, count: int) -> None:
        """Append ``count`` entries that have no block, to a table all of whose blocks were given back."""
        if count:
            self.extend([0] * count)
            self.num_passed = self.num_blocks

    def pass_front(self, count: int) -> list[int]:
        """Take the first ``count`` blocks out, as far as they are still there and not kept, and return them."""
        first = max(self.num_passed, self.num_kept)
        passed: list[int] = self._blocks[first:count].tolist()
        self._blocks[first:count] = 0
        self.num_passed = max(self.num_passed, count)
        self.changes += 1
        return passed

    def thin_front(self, count: int, kept: list[int]) -> list[int]:
        """Take out what is left of the first ``count`` entries, but for some, and return the blocks.

        Args:
            count: entries that are passed now, more than before.
            kept: places, among the blocks that are there, of those that stay; they become the first entries.
        """
        there: list[int] = self.present(count).tolist()
        staying = set(kept)
        self._blocks[:count] = 0
        self._blocks[: len(kept)] = [there[place] for place in kept]
        self.num_kept, self.num_passed = len(kept), count
        self.changes += 1
        return [block for place, block in enumerate(there) if place not in staying]

    def take_end(self, count: int) -> list[int]:
        """Take out all entries but the first ``count``, and return their blocks."""
        held = len(self.present(count))
        taken: list[int] = self.present(self.num_blocks)[held:].tolist()
        self.num_blocks = min(count, self.num_blocks)
        self.num_passed = min(self.num_passed, self.num_blocks)
        self.num_kept = self.num_kept if self.num_blocks else self._first_kept
        self.changes += 1
        return taken
