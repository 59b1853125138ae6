"""The block tables of a step's sequences as one array, of which only those that have changed are written anew."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpass.runtime.sequences.sequence import Sequence

_FIRST_WIDTH = 16


class TableRows:
    """Keeps the rows of the last step.

    From one step to the next most sequences stay and few of them get a block, so that a step costs a copy of the array
    and the few rows that differ.
    """

    def __init__(self) -> None:
        self._sequences: tuple[Sequence, ...] = ()
        # The tables' numbers of changes when their rows were written, sequence by sequence and group by group.
        self._changes: list[int] = []
        self._rows: NDArray[np.int64] = np.zeros((1, 0, _FIRST_WIDTH), dtype=np.int64)

    def build(self, sequences: tuple[Sequence, ...], width: int) -> NDArray[np.int64]:
        """``[G, N, width]``: the first blocks of each of N sequences, but those forgotten, then zeros.

        Later calls leave it as it is.
        """
        # Until all is done nothing counts as written, so that an exception leaves nothing wrong behind.
        before, self._sequences = self._sequences, ()
        groups = len(sequences[0].tables)
        if groups != len(self._rows) or width > self._rows.shape[2]:
            size = max(width, 2 * self._rows.shape[2])
            before, self._rows = (), np.zeros((groups, 0, size), dtype=np.int64)
        if sequences != before:
            self._rearrange(before, sequences)
        changes = [table.changes for sequence in sequences for table in sequence.tables]
        if changes != self._changes:
            for place, (now, written) in enumerate(zip(changes, self._changes, strict=True)):
                if now != written:
                    row, group = divmod(place, groups)
                    sequences[row].tables[group].copy_to(self._rows[group, row])
            self._changes = changes
        self._sequences = sequences
        return self._rows[:, :, :width].copy()

    def _rearrange(self, before: tuple[Sequence, ...], sequences: tuple[Sequence, ...]) -> None:
        """Put the rows of ``before`` into the order of ``sequences``; those of new ones count as never written."""
        groups, old = len(self._rows), {sequence: row for row, sequence in enumerate(before)}
        places = [old.get(sequence, -1) for sequence in sequences]
        changes = [*self._changes, *[-1] * groups] if before else [-1] * groups
        self._changes = [changes[place * groups + group] for place in places for group in range(groups)]
        blank = np.zeros((groups, 1, self._rows.shape[2]), dtype=np.int64)
        self._rows = np.concatenate((self._rows, blank), axis=1)[:, places]
