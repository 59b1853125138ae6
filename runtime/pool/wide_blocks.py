"""Which blocks of a k4v2 cache are wide at the moment, and which settle before a step: integers only.

A block of the pool has a place of its own among the settled ones, whatever happens. While tokens are written to it, and
as long as it is the first or among the newest of a sequence under way, it also has one of the few wide places, and its
content is there. So the pool, the prefix tree and the scheduler know nothing of all this: a block keeps its number, and
only the tables that are handed to the kernels tell the kinds apart, a wide place w as ``-1 - w``.

A block settles before the first step that finds another full block behind it. Blocks that nobody needs in 16 bits any
more, of sequences that have ended, keep their wide places until others need them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpass.errors import CapacityError, IntegrityError

Integers = NDArray[np.int64]
Moves = tuple[tuple[int | None, int], ...]
SETTLED = -1


class _State(NamedTuple):
    """Replaced as a whole, so that an exception never leaves half of a change.

    Attributes:
        place: wide place of each block, or :data:`SETTLED`.
        free: wide places that no block has.
        moves: copies (source, target), in the numbers of the caches, that have to be made before anything is computed:
            batches of some that may be made at once, in order. No target of a batch is one of its sources. Where the
            sources of a batch are None, its targets are wiped.
    """

    place: Integers
    free: tuple[int, ...]
    moves: tuple[Moves, ...] = ()


class WideBlocks:
    """The wide places of one block pool."""

    def __init__(
        self,
        num_blocks: int,
        num_wide: int,
        block_size: int,
        windows: Sequence[int | None],
        is_used: Callable[[int], bool],
        scrub: bool = False,
    ) -> None:
        """Begin with free places.

        Args:
            num_blocks: blocks of the pool, B.
            num_wide: wide places.
            block_size: tokens per block, P.
            windows: of each group of caches the newest tokens that are looked at; None for all.
            is_used: whether a block has an owner.
            scrub: whether places are wiped when they become free.
        """
        self._scrub = scrub
        self.num_wide = num_wide
        self._size = block_size
        self._windows = tuple(windows)
        self._is_used = is_used
        self._state = _State(np.full(num_blocks, SETTLED, dtype=np.int64), tuple(range(num_wide)))
        # Tokens that are written of each wide block, and the step in which it was last needed in 16 bits.
        self._filled = np.zeros(num_blocks, dtype=np.int64)
        self._needed = np.zeros(num_blocks, dtype=np.int64)
        self._clock = 0

    @property
    def num_used(self) -> int:
        """Wide places that a block has."""
        return self.num_wide - len(self._state.free)

    @property
    def moves(self) -> Moves:
        """The next batch of copies to be made; making one twice does no harm. Then comes :meth:`done`."""
        return self._state.moves[0] if self._state.moves else ()

    def done(self) -> None:
        """Take note that the batch of :attr:`moves` was made."""
        self._state = self._state._replace(moves=self._state.moves[1:])

    def number(self, blocks: Integers) -> Integers:
        """The numbers of ``blocks`` in the caches; any entry that is no block counts as settled."""
        known = (blocks >= 0) & (blocks < len(self._state.place))
        place = self._state.place[np.where(known, blocks, 0)]
        return np.where(known & (place != SETTLED), -1 - place, blocks)

    def prepare(self, tables: Integers, slots: Integers, lengths: Integers) -> None:
        """Plan the moves before a step: what is due settles, and each block that is written to gets a wide place.

        Args:
            tables: blocks of each sequence ``[G, N, W]``, in the pool's numbers.
            slots: ``[G, T]``, where new tokens are written, in the pool's numbers.
            lengths: ``[N]``, tokens of each sequence that are written already.

        Raises:
            CapacityError: if there are too few wide places. Nothing is changed then.
        """
        if self.moves:
            raise IntegrityError("the moves of an earlier step were not made")
        self._clock += 1
        size = self._size
        written, first, last = _offsets_by_block(slots, size)
        due, kept = self._divide(tables, lengths)
        self._needed[kept] = self._clock
        self._needed[written] = self._clock
        place = self._state.place
        due = due[(place[due] != SETTLED) & (self._filled[due] == size)]
        settling = sorted(set(due.tolist()) - set(written.tolist()) - set(kept.tolist()))
        missing = [block for block in written.tolist() if place[block] == SETTLED]
        if settling or missing:
            begun = {block for block, offset in zip(written.tolist(), first.tolist(), strict=True) if offset}
            self._state = self._exchange(settling, missing, begun, set(written.tolist()))
        self._filled[written] = np.where(first == 0, 0, self._filled[written])
        self._filled[written] = np.maximum(self._filled[written], last + 1)

    def copied(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Plan the moves for copies (source, target) of whole blocks, in the pool's numbers; targets are wide."""
        sources, targets = np.array(list(pairs), dtype=np.int64).reshape(-1, 2).T
        self._clock += 1
        self._needed[targets] = self._clock
        missing = [block for block in targets.tolist() if self._state.place[block] == SETTLED]
        before, self._state = self._state, self._exchange([], missing, set(), set(targets.tolist()))
        try:
            numbers = zip(self.number(sources).tolist(), self.number(targets).tolist(), strict=True)
            after = self._state._replace(moves=(*self._state.moves, tuple(numbers)))
        finally:
            self._state = before
        self._filled[targets] = self._size
        self._state = after

    def widen(self, blocks: Integers, filled: Integers) -> None:
        """Plan the moves so that ``blocks``, which are about to be written whole, have wide places.

        Args:
            blocks: in the pool's numbers.
            filled: tokens that will be written of each.

        Raises:
            CapacityError: if there are too few wide places. Nothing is changed then.
        """
        self._clock += 1
        self._needed[blocks] = self._clock
        missing = [block for block in blocks.tolist() if self._state.place[block] == SETTLED]
        self._state = self._exchange([], missing, set(), set(blocks.tolist()))
        self._filled[blocks] = filled

    def forget(self, blocks: Integers) -> None:
        """Take the wide places from ``blocks``: nothing that is there is of use any more."""
        place = self._state.place.copy()
        freed = place[blocks][place[blocks] != SETTLED].tolist()
        place[blocks] = SETTLED
        moves = (*self._state.moves, *self._wipe(freed))
        self._state = _State(place, (*self._state.free, *freed), moves)
        self._filled[blocks] = 0

    def count_filled(self, blocks: Integers) -> Integers:
        """How many tokens are written of each of ``blocks``, as far as it is wide."""
        return self._filled[blocks]

    def check_integrity(self) -> None:
        """Assert that every wide place is free or has one block.

        Raises:
            IntegrityError: if it does not hold.
        """
        taken = self._state.place[self._state.place != SETTLED].tolist()
        if sorted([*taken, *self._state.free]) != list(range(self.num_wide)):
            raise IntegrityError("a wide place of the cache is neither free nor one block's")
        if self._state.moves:
            raise IntegrityError("blocks of the cache were to be settled and are not")

    def _divide(self, tables: Integers, lengths: Integers) -> tuple[Integers, Integers]:
        """Blocks that may settle, and those that stay as they are: the first and the newest of each sequence."""
        index = np.arange(tables.shape[2])
        begun = index * self._size < lengths[:, None]
        passed = may_settle(index, lengths[:, None], self._size)
        due, kept = [], []
        for table, window in zip(tables, self._windows, strict=True):
            seen = begun
            if window is not None:
                seen = begun & ((index + 1) * self._size > lengths[:, None] - window + 1)
            due.append(table[seen & passed])
            kept.append(table[seen & ~passed])
        return np.unique(np.concatenate(due)), np.unique(np.concatenate(kept))

    def _exchange(self, settling: list[int], missing: list[int], begun: set[int], taken: set[int]) -> _State:
        """The state in which ``settling`` have settled and ``missing`` are wide.

        What ``begun`` ones hold is kept; those of ``taken`` do not lose their places.
        """
        place, free, moves = self._state.place.copy(), list(self._state.free), []
        freed: list[int] = []

        def give_up(block: int) -> None:
            # The content of a block that has no owner and is not full is worth nothing.
            if self._filled[block] == self._size:
                moves.append((int(-1 - place[block]), block))
            freed.append(int(place[block]))
            place[block] = SETTLED

        for block in settling:
            give_up(block)
        lacking = len(missing) - len(free) - len(freed)
        if lacking > 0:
            for block in self._others(place, lacking, taken):
                give_up(block)
        free += freed
        widened = []
        for block in missing:
            place[block] = free.pop()
            if block in begun:
                widened.append((block, int(-1 - place[block])))
        batches = ((tuple(moves),) if moves else (), self._wipe(freed), (tuple(widened),) if widened else ())
        return _State(place, tuple(free), (*self._state.moves, *chain(*batches)))

    def _wipe(self, places: list[int]) -> tuple[Moves, ...]:
        """What is planned for wide places that become free: no batch, or one."""
        return (tuple((None, -1 - place) for place in places),) if self._scrub and places else ()

    def _others(self, place: Integers, count: int, taken: set[int]) -> list[int]:
        """``count`` wide blocks that may lose their places, those that were not needed for longest first."""
        wide = np.setdiff1d(np.flatnonzero(place != SETTLED), list(taken))
        full = self._filled[wide] == self._size
        wide = wide[[bool(f) or not self._is_used(int(block)) for block, f in zip(wide, full, strict=True)]]
        chosen: list[int] = wide[np.argsort(self._needed[wide], kind="stable")][:count].tolist()
        if len(chosen) < count:
            raise CapacityError(
                f"{self.num_wide} blocks of the cache may be in 16 bits at a time, and one step needs more: give the "
                "cache more memory, or lower max_batch_tokens or max_sequences"
            )
        return chosen


def may_settle(index: Integers, length: Integers | int, size: int) -> NDArray[np.bool_]:
    """Whether the blocks at ``index`` of sequences settle once so many tokens are written, of ``size`` in a block.

    All but the first settle, before the first step that finds another full one behind them.
    """
    return (index > 0) & ((index + 2) * size <= length)


def _offsets_by_block(slots: Integers, size: int) -> tuple[Integers, Integers, Integers]:
    """The blocks that ``slots`` are in, and the first and last offset in each."""
    blocks, where = np.unique(slots // size, return_inverse=True)
    first, last = np.full(len(blocks), size), np.full(len(blocks), -1)
    np.minimum.at(first, where.ravel(), (slots % size).ravel())
    np.maximum.at(last, where.ravel(), (slots % size).ravel())
    return blocks, first, last
