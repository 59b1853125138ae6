"""Where the content of blocks goes while their sequence is preempted, so that it need not be computed again."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from typing import Protocol


class SwapSpace(Protocol):
    """Memory beside the pool. All calls take place between two steps, and in the order of the device's work."""

    def swap_out(self, blocks: Ordered[int], places: Ordered[int], computed: int) -> object | None:
        """Copy the content of blocks of a sequence out; a handle for it, or None where there is no room.

        Args:
            blocks: in any groups.
            places: of each, how many blocks of its group hold the tokens before it.
            computed: tokens of the sequence that are written.
        """

    def swap_in(self, handle: object, targets: Ordered[tuple[int, int]]) -> bool:
        """Copy content back: for each ``(place, block)`` what the block at that place of ``swap_out`` held.

        False if the content was lost; the blocks may then hold anything. The handle stays valid.
        """

    def discard(self, handle: object) -> None:
        """Forget the content."""

    def clear(self) -> None:
        """Forget everything; no handle is used any more."""
