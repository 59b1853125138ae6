"""What the prefix tree asks of whoever keeps content that is evicted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from kvpass.runtime.tiers.host_memory import StoredBlock
from kvpass.runtime.tiers.tiers import Prefetch, Wanted


class Shelf(Protocol):
    """Where evicted content goes, and may be found later under its whole key."""

    def shelve(self, namespace: str, group: int, tokens: bytes, block: int) -> None:
        """Note that ``block``, which holds the cache of ``tokens`` in ``group``, is being evicted."""

    def find(self, wanted: Wanted) -> list[list[StoredBlock | None]]:
        """As :meth:`kvpass.runtime.tiers.tiers.Tiers.find`."""

    def prefetch(self, wanted: Wanted) -> Prefetch | None:
        """As :meth:`kvpass.runtime.tiers.tiers.Tiers.prefetch`."""

    def fill(self, stored: Mapping[int, StoredBlock]) -> None:
        """Write stored content to the blocks that are its keys, at once."""

    def drop(self, namespace: str | None) -> None:
        """Forget the content of one namespace; all of it if None."""
