"""``engine.cache``: what is kept for reuse, in the hands of the caller."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor

from kvpass.config import CacheConfig, parse_bytes
from kvpass.engine.fingerprint import fingerprint
from kvpass.errors import ConfigError, InputError
from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.pool.wide_blocks import WideBlocks
from kvpass.runtime.prefix.pins import Pin
from kvpass.runtime.prefix.prefix_cache import PrefixCache
from kvpass.runtime.sequences.requests import token_array
from kvpass.runtime.tiers.block_moves import BlockMoves
from kvpass.runtime.tiers.disk_store import DiskStore
from kvpass.runtime.tiers.tiers import Tiers
from kvpass.types import CachePlan


class CacheHandle:
    """The prefixes that an engine keeps for reuse; an attribute of :class:`kvpass.Engine`, any thread may call."""

    def __init__(
        self,
        plan: CachePlan,
        prefix_cache: PrefixCache | None,
        moves: BlockMoves,
        exclusive: Callable[[], AbstractContextManager[None]],
        open_disk: Callable[[], DiskStore | None] = lambda: None,
    ) -> None:
        self._plan = plan
        self._prefix_cache = prefix_cache
        self._moves = moves
        # Between two steps of the engine.
        self._exclusive = exclusive
        self._open_disk = open_disk

    def pin(self, tokens: Ordered[int], ttl: float | None = None, namespace: str = "") -> Pin:
        """Hold the longest cached prefix of ``tokens`` for ``ttl`` seconds, whatever else wants its blocks.

        What is not cached is not computed: generate from the prompt first, and pin it then. Pinned blocks are not there
        for others. Only if a request could not run at all beside them, with nothing else running, pins end before
        their time, those made first before the others.

        Args:
            tokens: token ids.
            ttl: seconds; None until :meth:`unpin`.
            namespace: of the requests that are to find it.

        Returns:
            the pin; its ``num_tokens`` says how many tokens are held, those of full blocks.

        Raises:
            InputError: if an argument cannot be used.
            ConfigError: if the engine does not share prefixes.
        """
        if ttl is not None and (isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl < math.inf):
            raise InputError(f"ttl={ttl!r} is no positive number of seconds: give one, or None to hold until unpin")
        ids = token_array(tokens, "tokens", self._plan)
        cache = self._require_sharing()
        with self._exclusive():
            return cache.pin(ids, ttl, _checked(namespace))

    def unpin(self, pin: Pin) -> bool:
        """End a pin; False if it had ended already."""
        if not isinstance(pin, Pin):
            raise InputError(f"pin is a {type(pin).__name__}: give what engine.cache.pin returned")
        cache = self._require_sharing()
        with self._exclusive():
            return cache.pins.release(pin)

    def drop(self, namespace: str = "") -> None:
        """Forget what is kept of one namespace, on the device, in host memory and on disk, and end its pins.

        Requests under way go on undisturbed; what they compute from then on is kept.
        """
        cache = self._require_sharing()
        with self._exclusive():
            cache.drop(_checked(namespace))
            self._moves.flush()

    def clear(self) -> None:
        """Forget all that is kept, wherever it is, and end all pins. Requests under way go on undisturbed."""
        if self._prefix_cache is not None:
            with self._exclusive():
                self._prefix_cache.clear()
                self._moves.flush()

    def forget_weights(self) -> None:
        """Forget all that was computed with weights that have changed; between two steps.

        On disk it stays, for who has those weights: there, each state of the weights has a folder of its own.
        """
        if self._prefix_cache is not None:
            self._moves.change_disk(None)
            self._prefix_cache.clear()
            self._moves.change_disk(self._open_disk())

    def save(self) -> None:
        """Write all that is kept to the disk of ``CacheConfig(disk=...)``, for a later engine of the same model."""
        cache = self._require_sharing()
        if not self._moves.has_disk:
            raise ConfigError("there is no disk to save to: give CacheConfig(disk=...) a folder")
        with self._exclusive():
            self._moves.save(cache.held_blocks())

    def _require_sharing(self) -> PrefixCache:
        if self._prefix_cache is None:
            raise ConfigError("nothing is kept for reuse: prefix_sharing is off in CacheConfig")
        return self._prefix_cache


def _checked(namespace: str) -> str:
    if not isinstance(namespace, str):
        raise InputError(f"namespace={namespace!r} is no string")
    return namespace


def shares_prefixes(plan: CachePlan, config: CacheConfig) -> bool:
    """Whether what a block holds is known from its tokens and those before it, and all that they leave is in blocks.

    Not so where tokens see later ones of a prefix, where tokens are forgotten, and where there are recurrent states.

    Raises:
        ConfigError: if there are states, and blocks are to be kept in host memory or on disk.
    """
    if plan.states and (config.host_memory is not None or config.disk is not None):
        raise ConfigError(
            "this module has recurrent states, which are not kept with blocks: leave host_memory and disk out"
        )
    return config.prefix_sharing and config.forgetting is None and not plan.prefix and not plan.states


def make_moves(
    module: object,
    plan: CachePlan,
    config: CacheConfig,
    caches: Ordered[tuple[Tensor, Tensor]],
    pool: BlockPool,
    prefix_cache: PrefixCache | None,
    wide: WideBlocks | None,
) -> BlockMoves:
    """What moves blocks between ``caches`` and the tiers that ``config`` asks for, if any; then the tree's shelf."""
    if not config.host_bytes or prefix_cache is None:
        return BlockMoves(plan, caches, pool, wide=wide)
    disk = open_disk(module, plan, config)
    tiers = Tiers(config.host_bytes // 2, disk, plan.block_size, plan.group_windows)
    moves = BlockMoves(plan, caches, pool, tiers, config.host_bytes // 2, wide)
    prefix_cache.shelf = moves
    return moves


def open_disk(module: object, plan: CachePlan, config: CacheConfig) -> DiskStore | None:
    """The disk that ``config`` asks for, if any, with what was stored for a module and its weights as they are now."""
    if config.disk is None or not config.host_bytes:
        return None
    # Each model has a folder of its own, so that none ever looks at what another one stored.
    folder = Path(config.disk) / fingerprint(module, plan)
    return DiskStore(folder, parse_bytes(config.disk_memory), wipe=config.scrub)
