"""``kvpass.incremental``: what the model is given goes on with sequences that the scope keeps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from torch import Tensor

from kvpass.dynamo.calls import LeftAlone, ModelCall
from kvpass.dynamo.doorway import as_refused
from kvpass.dynamo.graph_engines import GraphEngine
from kvpass.dynamo.rows import read_batch
from kvpass.dynamo.scopes import Scope
from kvpass.dynamo.under_way import Reading
from kvpass.engine.row_session import Row
from kvpass.errors import InputError, RefusedError


class IncrementalScope(Scope):
    """See :func:`incremental`. Sequences are numbered from 0, in the order in which they were made."""

    def __init__(self, compiled: Any) -> None:
        super().__init__(compiled)
        self._sequences: list[Row] = []
        # Which of them the rows of the next calls go on with; None for all.
        self._chosen: list[int] | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return tuple(map(len, self._sequences))

    def tokens(self, sequence: int) -> tuple[int, ...]:
        """The tokens of one sequence."""
        return self._sequences[self._number(sequence)]

    def rows(self, sequences: Iterable[int] | Tensor | None = None) -> None:
        """Say which sequences the rows of the next calls go on with, in this order; None for all.

        Raises:
            InputError: if there is no such sequence, or one is named twice.
        """
        self._check_inside()
        self._chosen = None if sequences is None else self._numbers(sequences)

    def add(self, count: int = 1) -> list[int]:
        """Make empty sequences; gives their numbers, which :meth:`rows` takes."""
        self._check_inside()
        first = len(self._sequences)
        self._sequences += [()] * count
        return list(range(first, first + count))

    def fork(self, sequence: int, count: int = 1) -> list[int]:
        """Make sequences with the tokens of one; they share its blocks. Gives their numbers."""
        self._check_inside()
        tokens = self.tokens(sequence)
        made = self.add(count)
        for number in made:
            self._sequences[number] = tokens
        return made

    def truncate(self, length: int, sequences: Iterable[int] | Tensor | None = None) -> None:
        """Forget the tokens of some sequences, or of all, from the place ``length`` on.

        Raises:
            InputError: if there is no such sequence, or one is shorter than that.
        """
        self._check_inside()
        numbers = range(len(self._sequences)) if sequences is None else self._numbers(sequences)
        for number in numbers:
            if not isinstance(length, int) or not 0 <= length <= len(self._sequences[number]):
                raise InputError(
                    f"sequence {number} has {len(self._sequences[number])} tokens, and cannot be cut to {length}"
                )
        for number in numbers:
            self._sequences[number] = self._sequences[number][:length]

    def reorder(self, order: Iterable[int] | Tensor) -> None:
        """Have the row ``i`` of the next calls go on from where row ``order[i]`` of those before stands, as beams do.

        Where some sequences were chosen by :meth:`rows`, these are reordered among themselves; else all are, and there
        are as many afterwards as ``order`` has entries.

        Raises:
            InputError: if there is no such row; or if there are more or fewer than were chosen.
        """
        self._check_inside()
        chosen = range(len(self._sequences)) if self._chosen is None else self._chosen
        places = [int(place) for place in (order.flatten() if isinstance(order, Tensor) else order)]
        if any(not 0 <= place < len(chosen) for place in places):
            raise InputError(f"order={places} names rows that there are none of: there are {len(chosen)}")
        tokens = [self._sequences[chosen[place]] for place in places]
        if self._chosen is None:
            self._sequences = tokens
            return
        if len(places) != len(chosen):
            raise InputError(f"order has {len(places)} entries for the {len(chosen)} sequences that were chosen")
        for number, row in zip(chosen, tokens, strict=True):
            self._sequences[number] = row

    def _compute(self, found: GraphEngine, call: ModelCall, reading: Reading) -> Tensor:
        if call.causal is not None:
            raise LeftAlone(f"it is given {call.mask}, a mask of whole sequences: kvpass.cached takes them")
        if not self._sequences:
            self.add(len(call.ids))
        chosen = list(range(len(self._sequences))) if self._chosen is None else self._chosen
        if len(chosen) != len(call.ids):
            raise InputError(
                f"the batch has {len(call.ids)} rows, and the scope {len(chosen)} sequences for them: say which ones "
                "it goes on with, cache.rows([...]), after cache.add() for new ones"
            )
        before = [self._sequences[number] for number in chosen]
        batch = read_batch(call.ids, call.attention_mask, call.position_ids, [len(row) for row in before])
        rows = [(*row, *new) for row, new in zip(before, batch.rows, strict=True)]
        if reading.is_open:
            raise LeftAlone("its forward compares lengths with a number that it is given")
        for length in {len(row) for row in rows}:
            if not reading.holds(len(rows), length):
                raise LeftAlone(f"its forward is another function for sequences of {length} tokens")
        others = [row for number, row in enumerate(self._sequences) if number not in set(chosen)]
        session = self._session(found.engine)
        self._try_short(found, call, session, rows[0])
        logits = session.logits_from(rows, [len(row) for row in before], others)
        for number, row in zip(chosen, rows, strict=True):
            self._sequences[number] = row
        return found.as_given(batch.place(logits))

    def _leave_alone(self, reason: LeftAlone | RefusedError) -> NoReturn:
        """New tokens alone, given to the model as it is, would be another text: there is nothing to fall back to."""
        raise reason if isinstance(reason, RefusedError) else as_refused(reason)

    def _number(self, sequence: int) -> int:
        if not isinstance(sequence, int) or not 0 <= sequence < len(self._sequences):
            raise InputError(f"there is no sequence {sequence}: the scope has {len(self._sequences)}, numbered from 0")
        return sequence

    def _numbers(self, sequences: Iterable[int] | Tensor) -> list[int]:
        given = sequences.flatten().tolist() if isinstance(sequences, Tensor) else sequences
        numbers = [self._number(number) for number in given]
        if len(set(numbers)) < len(numbers):
            raise InputError(f"rows {numbers} name a sequence twice: fork it, each row appends to its own")
        return numbers


def incremental(compiled: Any) -> IncrementalScope:
    """A scope in which the tokens that the model is given are appended to sequences, and only they are computed.

    ``with kvpass.incremental(model) as cache: ...``: the first call makes a sequence of each row, and later calls go on
    with them; the logits are those of the tokens given, ``[B, S, V]``. Rows may be padded on either side, with an
    ``attention_mask`` of the shape of the ids: what it marks as padding is no token, and its logits are zero.
    ``cache.rows``, ``fork``, ``truncate`` and ``reorder`` say which sequences the next call goes on with.

    Args:
        compiled: what ``torch.compile(model, backend="kvpass")`` returns.

    Raises:
        InputError: as :func:`kvpass.cached`; by a call, if its rows are not the sequences that were chosen.
        RefusedError: by a call, if no cache can be kept for the model: there is no other way to compute it.
        CapacityError: by a call, if the pool is too small.
    """
    return IncrementalScope(compiled)
