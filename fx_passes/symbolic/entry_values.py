"""What one entry of a tensor is, as a function of its place: numbers, terms and curves, told apart by cases.

A :class:`Value` is a list of cases, each a condition and a leaf; exactly one condition holds at each place. Leaves are
numbers (``-inf`` and ``finfo.min`` as the graph's own ops compute them), whole or scaled terms, and curves: functions
of one term that torch computes and no term expresses, such as the logarithm in a bucket of distances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import gcd, inf, isfinite
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.fx_passes.graph import HORIZON
from kvpass.fx_passes.symbolic.index_terms import (
    FALSE,
    TRUE,
    Term,
    UnreadableError,
    all_of,
    any_of,
    at_most,
    bounds,
    choose,
    linear,
    negate,
    weighted_sum,
    whole,
)
from kvpass.fx_passes.symbolic.term_values import evaluate, fit, runs

Place = tuple[Term, ...]
MOST_CASES = 512
MOST_RUNS = 64
MODERATE = 1e20
# Whole numbers up to these are exact in the dtype.
EXACT = {torch.float64: 2**53, torch.float32: 2**24, torch.float16: 2**11, torch.bfloat16: 2**8}


@dataclass(frozen=True)
class Number:
    """A constant: a float, an integer or a truth value, exactly as its dtype holds it."""

    value: float


@dataclass(frozen=True)
class Scaled:
    """``factor * term``.

    Attributes:
        term: a whole number that the dtype holds exactly.
        factor: other than 1 it rounds once, in float32 or float64.
        rounded: the graph rounds more than once, so that no condition may be read off the value.
    """

    term: Term
    factor: float = 1.0
    rounded: bool = False


@dataclass(frozen=True)
class Curve:
    """A function of one term, computed by the graph's own ops.

    Attributes:
        root: the term.
        text: the function; curves with equal root and text are equal.
        function: from int64 ``[n]`` values of the root to ``[n]`` results.
        size: bound of the absolute results, where one is known.
    """

    root: Term
    text: str
    function: Callable[[Tensor], Tensor]
    size: float = inf

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Curve) and (self.root, self.text) == (other.root, other.text)

    def __hash__(self) -> int:
        return hash((self.root, self.text))


Leaf = Number | Scaled | Curve


@dataclass(frozen=True)
class Value:
    """One entry of a tensor.

    Attributes:
        dtype: of the tensor.
        cases: conditions and leaves; the conditions exclude one another, and one of them always holds.
    """

    dtype: torch.dtype
    cases: tuple[tuple[Term, Leaf], ...]

    @cached_property
    def truth(self) -> Term:
        """The condition under which a boolean value, or a number as one, is true."""
        return any_of(all_of([condition, _true(leaf)]) for condition, leaf in self.cases)

    @cached_property
    def term(self) -> Term:
        """An integer value as a term."""
        parts = [(condition, whole_of(leaf)) for condition, leaf in self.cases]
        result = parts[-1][1]
        for condition, part in reversed(parts[:-1]):
            result = choose(condition, part, result)
        return result

    @property
    def names(self) -> frozenset[str]:
        """Variables that the value depends on."""
        return frozenset[str]().union(
            *(condition.names | leaf_names(leaf) for condition, leaf in self.cases),
        )

    @property
    def constant(self) -> Leaf | None:
        """The number that the value is everywhere, or None."""
        leaf = self.cases[0][1]
        return leaf if len(self.cases) == 1 and isinstance(leaf, Number) else None

    def evaluate(self, places: Mapping[str, Tensor]) -> Tensor:
        """The value in float64 where the variables have these int64 values, which broadcast."""
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in places.values()))
        known: dict[str, Tensor] = {}
        result = torch.full(shape, torch.nan, dtype=torch.float64)
        for condition, leaf in self.cases:
            part = evaluate_leaf(leaf, places, known)
            result = torch.where(evaluate(condition, places, known).expand(shape), part, result)
        return result


class Entries(Protocol):
    """What readers of single ops ask of :class:`kvpass.fx_passes.symbolic.entry_reader.EntryReader`."""

    conditions: list[Term]

    def entry(self, node: Node, place: Place) -> Value: ...
    def broadcast(self, node: Node, place: Place) -> Value: ...
    def size(self, node: Node, dim: int) -> Term: ...
    def number(self, value: Any) -> Term: ...


def counted(value: Value) -> Term:
    """A whole number, or a truth value as 0 or 1, as a term."""
    return choose(value.truth, whole(1), whole(0)) if value.dtype == torch.bool else value.term


def evaluate_leaf(leaf: Leaf, places: Mapping[str, Tensor], known: dict[str, Tensor]) -> Tensor:
    """The leaf in float64 at places that broadcast."""
    if isinstance(leaf, Number):
        return torch.tensor(float(leaf.value), dtype=torch.float64)
    if isinstance(leaf, Scaled):
        return evaluate(leaf.term, places, known).double() * leaf.factor
    root = evaluate(leaf.root, places, known)
    return leaf.function(root.reshape(-1)).double().reshape(root.shape)


def leaf_names(leaf: Leaf) -> frozenset[str]:
    """Variables that a leaf depends on."""
    if isinstance(leaf, Number):
        return frozenset()
    return (leaf.term if isinstance(leaf, Scaled) else leaf.root).names


def whole_of(leaf: Leaf) -> Term:
    """A leaf that is a whole number, as a term.

    Raises:
        UnreadableError: if it is none.
    """
    if isinstance(leaf, Scaled) and leaf.factor == 1:
        return leaf.term
    if isinstance(leaf, Number) and isfinite(leaf.value) and leaf.value == int(leaf.value):
        return whole(int(leaf.value))
    raise UnreadableError("a value that is no whole number")


def moderate(leaf: Leaf) -> bool:
    """Whether a leaf is known to stay far away from the largest floats."""
    if isinstance(leaf, Number):
        return abs(leaf.value) < MODERATE
    if isinstance(leaf, Scaled):
        low, high = bounds(leaf.term)
        return abs(leaf.factor) * max(-low, high) < MODERATE
    return leaf.size < MODERATE


def make(dtype: torch.dtype, cases: Iterable[tuple[Term, Leaf]]) -> Value:
    """A value of these cases; equal leaves become one case, cases that never hold are dropped."""
    joined: dict[Leaf, list[Term]] = {}
    for condition, leaf in cases:
        if isinstance(leaf, Scaled) and leaf.term.op == "int" and leaf.factor == 1:
            leaf = Number(leaf.term.args[0])
        if condition != FALSE:
            joined.setdefault(leaf, []).append(condition)
    if len(joined) == 1:
        return Value(dtype, ((TRUE, next(iter(joined))),))
    if len(joined) > MOST_CASES:
        raise UnreadableError("a value with too many cases")
    return Value(dtype, tuple((any_of(conditions), leaf) for leaf, conditions in joined.items()))


def of_number(dtype: torch.dtype, number: float) -> Value:
    """A constant, rounded to the dtype."""
    return Value(dtype, ((TRUE, Number(torch.tensor(number, dtype=dtype).item())),))


def of_truth(condition: Term) -> Value:
    """A boolean value."""
    return make(torch.bool, ((condition, Number(True)), (negate(condition), Number(False))))


def of_term(dtype: torch.dtype, term: Term) -> Value:
    """An integer, or a whole number in a float dtype; a curve where the dtype cannot hold each of its numbers."""
    return make(dtype, ((TRUE, held(dtype, term)),))


def held(dtype: torch.dtype, term: Term) -> Leaf:
    """A term as an entry of a tensor of this dtype."""
    low, high = bounds(term)
    if dtype.is_floating_point:
        if max(-low, high) <= EXACT.get(dtype, 0):
            return Scaled(term)
        root, factor, offset = base_of(term)
        return Curve(root, f"{factor} * x + {offset} in {dtype}", lambda x: (factor * x + offset).to(dtype))
    if dtype.is_complex or dtype == torch.bool:
        raise UnreadableError(f"a position in {dtype}")
    limits = torch.iinfo(dtype)
    if low < limits.min or high > limits.max:
        raise UnreadableError(f"a position that may not fit {dtype}")
    return Scaled(term)


def base_of(term: Term) -> tuple[Term, int, int]:
    """``(root, factor, offset)`` with ``term == factor * root + offset``: equal roots for all that is linear in one."""
    inner, offset = linear(term)
    factor = gcd(*inner.values())
    if next(iter(inner.values()), 1) < 0:
        factor = -factor
    return weighted_sum([(atom, f // factor) for atom, f in inner.items()]), factor, offset


def apply_to_cases(
    operands: list[Value | Any], dtype: torch.dtype, rule: Callable[[list[Leaf | Any]], Leaf | Term]
) -> Value:
    """Apply a rule on leaves case by case; what is no value is handed on. A rule may answer with a truth value."""
    cases: list[tuple[Term, Leaf]] = []
    choices = [operand.cases if isinstance(operand, Value) else ((TRUE, operand),) for operand in operands]
    if torch.Size(map(len, choices)).numel() > MOST_CASES:
        raise UnreadableError("a value with too many cases")
    for combination in product(*choices):
        condition = all_of(part for part, _ in combination)
        if condition == FALSE:
            continue
        answer = rule([leaf for _, leaf in combination])
        if isinstance(answer, Term):
            cases += [(all_of([condition, answer]), Number(True)), (all_of([condition, negate(answer)]), Number(False))]
        else:
            cases.append((condition, answer))
    return make(dtype, cases)


def select(condition: Term, a: Value, b: Value, dtype: torch.dtype) -> Value:
    """``a`` where the condition holds, else ``b``; both are of this dtype already."""
    if condition.op == "bool":
        return make(dtype, (a if condition.args[0] else b).cases)
    other = negate(condition)
    return make(
        dtype,
        [(all_of([condition, part]), leaf) for part, leaf in a.cases]
        + [(all_of([other, part]), leaf) for part, leaf in b.cases],
    )


def curve(
    target: Callable[..., Tensor],
    leaves: list[Leaf | Any],
    dtypes: list[torch.dtype | None],
    ranks: list[int],
    kwargs: dict[str, Any],
    dtype: torch.dtype,
) -> Leaf | Term:
    """An op on functions of one and the same term, computed by torch.

    Args:
        target: the op; elementwise.
        leaves: its operands; what is no leaf is handed on.
        dtypes: dtype of the tensor that each leaf stands for; None for what is no leaf.
        ranks: its rank: torch treats scalars differently when it chooses a dtype.
        kwargs: further arguments.
        dtype: of the result.

    Raises:
        UnreadableError: if the operands depend on different terms.
    """
    roots = {_root(leaf) for leaf in leaves if isinstance(leaf, Scaled | Curve)}
    if len(roots) != 1:
        raise UnreadableError("an op on several positions that is no arithmetic")
    (root,) = roots

    def function(x: Tensor) -> Tensor:
        inputs = [_on(leaf, kind, rank, x) for leaf, kind, rank in zip(leaves, dtypes, ranks, strict=True)]
        return target(*inputs, **kwargs)

    text = f"{target}({', '.join(_leaf_text(leaf) for leaf in leaves)}, {kwargs}, {dtypes})"
    if dtype.is_floating_point:
        return Curve(root, text, function)
    low = bounds(root)[0]
    values = _everywhere(function, root)
    if values.dtype == torch.bool:
        return truth_by_table(values, root, low)
    return Scaled(fit(values.to(torch.int64), root, low))


def rounded_curve(found: Curve, dtype: torch.dtype) -> Leaf:
    """A curve whose values are whole numbers, as a term where they are simple enough."""
    values = _everywhere(found.function, found.root)
    least, most = (float(end) for end in values.aminmax())
    if max(-least, most) <= EXACT.get(dtype, 0):  # never of a NaN
        try:
            return held(dtype, fit(values.to(torch.int64), found.root, bounds(found.root)[0]))
        except UnreadableError:
            return found
    return found


def _everywhere(function: Callable[[Tensor], Tensor], root: Term) -> Tensor:
    """The function at every value that the root may have."""
    low, high = bounds(root)
    if high - low > 2 * HORIZON + 64:
        raise UnreadableError("a function of a number that is no position")
    return function(torch.arange(low, high + 1)).expand(high - low + 1)


def truth_by_table(values: Tensor, argument: Term, low: int) -> Term:
    """The condition on ``argument`` that ``values[i]``, bool, tells for ``low + i``; never asked for elsewhere."""
    ranges = [place for place in runs(values) if values[place[0]]]
    if len(ranges) > MOST_RUNS:
        raise UnreadableError("a condition on one position with too many steps")
    return any_of(within(argument, *place, len(values), low) for place in ranges)


def within(argument: Term, start: int, stop: int, size: int, low: int = 0) -> Term:
    """``start <= argument - low < stop`` for arguments that are places ``low + i`` of a table of this size."""
    parts = [at_most(whole(low + start), argument)] if start > 0 else []
    return all_of([*parts, at_most(argument, whole(low + stop - 1))] if stop < size else parts)


def _true(leaf: Leaf) -> Term:
    if isinstance(leaf, Number):
        return TRUE if leaf.value else FALSE
    term = leaf.term if isinstance(leaf, Scaled) else None
    if term is None:
        raise UnreadableError("a curve as a truth value")
    return any_of([at_most(term, whole(-1)), at_most(whole(1), term)])


def _root(leaf: Scaled | Curve) -> Term:
    return base_of(leaf.term)[0] if isinstance(leaf, Scaled) else leaf.root


def _on(leaf: Leaf | Any, dtype: torch.dtype | None, rank: int, x: Tensor) -> Any:
    if isinstance(leaf, Number):
        return leaf.value if dtype is None else torch.full((1,) if rank else (), leaf.value, dtype=dtype)
    if isinstance(leaf, Curve):
        return leaf.function(x)
    if dtype is None:
        raise UnreadableError("a number that depends on the length, in an op that is no arithmetic")
    if isinstance(leaf, Scaled):
        if leaf.rounded:
            raise UnreadableError("an op on a product that was rounded more than once")
        _, factor, offset = base_of(leaf.term)
        term = (factor * x + offset).to(dtype)
        return term if leaf.factor == 1 else term * leaf.factor
    return leaf


def _leaf_text(leaf: Leaf | Any) -> str:
    if isinstance(leaf, Scaled):
        _, factor, offset = base_of(leaf.term)
        return f"{leaf.factor} * ({factor} * x + {offset})"
    return leaf.text if isinstance(leaf, Curve) else str(leaf)
