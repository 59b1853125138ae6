"""Which blocks hold the cache of a sequence in one group, in the order of its tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_FIRST_CAPACITY = 16


class BlockTable:
    """Blocks of one sequence in one group.

    Attributes:
        num_blocks: entries, those that were given back included.
        num_passed: entries from the front whose blocks no query to come can see; they were given back and are 0.
    """

    __slots__ = ("_blocks", "num_blocks", "num_passed")

    def __init__(self) -> None:
        self.num_blocks = 0
        self.num_passed = 0
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
        owned: list[int] = self._blocks[self.num_passed : self.num_blocks].tolist()
        return owned

    def copy_to(self, row: NDArray[np.int64], count: int) -> None:
        """Write the first ``count`` entries to the beginning of ``row``."""
        row[:count] = self._blocks[:count]

    def extend(self, blocks: list[int]) -> None:
        """Append blocks."""
        end = self.num_blocks + len(blocks)
        if end > len(self._blocks):
            grown = np.empty(max(2 * len(self._blocks), end), dtype=np.int64)
            grown[: self.num_blocks] = self.entries
            self._blocks = grown
        self._blocks[self.num_blocks : end] = blocks
        self.num_blocks = end

    def replace(self, position: int, block: int) -> int:
        """Put ``block`` at ``position`` and return the block that was there."""
        old = int(self._blocks[position])
        self._blocks[position] = block
        return old

    def skip(self, count: int) -> None:
        """Append ``count`` entries that have no block, to a table all of whose blocks were given back."""
        if count:
            self.extend([0] * count)
            self.num_passed = self.num_blocks

    def pass_front(self, count: int) -> list[int]:
        """Take the first ``count`` blocks out, as far as they are still there, and return them."""
        passed: list[int] = self._blocks[self.num_passed : count].tolist()
        self._blocks[self.num_passed : count] = 0
        self.num_passed = max(self.num_passed, count)
        return passed

    def take_end(self, count: int) -> list[int]:
        """Take out all entries but the first ``count``, and return their blocks."""
        taken: list[int] = self._blocks[max(count, self.num_passed) : self.num_blocks].tolist()
        self.num_blocks = min(count, self.num_blocks)
        self.num_passed = min(self.num_passed, self.num_blocks)
        return taken
