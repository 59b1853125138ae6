"""What a mask means at every length: the meanings that kernels know, each proven of the expression that was read.

A proof speaks of all positions of all sequences below :data:`kvpass.fx_passes.graph.HORIZON` tokens.
Candidates come from the numbers of the expression and are tried out at sampled positions first; what passes is given to
the solver. What cannot be proven has no meaning here, however much it looks like one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.fx_passes.graph import HORIZON, CapturedGraph, shape_of
from kvpass.fx_passes.masks.mask_probe import HIDDEN_BELOW
from kvpass.fx_passes.shape_values import ShapeEvaluator
from kvpass.fx_passes.symbolic.entry_reader import EntryReader
from kvpass.fx_passes.symbolic.entry_values import Leaf, Number, Scaled, Value
from kvpass.fx_passes.symbolic.index_terms import (
    KEY,
    QUERY,
    SEQUENCE,
    Term,
    UnreadableError,
    all_of,
    any_of,
    at_most,
    equals,
    floor_divide,
    less,
    linear,
    minus,
    negate,
    substitute,
    weighted_sum,
    whole,
)
from kvpass.fx_passes.symbolic.prove_terms import Prover, Reach
from kvpass.fx_passes.symbolic.term_values import evaluate
from kvpass.types import MaskMeaning

CAUSAL = at_most(KEY, QUERY)
# A table by distance that ends within this many entries covers every length.
LONGEST_TABLE = 2**16
# What a table that becomes constant is drawn out to: tokens, and entries of all heads together (16 MiB).
SATURATED_LENGTH = 2**17
SATURATED_ENTRIES = 2**22
MOST_CANDIDATES = 6
# What every term of softmax hides, whatever stands beside it.
SURELY_HIDDEN = -1e30


@dataclass(frozen=True, eq=False)
class MaskExpression:
    """A mask as an expression.

    Attributes:
        heads: the bias of each query head in ``q``, ``k`` and ``S``; one for all heads where they are equal.
        conditions: the graph has a value where all of these hold.
        notes: what was recognised in the graph.
        prover: decides claims about it.
    """

    heads: tuple[Value, ...]
    conditions: tuple[Term, ...]
    notes: tuple[str, ...]
    prover: Prover

    def matrix(self, length: int) -> Tensor:
        """The bias as the expression has it, float64 ``[1 | Hq, S, S]``."""
        positions = torch.arange(length)
        places = {"q": positions[:, None], "k": positions[None], "S": torch.tensor(length)}
        return torch.stack([head.evaluate(places) for head in self.heads])

    @cached_property
    def limit(self) -> int | None:
        """The longest length at which the graph has a value, as far as its lookups tell; None for every length."""
        limits = (self.prover.holds_up_to(condition).limit for condition in dict.fromkeys(self.conditions))
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def longest(self) -> int:
        """The longest length that proofs speak of."""
        return HORIZON if self.limit is None else self.limit

    def proves(self, claim: Term, given: Iterable[Term] = ()) -> bool:
        """Whether a claim is proven for every length at which the graph has a value."""
        return self.prover.proves(claim, given, self.longest)


def read_expression(captured: CapturedGraph, evaluator: ShapeEvaluator, bias: Node, num_heads: int) -> MaskExpression:
    """Read a bias, broadcastable to ``[N, Hq, S, S]``.

    Raises:
        UnreadableError: naming what has no form as an expression.
    """
    prover = Prover()
    reader = EntryReader(captured, evaluator, prover)
    shape = shape_of(bias)
    rank = len(shape)
    heads: dict[int, Value] = {}
    for head in range(num_heads if rank > 2 and shape[-3] != 1 else 1):
        place = (SEQUENCE, whole(head), QUERY, KEY)[4 - rank :]
        value = reader.broadcast(bias, place)
        if value.names - {"q", "k", "S"}:
            raise UnreadableError("the mask depends on the batch")
        heads[head] = value
    values = tuple(heads.values())
    if all(value == values[0] for value in values):
        values = values[:1]
    return MaskExpression(values, tuple(reader.conditions), tuple(reader.notes), prover)


@dataclass(frozen=True)
class _Sight:
    """One head's bias: where a key is visible, and what is added to its score there."""

    visible: Term
    leaves: tuple[tuple[Term, Leaf], ...]


def prove_meaning(
    mask: MaskExpression, num_heads: int, absolute_scores: bool, table_length: int | None = None
) -> MaskMeaning | None:
    """The meaning that is proven of the expression, its limit included; None where there is no proof of any.

    Args:
        mask: the expression.
        num_heads: query heads Hq.
        absolute_scores: a constant added to a row counts.
        table_length: length that a table which never ends, but becomes constant, has to cover; None for the default.
    """
    if mask.limit == 0:
        return None
    try:
        sights = [_sight(head, absolute_scores) for head in mask.heads]
        found = _by_shape(mask, sights, num_heads, absolute_scores) or _by_distance(
            mask, sights, absolute_scores, table_length
        )
    except UnreadableError:
        return None
    if found is None:
        return None
    return replace(found, limit=min((n for n in (found.limit, mask.limit) if n is not None), default=None))


def holds_up_to(mask: MaskExpression, meaning: MaskMeaning, absolute_scores: bool) -> Reach:
    """How far the expression is proven to hide and show what ``meaning`` does, which has no slopes and no bias."""
    try:
        sights = [_sight(head, absolute_scores) for head in mask.heads]
    except UnreadableError:
        return Reach(0)
    if any(len(sight.leaves) != 1 or not isinstance(sight.leaves[0][1], Number) for sight in sights):
        return Reach(0)
    wanted = visible_term(meaning.window, meaning.chunk)
    return _shortest(mask.prover.holds_up_to(_same(sight.visible, wanted)) for sight in sights)


def keeps_entries_up_to(mask: MaskExpression) -> Reach:
    """How far each entry of the expression is proven to be the same at every length that has it."""
    far = {"S": whole(HORIZON)}
    found = [Reach(HORIZON)]
    for condition, leaf in {case for head in mask.heads for case in head.cases}:
        if "S" in condition.names:
            found.append(mask.prover.holds_up_to(_same(condition, substitute(condition, far))))
        inner = _inner(leaf)
        if inner is not None and "S" in inner.names:
            found.append(mask.prover.holds_up_to(equals(inner, substitute(inner, far)), [condition]))
    return _shortest(found)


def _shortest(found: Iterable[Reach]) -> Reach:
    reaches = list(found)
    refuted = [reach.refuted for reach in reaches if reach.refuted is not None]
    return Reach(min(reach.proven for reach in reaches), min(refuted, default=None))


def proves_prefix(mask: MaskExpression, prefix: int, absolute_scores: bool) -> bool:
    """Whether the expression is proven to show all keys up to the query and those of the first tokens, and no other."""
    try:
        sights = [_sight(head, absolute_scores) for head in mask.heads]
    except UnreadableError:
        return False
    wanted = any_of([CAUSAL, less(KEY, whole(prefix))])
    return all(
        len(sight.leaves) == 1
        and isinstance(sight.leaves[0][1], Number)
        and _slope(mask, sight.leaves[0][1], sight.visible, absolute_scores) == 0
        and mask.proves(_same(sight.visible, wanted))
        for sight in sights
    )


def visible_term(window: int | None, chunk: int | None) -> Term:
    """The keys that a meaning shows."""
    parts = [CAUSAL]
    if window is not None:
        parts.append(less(minus(QUERY, KEY), whole(window)))
    if chunk is not None:
        parts.append(equals(floor_divide(QUERY, whole(chunk)), floor_divide(KEY, whole(chunk))))
    return all_of(parts)


def _same(a: Term, b: Term) -> Term:
    return any_of([all_of([a, b]), all_of([negate(a), negate(b)])])


def _sight(head: Value, absolute_scores: bool) -> _Sight:
    """Split the cases into those that hide a key and those that show it.

    Hidden is what lies far below any visible number. Whether each row has a visible number at all is part of what is
    proven later: every meaning shows each query its own key.
    """
    numbers = [leaf.value for _, leaf in head.cases if isinstance(leaf, Number)]
    if len(numbers) == len(head.cases):
        top = max(numbers)
        bottom = (max(top, 0) if absolute_scores else top) - HIDDEN_BELOW
        shown = [value for value in numbers if value > bottom]
        if not shown or max(shown) - min(shown) > HIDDEN_BELOW / 2:
            raise UnreadableError("numbers too far apart")
    else:
        bottom = SURELY_HIDDEN
        if any(SURELY_HIDDEN < value <= -HIDDEN_BELOW / 2 for value in numbers):
            raise UnreadableError("a number that may hide a key beside a curve")
    leaves = tuple(
        (condition, leaf) for condition, leaf in head.cases if not isinstance(leaf, Number) or leaf.value > bottom
    )
    if not leaves:
        raise UnreadableError("nothing is visible")
    return _Sight(any_of(condition for condition, _ in leaves), leaves)


def _by_shape(mask: MaskExpression, sights: list[_Sight], num_heads: int, absolute_scores: bool) -> MaskMeaning | None:
    """Causal, window and chunk, with slopes or without."""
    if any(sight.visible != sights[0].visible or len(sight.leaves) != 1 for sight in sights):
        return None
    leaves = [sight.leaves[0][1] for sight in sights]
    slopes = [_slope(mask, leaf, sights[0].visible, absolute_scores) for leaf in leaves]
    if any(slope is None for slope in slopes):
        return None
    visible = sights[0].visible
    for window, chunk in _candidates(visible, mask.longest):
        if mask.proves(_same(visible, visible_term(window, chunk))):
            found = None
            if any(slopes):
                found = torch.tensor(slopes, dtype=torch.float32).repeat(num_heads // len(slopes))
            return MaskMeaning(window=window, chunk=chunk, slopes=found)
    return None


def _slope(mask: MaskExpression, leaf: Leaf, visible: Term, absolute_scores: bool) -> float | None:
    """The slope of a visible leaf: 0 for a number, None for what is not linear in the key."""
    if isinstance(leaf, Number):
        return 0.0 if not absolute_scores or leaf.value == 0 else None
    if not isinstance(leaf, Scaled):
        return None
    own = substitute(leaf.term, {"k": QUERY})
    if absolute_scores and not mask.proves(equals(own, whole(0))):
        return None
    change = minus(leaf.term, own)
    for factor in {0, 1, -1, linear(change)[0].get(KEY, 0)}:
        if mask.proves(equals(change, weighted_sum([(KEY, factor), (QUERY, -factor)])), [visible]):
            return leaf.factor * factor
    return None


def _candidates(visible: Term, longest: int) -> Iterator[tuple[int | None, int | None]]:
    """Windows and chunks, from the numbers of the expression, that agree with it at sampled positions."""
    numbers = sorted(n for n in visible.numbers if 0 < n <= longest)
    near = sorted({m for n in numbers for m in (n - 1, n, n + 1) if 0 < m <= longest})
    rows = sorted({m for n in [1, *numbers] for m in (0, 1, 7, n - 1, n, n + 1, 2 * n, 3 * n + 1) if 0 <= m < longest})
    queries = torch.tensor(rows)[:, None]
    offsets = torch.tensor(sorted({0, 1, 2, 5, *near}))
    keys = torch.cat([queries - offsets, queries + offsets, torch.tensor(rows).expand(len(rows), -1)], 1)
    keys = keys.clamp(0, longest - 1)
    places = {"q": queries, "k": keys, "S": torch.tensor(longest)}
    shown = evaluate(visible, places).expand(keys.shape)
    tried = 0
    for window, chunk in _pairs(near, numbers):
        wanted = evaluate(visible_term(window, chunk), places).expand(keys.shape)
        if torch.equal(shown, wanted):
            yield window, chunk
            tried += 1
            if tried == MOST_CANDIDATES:
                return


def _pairs(windows: Iterable[int], chunks: Iterable[int]) -> Iterator[tuple[int | None, int | None]]:
    windows, chunks = list(windows)[:24], list(chunks)[:12]
    yield None, None
    yield from ((window, None) for window in windows)
    yield from ((None, chunk) for chunk in chunks)
    yield from ((window, chunk) for window in windows for chunk in chunks if window < chunk)


def _by_distance(
    mask: MaskExpression, sights: list[_Sight], absolute_scores: bool, table_length: int | None
) -> MaskMeaning | None:
    """A table by distance: from some distance on every head has one value, or sees nothing."""
    far = {"q": minus(QUERY, KEY), "k": whole(0), "S": whole(HORIZON)}
    for sight in sights:
        if not mask.proves(any_of([negate(sight.visible), CAUSAL])) or not mask.proves(
            substitute(sight.visible, {"k": QUERY})
        ):
            return None
        for condition, leaf in sight.leaves:
            if not mask.proves(_same(condition, substitute(condition, far)), [CAUSAL]):
                return None
            inner = _inner(leaf)
            if inner is not None and not mask.proves(equals(inner, substitute(inner, far)), [CAUSAL, condition]):
                return None
    numbers = {n for sight in sights for n in sight.visible.numbers} | {
        n for sight in sights for condition, leaf in sight.leaves for n in condition.numbers | _numbers(leaf)
    }
    end = max((n for n in numbers if n < LONGEST_TABLE), default=0) + 2
    beyond = at_most(whole(end), minus(QUERY, KEY))
    if not all(_constant(mask, sight, beyond, end) for sight in sights):
        return None
    distance = torch.arange(end + 1)
    places = {"q": distance, "k": torch.tensor(0), "S": torch.tensor(HORIZON)}
    rows = []
    for head, sight in zip(mask.heads, sights, strict=True):
        visible = evaluate(sight.visible, places).expand(end + 1)
        rows.append(head.evaluate(places).to(torch.float32).masked_fill(~visible, -inf))
    table = torch.stack(rows)
    if not absolute_scores:
        table = table - table[:, :1]
    if bool((table[:, -1] == -inf).all()):
        reach = int((table > -inf).any(0).nonzero().max()) + 1
        return MaskMeaning(window=reach, bias=table[:, :reach].contiguous())
    length = table_length or min(SATURATED_LENGTH, SATURATED_ENTRIES // len(table))
    if length <= end:
        return MaskMeaning(bias=table[:, :length].contiguous(), limit=length)
    rest = table[:, -1:].expand(-1, length - end - 1)
    return MaskMeaning(bias=torch.cat([table, rest], 1), limit=length)


def _constant(mask: MaskExpression, sight: _Sight, beyond: Term, end: int) -> bool:
    """Whether the bias is the same at every distance of ``end`` or more."""
    at_end = {"q": whole(end), "k": whole(0)}
    for condition, leaf in ((sight.visible, None), *sight.leaves):
        if not mask.proves(_same(condition, substitute(condition, at_end)), [beyond]):
            return False
        inner = None if leaf is None else _inner(leaf)
        if inner is not None and not mask.proves(equals(inner, substitute(inner, at_end)), [beyond, condition]):
            return False
    return True


def _inner(leaf: Leaf) -> Term | None:
    if isinstance(leaf, Number):
        return None
    return leaf.term if isinstance(leaf, Scaled) else leaf.root


def _numbers(leaf: Leaf) -> frozenset[int]:
    inner = _inner(leaf)
    return frozenset() if inner is None else inner.numbers
