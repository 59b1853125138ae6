"""What blocks hold, as bytes: read from the tensors of the caches, and written to them, whole blocks at a time.

In caches that settle (k4v2) a block is in its own place or, in 16 bits, in a wide one. Its bytes are those of where it
is, so their number tells which; they come back to a place of the same kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from collections.abc import Sequence as Ordered
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvpass.kernels.formats.cache_formats import FORMATS
from kvpass.kernels.formats.settling import move_blocks, wide_view
from kvpass.runtime.pool.wide_blocks import Integers, WideBlocks
from kvpass.runtime.tiers.host_memory import Payload
from kvpass.types import CachePlan


class _Part(NamedTuple):
    """One tensor of the caches.

    Attributes:
        own: uint8 ``[B, bytes of a block]``, the same memory.
        wide: of a cache that settles uint8 ``[n, bytes of a wide block]``, number -1 the last; of others None.
    """

    own: Tensor
    wide: Tensor | None


class BlockBytes:
    """The bytes of blocks, uint8 ``[bytes]`` for each, in the caches of one group or of all."""

    def __init__(self, plan: CachePlan, caches: Ordered[tuple[Tensor, Tensor]], wide: WideBlocks | None) -> None:
        """Read and write ``caches``, in the order of the plan; ``wide`` tells which blocks are, where caches settle."""
        self._wide = wide
        self._plan = plan
        self._caches = caches
        self._groups: list[list[_Part]] = [[] for _ in plan.group_windows]
        for spec, pair in zip(plan.caches, caches, strict=True):
            names = (spec.key_format, spec.value_format)
            self._groups[spec.group] += [_part(t, name) for t, name in zip(pair, names, strict=True) if t.numel()]
        # Groups may share tensors: layer i of each of them has its blocks in the same one.
        self._all = list({part.own.data_ptr(): part for parts in self._groups for part in parts}.values())

    def is_stored(self, group: int) -> bool:
        """Whether blocks of a group hold anything."""
        return bool(self._groups[group])

    def size(self, blocks: Ordered[int], settled: Collection[int] = ()) -> int:
        """How many bytes :meth:`read` gives in all, for all groups."""
        numbers = self._numbers(self._all, blocks, settled)
        return sum(count * _size(self._all, wide) for wide, count in Counter((numbers < 0).tolist()).items())

    def read(self, blocks: Ordered[int], settled: Collection[int] = (), group: int | None = None) -> list[Payload]:
        """What ``blocks`` hold in the caches of a group, or of all; those of ``settled``, full ones, as they settle."""
        self._move()
        parts = self._all if group is None else self._groups[group]
        own, numbers = np.array(blocks, dtype=np.int64), self._numbers(parts, blocks, settled)
        now = self._numbers(parts, blocks)
        # The own place of a wide block holds nothing: what it is to hold one day can be put there before.
        if early := list(zip(now[now != numbers].tolist(), own[now != numbers].tolist(), strict=True)):
            move_blocks(self._plan.caches, self._caches, early)
        found: dict[int, Payload] = {}
        for chosen in (np.flatnonzero(numbers >= 0), np.flatnonzero(numbers < 0)):
            if len(chosen):
                places = (_where(part, own[chosen], numbers[chosen]) for part in parts)
                rows = [tensor[torch.from_numpy(at).to(tensor.device)].cpu() for tensor, at in places]
                found |= zip(chosen.tolist(), torch.cat(rows, dim=1).numpy(), strict=True)
        return [found[place] for place in range(len(blocks))]

    def write(
        self, blocks: Ordered[int], content: Ordered[Payload], filled: Ordered[int], group: int | None = None
    ) -> None:
        """Have ``blocks`` hold what :meth:`read` gave, ``filled`` tokens of each."""
        parts = self._all if group is None else self._groups[group]
        own, counts = np.array(blocks, dtype=np.int64), np.array(filled, dtype=np.int64)
        is_wide = np.array([len(payload) != _size(parts, wide=False) for payload in content], dtype=bool)
        if self._wide is not None:
            self._move()
            self._wide.forget(own[~is_wide])
            self._wide.widen(own[is_wide], counts[is_wide])
            self._move()
        numbers = self._numbers(parts, blocks)
        for chosen in (np.flatnonzero(~is_wide), np.flatnonzero(is_wide)):
            if not len(chosen):
                continue
            rows = torch.from_numpy(np.stack([content[place] for place in chosen.tolist()]))
            places = [_where(part, own[chosen], numbers[chosen]) for part in parts]
            for (tensor, at), piece in zip(places, rows.split([t.shape[1] for t, _ in places], dim=1), strict=True):
                tensor[torch.from_numpy(at).to(tensor.device)] = piece.to(tensor.device)

    def wipe(self, blocks: Ordered[int]) -> None:
        """Overwrite ``blocks``, whose content is worth nothing, with zeros, wherever it is."""
        if self._wide is not None:
            self._move()
            self._wide.forget(np.array(blocks, dtype=np.int64))
            self._move()
        for part in self._all:
            part.own[torch.tensor(blocks, device=part.own.device)] = 0

    def close(self) -> None:
        """Let go of the caches."""
        self._groups, self._all, self._caches = [[] for _ in self._groups], [], ()

    def _numbers(self, parts: list[_Part], blocks: Ordered[int], settled: Collection[int] = ()) -> Integers:
        """Where the content of ``blocks`` is: their numbers in caches that settle, if they did so in ``settled``."""
        own = np.array(blocks, dtype=np.int64)
        if self._wide is None or all(part.wide is None for part in parts):
            return own
        return np.where(np.isin(own, list(settled)), own, self._wide.number(own))

    def _move(self) -> None:
        if self._wide is not None and self._caches:
            make_moves(self._wide, self._plan, self._caches)


def make_moves(wide: WideBlocks, plan: CachePlan, caches: Ordered[tuple[Tensor, Tensor]]) -> None:
    """Make in ``caches`` the moves that ``wide`` has planned."""
    while wide.moves:
        move_blocks(plan.caches, caches, wide.moves)
        wide.done()


def _part(tensor: Tensor, name: str) -> _Part:
    form, own = FORMATS[name], tensor.view(torch.uint8).flatten(1)
    return _Part(own, None if form.settles is None else wide_view(tensor, form).view(torch.uint8).flatten(1))


def _where(part: _Part, own: Integers, numbers: Integers) -> tuple[Tensor, Integers]:
    """The rows of a part in which blocks are, all of one kind, and which of them."""
    return (part.own, own) if part.wide is None or numbers[0] >= 0 else (part.wide, numbers)


def _size(parts: list[_Part], wide: bool) -> int:
    """Bytes of a block."""
    return sum(part.own.shape[1] if part.wide is None or not wide else part.wide.shape[1] for part in parts)
