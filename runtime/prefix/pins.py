"""Prefixes that stay for some time, whatever else wants their blocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvpass.runtime.pool.block_pool import BlockPool


@dataclass(frozen=True, eq=False)
class Pin:
    """A prefix that is held.

    Attributes:
        namespace: where its blocks are registered.
        num_tokens: tokens that are held: those of its full blocks.
        expires: when it ends by itself, on the clock of its holder; None for never.
        tables: the blocks of each group, each owned once.
    """

    namespace: str
    num_tokens: int
    expires: float | None
    tables: tuple[tuple[int, ...], ...] = field(repr=False)


class Pins:
    """The owner of pinned blocks: what has an owner is never evicted, and its ancestors are owned with it."""

    def __init__(self, pool: BlockPool, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self.clock = clock
        # In the order in which they were made. None of them holds no block.
        self._pins: dict[Pin, None] = {}

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def tables(self) -> list[tuple[int, ...]]:
        """The blocks that each pin owns, group by group."""
        return [table for pin in self._pins for table in pin.tables]

    @property
    def blocks(self) -> set[int]:
        """Blocks that are pinned."""
        return {block for table in self.tables for block in table}

    def hold(self, namespace: str, num_tokens: int, ttl: float | None, tables: list[list[int]]) -> Pin:
        """Hold blocks that were acquired for this, for ``ttl`` seconds."""
        expires = None if ttl is None else self.clock() + ttl
        pin = Pin(namespace, num_tokens, expires, tuple(tuple(table) for table in tables))
        if num_tokens:
            self._pins[pin] = None
        return pin

    def release(self, pin: Pin) -> bool:
        """End a pin; False if it had ended already."""
        if pin not in self._pins:
            return False
        del self._pins[pin]
        for table in pin.tables:
            self._pool.release(table)
        return True

    def release_oldest(self) -> bool:
        """End the pin that was made first; False if there is none."""
        return bool(self._pins) and self.release(next(iter(self._pins)))

    def expire(self) -> None:
        """End the pins whose time is over."""
        if self._pins:
            now = self.clock()
            for pin in [pin for pin in self._pins if pin.expires is not None and pin.expires <= now]:
                self.release(pin)

    def drop(self, namespace: str) -> None:
        """End the pins of one namespace."""
        for pin in [pin for pin in self._pins if pin.namespace == namespace]:
            self.release(pin)

    def clear(self) -> None:
        """End all pins."""
        for pin in list(self._pins):
            self.release(pin)

    def reset(self) -> None:
        """Forget all pins, over a pool that was reset."""
        self._pins = {}
