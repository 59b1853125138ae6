"""Evaluate a mask at chosen lengths and bring it to one form, in which masks of different spelling are equal.

That form is a :class:`BiasMatrix`: ``-inf`` where a key is hidden, an exact float32 value where it is visible, nothing
that softmax would not notice. A :class:`MaskProbe` makes one per probed length and holds what has to be true of a mask
before anyone asks what it means: it hides the future, it is the same for every sequence of a batch, and a pair of
positions keeps its value when the sequence grows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, isqrt

import torch
from torch import Tensor

# A key is hidden when its bias lies this far below the largest of its row: -1e4, as bfloat16 rounds it.
HIDDEN_BELOW = 9984.0
# A future key lowered by more than this was meant to be hidden, so the refusal says how to hide it.
MEANT_TO_HIDE = 30.0
# Two values are equal when a few float32 roundings of their terms explain the difference, and in no case when they
# differ by more than this fraction of the largest value: then the terms are so large that they would explain anything.
ROUNDING = 2.0**-21
MOST_SHIFT = 65536.0  # of all scores of a query: float32 rounds them to 1/256 then
ROUNDING_CAP = 1e-3

SMALL_LENGTHS = (1, 2, 5, 12, 33)
# Below these, bfloat16 and float16 hold every integer; above, positions and slopes * positions begin to be rounded.
ROUNDED_FROM = (256, 2048)
# A constant of the mask acts within this many tokens of itself.
BEYOND = 9
LONGEST = 8192 + BEYOND
# Entries of one evaluated matrix (2.3 GiB in float32): 32 heads can still be probed at 4096 tokens.
PROBE_ENTRIES = 600 * 2**20
BATCH_ENTRIES = 2**22
CHUNK_ENTRIES = 2**19


class NotProvenError(Exception):
    """The mask has no meaning that could be proven; the message is the reason given to the user."""


def unproven(acts: str) -> str:
    """Why a mask is refused on whose entries something acts beside their places."""
    return f"the mask may change with the length of the sequence: {acts}, and no proof for every length was found"


class _EvaluationError(Exception):
    """The mask has no value at this batch and length."""


@dataclass(frozen=True, eq=False)
class BiasMatrix:
    """A mask at one length.

    Attributes:
        values: ``[1 | Hq, S, S]`` float32, indexed by (q, k): the bias, ``-inf`` where the key is hidden.
        shift: ``[1 | Hq, S]`` float32, subtracted from each row; tells how coarsely the values are rounded.
    """

    values: Tensor
    shift: Tensor

    @property
    def length(self) -> int:
        """Tokens S of the sequence."""
        return self.values.shape[-1]

    @cached_property
    def magnitude(self) -> float:
        """The largest absolute value on a visible key."""
        chunks = (self.values[:, rows] for rows in row_chunks(self.values))
        return max(float(chunk.masked_fill(chunk == -inf, 0).abs().max()) for chunk in chunks)

    def first_difference(self, other: BiasMatrix) -> tuple[int, int, int] | None:
        """First (head, q, k) at which ``other``, of this length or longer, has another value."""
        length = self.length
        heads = max(self.values.shape[0], other.values.shape[0])
        for rows in row_chunks(self.values):
            mine = self.values[:, rows].expand(heads, -1, -1)
            theirs = other.values[:, rows, :length].expand(heads, -1, -1)
            if torch.equal(mine, theirs):
                continue
            shift = torch.maximum(self.shift[:, rows].abs(), other.shift[:, rows].abs())
            found = first_true(differs(mine, theirs, shift[..., None], max(self.magnitude, other.magnitude)))
            if found is not None:
                return found[0], rows.start + found[1], found[2]
        return None

    def depends_on_distance_only(self) -> bool:
        """Whether each value is a function of ``q - k``: the last row, which knows every distance, tells all others."""
        heads, length = self.shift.shape
        future = self.values.new_full((heads, length - 1), -inf)
        # Entry i holds row length - 1 - i, so that chunks of rows are read upside down.
        upside_down = torch.cat([self.values[:, -1], future], dim=-1).unfold(-1, length, 1)
        last = self.shift[:, -1:].abs()
        for rows in row_chunks(self.values):
            expected = upside_down[:, length - rows.stop : length - rows.start].flip(1)
            found = self.values[:, rows]
            if torch.equal(expected, found):
                continue
            shift = torch.maximum(self.shift[:, rows].abs(), last)
            if bool(differs(found, expected, shift[..., None], self.magnitude).any()):
                return False
        return True

    def is_chunked(self, size: int) -> bool:
        """Whether a key is visible just in the chunk of ``size`` tokens that the query is in, and nothing is added."""
        if size >= self.length:
            return False
        keys = torch.arange(self.length, device=self.values.device)
        for rows in row_chunks(self.values):
            queries = keys[rows, None]
            shown = (keys <= queries) & (keys // size == queries // size)
            if not torch.equal(self.values[:, rows], torch.where(shown, 0.0, -inf).expand(len(self.values), -1, -1)):
                return False
        return True

    def reach(self) -> int:
        """The largest distance over which a query sees a key, plus one; 0 when none sees any."""
        reach = 0
        for rows in row_chunks(self.values):
            visible = (self.values[:, rows] > -inf).any(0)
            oldest = visible.to(torch.uint8).argmax(-1)
            queries = torch.arange(rows.start, rows.stop, device=oldest.device)
            reach = max(reach, int(((queries - oldest + 1) * visible.any(-1)).max()))
        return reach


@dataclass(eq=False)
class MaskProbe:
    """A mask under examination, and all that is known of it so far.

    Attributes:
        evaluate: gives the additive bias for (batch, length), broadcastable to ``[batch, Hq, length, length]``.
        num_heads: query heads Hq.
        absolute_scores: the softmax has sinks, so that a constant added to a row counts.
        lengths: lengths probed; the matrix of each is the upper left corner of every longer one.
        fails_at: shortest length found at which the mask cannot be evaluated; then ``largest`` is one token shorter.
        largest: the matrix at the largest probed length.
        longest: longest length whose matrix may be evaluated as a whole.
    """

    evaluate: Callable[[int, int], Tensor]
    num_heads: int
    absolute_scores: bool
    lengths: set[int] = field(default_factory=set)
    fails_at: int | None = None
    largest: BiasMatrix = field(init=False)
    longest: int = field(init=False)

    def __post_init__(self) -> None:
        try:
            first = self._evaluated(1, 1)
        except _EvaluationError as error:
            raise NotProvenError(str(error)) from error
        self.longest = isqrt(PROBE_ENTRIES // first.shape[1])
        self.largest = self._normalised(first[0])
        self._accept(self.largest)

    def extend(self, length: int) -> BiasMatrix:
        """The matrix at ``length``, or at the largest length that can be evaluated, checked against all others.

        Raises:
            NotProvenError: if the mask cannot be rewritten, whatever its meaning.
        """
        if self.fails_at is not None:
            length = min(length, self.fails_at - 1)
        if length == self.largest.length:
            return self.largest
        try:
            raw = self._evaluated(1, length)
        except _EvaluationError as error:
            if length < self.largest.length:
                raise NotProvenError(str(error)) from error
            self._find_last_before(length)
            return self.extend(length)
        matrix = self._normalised(raw[0])
        self._accept(matrix)
        return matrix

    def equals(self, values: Tensor) -> bool:
        """Whether a bias ``[1 | Hq, S, S]``, float64, is that of the mask at this length."""
        length = values.shape[-1]
        mine = self._normalised(self._evaluated(1, length)[0])
        return mine.first_difference(self._normalised(values.to(torch.float32).to(mine.values.device))) is None

    def tried(self) -> str:
        """The probed lengths."""
        return ", ".join(str(length) for length in sorted(self.lengths))

    def evidence(self) -> str:
        """What was evaluated, for the report."""
        return f"probed at S = {self.tried()}"

    def _accept(self, matrix: BiasMatrix) -> None:
        """Add ``matrix`` to what is known, if it agrees with it."""
        self._check_batch(matrix)
        shorter, longer = sorted((matrix, self.largest), key=lambda one: one.length)
        place = shorter.first_difference(longer)
        if place is not None:
            head, query, key = place
            raise NotProvenError(
                f"the mask depends on the length of the sequence: for the query at position {query} and the key at "
                f"position {key} it is {_entry(shorter, head, query, key)} with {shorter.length} tokens, "
                f"{_entry(longer, head, query, key)} with {longer.length}"
            )
        self.lengths.add(matrix.length)
        self.largest = longer

    def _check_batch(self, matrix: BiasMatrix) -> None:
        """Compare the sequences of a batch of 2 and of 3 with a batch of 1."""
        length = matrix.length
        for batch in (2, 3):
            if batch * matrix.values.numel() > BATCH_ENTRIES:
                return
            try:
                sequences = self._evaluated(batch, length)
            except _EvaluationError as error:
                raise NotProvenError(str(error)) from error
            for index, raw in enumerate(sequences.unbind(0)):
                other = self._normalised(raw)
                place = matrix.first_difference(other)
                if place is not None:
                    head, query, key = place
                    raise NotProvenError(
                        f"the mask differs between sequences of a batch: at length {length}, for the query at position "
                        f"{query} and the key at position {key}, it is {_entry(other, head, query, key)} in sequence "
                        f"{index} of {batch}, {_entry(matrix, head, query, key)} in a batch of one"
                    )

    def _find_last_before(self, fails: int) -> None:
        """Set ``fails_at`` by bisection between the largest probed length and ``fails``."""
        works = self.largest.length
        while fails - works > 1:
            middle = (works + fails) // 2
            try:
                self._evaluated(1, middle)
                works = middle
            except _EvaluationError:
                fails = middle
        self.fails_at = fails

    def _evaluated(self, batch: int, length: int) -> Tensor:
        """The raw bias, ``[1 | batch, 1 | Hq, length, length]``, in the dtype in which it was computed."""
        where = f"the mask cannot be evaluated for batch {batch} and length {length}"
        try:
            with torch.no_grad():
                raw = self.evaluate(batch, length).detach()
        except NotProvenError:
            raise
        except Exception as error:  # the graph is the user's, so any error can come out of it
            cause = (str(error).strip().splitlines() or [""])[0][:160]
            raise _EvaluationError(f"{where}: {type(error).__name__}: {cause}") from error
        wanted = (batch, self.num_heads, length, length)
        shape = (1,) * (4 - raw.dim()) + tuple(raw.shape)
        if len(shape) != 4 or any(have not in (1, want) for have, want in zip(shape, wanted, strict=True)):
            raise _EvaluationError(f"{where}: its shape {tuple(raw.shape)} does not broadcast to {wanted}")
        return raw.reshape(shape).expand(-1, -1, length, length)

    def _normalised(self, raw: Tensor) -> BiasMatrix:
        """The bias ``[1 | Hq, S, S]`` of one sequence without row constants, which softmax ignores, and hidden keys."""
        if raw.shape[0] > 1 and (raw.stride(0) == 0 or all(torch.equal(raw[0], head) for head in raw[1:])):
            raw = raw[:1]
        values = torch.empty(raw.shape, dtype=torch.float32, device=raw.device)
        shift = torch.zeros(raw.shape[:2], dtype=torch.float32, device=raw.device)
        lowest = max(torch.finfo(raw.dtype).min, torch.finfo(torch.float32).min) if raw.is_floating_point() else -inf
        for rows in row_chunks(raw):
            part = raw[:, rows].to(torch.float32)
            top = part.amax(-1, keepdim=True)
            if not bool((top < inf).all()):
                row = int((~(top < inf)).any(0).nonzero()[0, 0])
                raise NotProvenError(f"the mask is NaN or +inf for the query at position {rows.start + row}")
            floor = top.clamp(min=0) if self.absolute_scores else top
            hidden = part <= (floor - HIDDEN_BELOW).clamp(min=lowest)
            self._check_rows(part, hidden, rows.start)
            if not self.absolute_scores:
                own_hidden = hidden.diagonal(rows.start, -2, -1)
                shift[:, rows] = torch.where(own_hidden, top[..., 0], part.diagonal(rows.start, -2, -1))
                self._check_shift(shift[:, rows], rows.start)
            torch.sub(part, shift[:, rows, None], out=values[:, rows])
            values[:, rows].masked_fill_(hidden, -inf)
        return BiasMatrix(values, shift)

    def _check_shift(self, shift: Tensor, start: int) -> None:
        """Refuse rows whose scores would be rounded away by what is added to all of them."""
        if not bool((shift.abs() <= MOST_SHIFT).all()):
            row = int((shift.abs() > MOST_SHIFT).any(0).nonzero()[0])
            raise NotProvenError(
                f"the bias adds {float(shift[:, row].abs().max()):g} to every score of the query at position "
                f"{start + row}: a softmax does not see it, but the scores are rounded away by it"
            )

    def _check_rows(self, part: Tensor, hidden: Tensor, start: int) -> None:
        """Refuse rows ``[1 | Hq, r, S]``, from position ``start``, that see nothing at all or the future."""
        blind = hidden.all(-1)
        if not self.absolute_scores and bool(blind.any()):
            row = int(blind.any(0).nonzero()[0])
            raise NotProvenError(
                f"the mask hides every key from the query at position {start + row}, and what attention answers to "
                "such a query is undefined"
            )
        future = (~hidden[..., start + 1 :]).triu()
        place = first_true(future) if bool(future.any()) else None
        if place is not None:
            head, row, key = place[0], place[1], start + 1 + place[2]
            lowered = float(part[head, row].max() - part[head, row, key])
            advice = f"; it only lowers that score by {lowered:g}: write -inf to hide a key"
            raise NotProvenError(
                f"the mask lets the query at position {start + row} see the key at position {key}, which comes later"
                + (advice if lowered > MEANT_TO_HIDE else "")
            )


def probe_lengths(constants: Iterable[int], longest: int) -> list[int]:
    """Lengths up to ``longest`` at which to evaluate a mask with these constants: small ones, and one beyond each."""
    lengths = set(SMALL_LENGTHS)
    for constant in sorted(constants):
        if constant < longest and not any(constant < length <= constant + BEYOND for length in lengths):
            lengths.add(min(constant + BEYOND, longest))
    return sorted(length for length in lengths if length <= longest)


def differs(one: Tensor, other: Tensor, shift: Tensor, magnitude: float) -> Tensor:
    """Where two biases differ by more than the float32 rounding of the terms, ``shift`` among them, they came from."""
    rounding = ((one.abs() + 2 * shift.abs()) * ROUNDING).clamp(max=ROUNDING_CAP * magnitude)
    # Both are -inf where both hide a key: equal, though their difference is not a number.
    return ~((one == other) | ((one - other).abs() <= rounding))


def row_chunks(matrix: Tensor) -> Iterator[slice]:
    """Slices of the rows of ``[H, r, S]``, small enough for a few temporaries of each."""
    heads, rows, length = matrix.shape
    step = max(1, CHUNK_ENTRIES // (heads * length))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def first_true(found: Tensor) -> tuple[int, int, int] | None:
    """First (head, row, key) of a boolean ``[H, r, S]`` that is true, in the order of rows; None where none is."""
    places = found.any(0).nonzero()
    if not len(places):
        return None
    row, key = places[0].tolist()
    return int(found[:, row, key].nonzero()[0]), row, key


def _entry(matrix: BiasMatrix, head: int, query: int, key: int) -> str:
    value = float(matrix.values[min(head, matrix.values.shape[0] - 1), query, key])
    return "hidden" if value == -inf else f"{value:g}"
