"""State slots: where the recurrent states of running sequences are, and the tensors behind them.

A state is of one size however long its sequence is. So there is no table: a running sequence has one slot, the same in
the tensors of all states, and nobody shares it. Slots are numbers here, as blocks are in the pool; what has to be moved
is noted while the scheduler decides, and done at once before the next step is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from kvpass.errors import ConfigError, IntegrityError
from kvpass.types import CachePlan, StateSpec


class StateMove(NamedTuple):
    """What a slot has to hold when the step begins: what ``source`` held before it, or zeros where that is None."""

    source: int | None
    target: int


class StateSlots:
    """Who has which of ``num_slots`` slots; every operation takes constant time.

    Attributes:
        num_slots: sequences that can have a state at once.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.reset()

    def reset(self) -> None:
        """Make every slot free, whoever had it."""
        # Free slots that were given out before; those from _first_fresh on never were, and are free as well.
        self._free: list[int] = []
        self._first_fresh = 0
        self._has_owner = bytearray(self.num_slots)
        # Of slots that were given out since the last step: whose content they take over, as it is before the next step
        # is computed; None for zeros. Never by way of another slot that is listed, so that all are moved at once.
        self._sources: dict[int, int | None] = {}

    @property
    def num_used(self) -> int:
        """Slots that have an owner."""
        return self._first_fresh - len(self._free)

    def take(self, like: int | None = None) -> int:
        """Give out a slot, which will hold zeros, or what the slot ``like`` holds, when the next step is computed.

        Raises:
            IntegrityError: if none is free, or ``like`` has no owner.
        """
        _require(like is None or bool(self._has_owner[like]), f"state slot {like} is free and cannot be copied")
        _require(self.num_used < self.num_slots, "more sequences run than there are state slots")
        if self._free:
            slot = self._free.pop()
        else:
            slot, self._first_fresh = self._first_fresh, self._first_fresh + 1
        self._has_owner[slot] = 1
        self._sources[slot] = None if like is None else self._sources.get(like, like)
        return slot

    def release(self, slot: int) -> None:
        """Take a slot back. Slots that are to be copies of it still will be: what it holds stays until then.

        Raises:
            IntegrityError: if it has no owner.
        """
        _require(bool(self._has_owner[slot]), f"state slot {slot} is released but has no owner")
        self._has_owner[slot] = 0
        self._sources.pop(slot, None)
        self._free.append(slot)

    def take_moves(self) -> tuple[StateMove, ...]:
        """What has to be moved before the next step is computed, by :func:`move_states`; it is not told again."""
        moves = tuple(StateMove(source, target) for target, source in self._sources.items())
        self._sources = {}
        return moves

    def check_integrity(self, owned: Iterable[int | None]) -> None:
        """Assert every invariant, given the slot of each running sequence.

        Raises:
            IntegrityError: naming the invariant that does not hold.
        """
        counts = Counter(owned)
        _require(None not in counts, "a sequence runs without a state slot")
        _require(all(count == 1 for count in counts.values()), "a state slot has two owners")
        _require(len(set(self._free)) == len(self._free), "a state slot stands twice in the free list")
        _require(all(0 <= slot < self._first_fresh <= self.num_slots for slot in self._free), "a fresh slot is listed")
        used = {slot for slot, has_owner in enumerate(self._has_owner) if has_owner}
        _require(used == set(counts), "the state slots in use are not those that the running sequences have")
        _require(used.isdisjoint(self._free) and len(used) == self.num_used, "a state slot is neither free nor in use")
        _require(used.issuperset(self._sources), "a state slot without an owner is to be written")


def bytes_per_state(plan: CachePlan) -> int:
    """Bytes of all states of one sequence.

    Raises:
        ConfigError: if one of them cannot be stored.
    """
    _check_states(plan.states)
    return sum(prod(spec.shape) * spec.dtype.itemsize for spec in plan.states)


def allocate_states(plan: CachePlan, num_slots: int, device: torch.device | str) -> tuple[Tensor, ...]:
    """Zeros ``[num_slots, *shape]`` for each state, in the order of the plan.

    Raises:
        ConfigError: if one of them cannot be stored, or the device has too little memory.
    """
    size = num_slots * bytes_per_state(plan)
    try:
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            return tuple(torch.zeros(num_slots, *spec.shape, dtype=spec.dtype, device=device) for spec in plan.states)
    except (MemoryError, RuntimeError) as error:
        raise ConfigError(
            f"the states of {num_slots} sequences, {size} bytes, could not be allocated on {device}: give a smaller "
            f"max_sequences in CacheConfig ({error})"
        ) from error


def move_states(states: Iterable[Tensor], moves: Ordered[StateMove]) -> None:
    """Copy and zero slots in all of ``states``, in place; every source is read before any target is written."""
    copied = [(move.source, move.target) for move in moves if move.source is not None]
    zeroed = [move.target for move in moves if move.source is None]
    for state in states:
        slots = state.flatten(1).view(torch.uint8) if state.dim() > 1 else state.unsqueeze(1).view(torch.uint8)
        if copied:
            sources, targets = torch.tensor(copied, device=state.device).t()
            slots[targets] = slots[sources]
        if zeroed:
            slots[torch.tensor(zeroed, device=state.device)] = 0


def _check_states(specs: tuple[StateSpec, ...]) -> None:
    names = Counter(spec.name for spec in specs)
    for spec in specs:
        if names[spec.name] > 1:
            raise ConfigError(f"two states of the plan have the name {spec.name!r}: give each one of its own")
        if not all(type(size) is int and size > 0 for size in spec.shape):
            raise ConfigError(f"the state {spec.name!r} has the shape {spec.shape!r}: give whole numbers of at least 1")
        if not isinstance(spec.dtype, torch.dtype):
            raise ConfigError(f"the state {spec.name!r} has the dtype {spec.dtype!r}: give a torch.dtype")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise IntegrityError(message)
