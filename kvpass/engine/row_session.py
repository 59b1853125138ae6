"""The logits that follow rows of tokens, known rows by their content: for callers that choose tokens themselves.

Each call gives whole rows, as a loop without a cache would compute them. A row that is one of the rows of the call
before and one token more goes on where that one stands; of two rows that go on from one, the second is a fork. One of
the rows of the call before is answered from memory. Any other row is computed anew, but for what the prefix cache has
of it. Rows that nobody goes on with give their blocks back, and what is full of them stays in the prefix cache.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from kvpass.engine.request import News, Request
from kvpass.errors import InputError
from kvpass.runtime.sampling.beam_search import Choice
from kvpass.runtime.sequences.requests import make_sequences
from kvpass.runtime.sequences.sequence import Sequence
from kvpass.types import Sampling

if TYPE_CHECKING:
    from kvpass.engine.engine import Engine

Row = tuple[int, ...]


@dataclass
class Answer:
    """Logits ``[end - first, V]`` of the tokens ``first`` to ``end`` of a row; None before there are any."""

    first: int
    end: int
    logits: Tensor | None

    def add(self, logits: Tensor) -> None:
        """Take those of the next tokens as well."""
        self.logits = logits if self.logits is None else torch.cat((self.logits, logits))
        self.end += len(logits)

    def since(self, first: int) -> Tensor:
        """Those from the token at ``first`` on."""
        assert self.logits is not None
        return self.logits[first - self.first :]


HORIZON = 2**22  # tokens; proofs speak of no longer sequences
OPEN_ENDED = Sampling(ignore_eos=True)


class ChosenRows:
    """The rows that come of one prompt, as the step loop sees a search: what goes on is chosen by the caller.

    Attributes:
        sequences: the rows, each held once its logits are there.
        is_changing: they change hands.
        logits: of each row that is computed, ``[V]``.
        scored: logits ``[n, V]`` of tokens before the last, by the place of the first, where they were asked for.
        chosen: how the next rows go on; None until the caller has said.
    """

    def __init__(self, root: Sequence, news: News) -> None:
        self.sequences = [root]
        self.is_changing = False
        self.logits: dict[Sequence, Tensor] = {}
        self.scored: list[tuple[int, Tensor]] = []
        self.chosen: list[Choice] | None = None
        self._news = news

    @property
    def is_ready(self) -> bool:
        """Whether the next rows are known, and these computed."""
        return self.chosen is not None and all(sequence in self.logits for sequence in self.sequences)

    @property
    def is_computed(self) -> bool:
        """Whether the logits of all rows are there."""
        return self.chosen is None and all(sequence in self.logits for sequence in self.sequences)

    def note(self, sequences: Ordered[Sequence], logits: Tensor) -> None:
        """Take note of the logits ``[R, V]`` that follow some of the rows."""
        self.logits |= zip(sequences, logits.clone(), strict=True)
        self._news.wake()

    def note_scored(self, sequence: Sequence, first: int, logits: Tensor) -> None:
        """Take note of the logits ``[n, V]`` of tokens from ``first`` on, before any row goes on."""
        self.scored.append((first, logits.clone()))

    def answer(self, place: int) -> Tensor:
        """The logits ``[n, V]`` of a computed row: of its last token, and of those before that were asked for."""
        last = self.logits[self.sequences[place]][None]
        return torch.cat([*(part for _, part in sorted(self.scored, key=lambda scored: scored[0])), last])

    def choose(self) -> list[Choice]:
        """What was chosen; nothing where nobody goes on."""
        return self.chosen or []

    def replace(self, sequences: list[Sequence], choices: Ordered[Choice]) -> None:
        """Go on with ``sequences``, which have the tokens of ``choices``."""
        self.sequences, self.logits, self.scored, self.chosen = sequences, {}, [], None


class RowSession:
    """Rows of tokens that grow, over the cache of an engine.

    A context manager: on the way out, by exception too, it gives all blocks back. To be used by one thread at a time;
    other requests run beside it.

    Args:
        engine: computes them.
        longest: most tokens that a row will have.

    Raises:
        InputError: if the model has no rows as long as that.
    """

    def __init__(self, engine: Engine, longest: int) -> None:
        self._plan = engine.plan
        if self._plan.max_length is not None and longest > self._plan.max_length:
            reason = f" ({self._plan.max_length_reason})" if self._plan.max_length_reason else ""
            raise InputError(f"rows of {longest} tokens: the longest sequence is {self._plan.max_length}{reason}")
        self._loop = engine._loop
        self._driver = engine._driver
        self._check = engine._check
        self._weights = engine._weights
        self._longest = longest
        # What the call before gave, and for which weights.
        self._known: dict[Row, Answer] = {}
        self._changes = self._weights.changes
        self._live: list[tuple[Request, ChosenRows]] = []

    def logits(self, rows: Ordered[Row]) -> Tensor:
        """The logits that follow each row.

        Args:
            rows: token ids, at least one row of at least one token; equal rows are computed once.

        Returns:
            logits ``[len(rows), V]``, in the dtype of the model's.

        Raises:
            InputError: if a row is empty, too long, or holds what is no token id of the model.
            CapacityError: if the pool is too small for one of the rows even alone.
            WeightsChangedError: if the engine cannot go on with the model as it is.
            KvpassError: if a step failed.
        """
        found = self.logits_from(rows, [len(row) - 1 for row in rows])
        return torch.cat(found)

    def logits_from(self, rows: Ordered[Row], firsts: Ordered[int], kept: Collection[Row] = ()) -> list[Tensor]:
        """The logits behind the tokens of each row from one of them on.

        What the call before gave of a row, or of one that begins alike, is taken from there.

        Args:
            rows: as for :meth:`logits`.
            firsts: place in each row of the first token whose logits are wanted.
            kept: rows of earlier calls that are not asked for now and will be gone on with.

        Returns:
            of each row, logits ``[len(row) - first, V]``.

        Raises:
            InputError: as :meth:`logits`; also CapacityError, WeightsChangedError and KvpassError.
        """
        if not rows:
            raise InputError("there are no rows: give at least one")
        while True:
            self._weights.look()
            if self._changes != self._weights.changes:
                self.close()  # what is known is of other weights
                self._changes = self._weights.changes
            found = self._answers(rows, firsts, kept)
            if self._changes == self._weights.changes:
                return found

    def _answers(self, rows: Ordered[Row], firsts: Ordered[int], kept: Collection[Row]) -> list[Tensor]:
        """The logits, of one state of the weights unless they change meanwhile."""
        first: dict[Row, int] = {}
        for row, wanted in zip(rows, firsts, strict=True):
            first[row] = min(wanted, first.get(row, wanted))
        answers: dict[Row, Answer] = {}
        lacking: dict[Row, int] = {}
        for row, wanted in first.items():
            answers[row] = self._remember(row, wanted)
            if answers[row].end < len(row):
                lacking[row] = answers[row].end
        if lacking:
            for row, logits in self._compute(lacking, kept).items():
                answers[row].add(logits)
        self._known = answers
        return [answers[row].since(wanted) for row, wanted in zip(rows, firsts, strict=True)]

    def _remember(self, row: Row, first: int) -> Answer:
        """What the call before gave of the tokens of a row from ``first`` on, without a gap."""
        if first == len(row) - 1:
            known = self._known.get(row)
            return Answer(first, first, None) if known is None else Answer(first, known.end, known.since(first))
        for other, answer in self._known.items():
            end = min(common_length(row, other), answer.end)
            if answer.first <= first < end:
                return Answer(first, end, answer.since(first)[: end - first])
        return Answer(first, first, None)

    def _compute(self, rows: dict[Row, int], kept: Collection[Row]) -> dict[Row, Tensor]:
        """The logits of some rows, each from a token on."""
        try:
            places = self._choose(rows, kept)
            with self._loop.exclusive():
                pass  # whoever takes the lock has the rows go on that were chosen
            self._loop.on_submit()
            news = self._live[0][0].news
            self._driver.wait(news, lambda: all(found.is_computed or request.ended for request, found in self._live))
        except BaseException as error:
            if not isinstance(error, InputError):  # which is raised before anything is begun
                self.close()  # some rows may have gone on, and others not
            raise
        for request, _ in self._live:
            if request.ended:
                self.close()
                raise request.failure or InputError("the engine was closed while rows were computed")
        return {row: found.answer(place)[rows[row] - len(row) :] for row, (found, place) in places.items()}

    def close(self) -> None:
        """Give all blocks back; the session can go on with rows of any kind."""
        self._loop.cancel([request for request, _ in self._live])
        self._live, self._known = [], {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _choose(self, rows: dict[Row, int], kept: Collection[Row]) -> dict[Row, tuple[ChosenRows, int]]:
        """Say how each live row goes on, and ask for those that are new; gives where each row will be found."""
        known = {
            tuple(sequence.tokens.tolist()): (found, place)
            for _, found in self._live
            for place, sequence in enumerate(found.sequences)
        }
        for row in rows:
            if len(row) > self._longest:
                raise InputError(
                    f"a row has {len(row)} tokens, and the longest may have {self._longest}: so many were asked for, "
                    "or the model or the pool allow no more (CacheConfig memory)"
                )
            if row and not 0 <= row[-1] < self._plan.vocab_size:
                raise InputError(f"token {row[-1]} is none of the model's: ids are 0 to {self._plan.vocab_size - 1}")
        last = {row for row, first in rows.items() if first == len(row) - 1}
        if all(row in known for row in last) and len(last) == len(rows):
            return {row: known[row] for row in rows}
        new = [row for row in rows if row not in last or row[:-1] not in known]
        roots = make_sequences([list(row) for row in new], 1, OPEN_ENDED, self._plan, ()) if new else []
        for row, root in zip(new, roots, strict=True):
            root.max_new_tokens = self._longest - root.num_tokens + 1
            root.scored_from = None if row in last else rows[row]
        if roots:  # what goes on is looked at before each step
            self._check(roots)
        chosen: dict[ChosenRows, list[Choice]] = {found: [] for _, found in self._live}
        places: dict[Row, tuple[ChosenRows, int]] = {}
        for row in last - set(new):
            found, place = known[row[:-1]]
            places[row] = found, len(chosen[found])
            chosen[found].append(Choice(place, row[-1], 0.0))
        waiting = {known[row][0] for row in kept if row in known}
        gone = [request for request, found in self._live if not chosen[found] and found not in waiting]
        self._live = [(request, found) for request, found in self._live if chosen[found] or found in waiting]
        for _, found in self._live:
            found.chosen = chosen[found] or None
        self._loop.cancel(gone)
        news = self._live[0][0].news if self._live else News(pending=0)
        for row, root in zip(new, roots, strict=True):
            found = ChosenRows(root, news)
            news.pending += 1
            self._live.append((Request(root, 0, news, search=found), found))
            places[row] = found, 0
        self._loop.submit([request for request, found in self._live if found.sequences[0] in roots])
        return places


def longest_row(engine: Engine) -> int:
    """Most tokens of a row: as the model allows, and as the pool of an engine has room for."""
    scheduler, most = engine._scheduler, engine.plan.max_length or HORIZON
    return bisect_right(range(1, most + 1), False, key=lambda length: not scheduler.has_room(length))


def common_length(one: Row, other: Row) -> int:
    """How many tokens two rows begin with alike."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    return next(place for place in range(most) if one[place] != other[place])
