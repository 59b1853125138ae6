"""Integer expressions over query, key and length: what a mask's graph computes at one entry of a matrix.

A :class:`Term` is an integer or a truth value. Terms are made by the functions below, which fold constants and keep
sums in a normal form, so that spellings which differ by arithmetic alone give one and the same term: its ``text``.
Division and remainder round down, as in Python. A term can be evaluated on whole tensors of positions
(:mod:`kvpass.fx_passes.symbolic.term_values`), bounded (:func:`bounds`), rewritten (:func:`substitute`) and given to a
solver (:mod:`kvpass.fx_passes.symbolic.prove_terms`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import gcd
from typing import Any

from kvpass.fx_passes.graph import HORIZON

LONGEST_TEXT = 20_000


class UnreadableError(Exception):
    """The graph, or a value of it, has no form as terms; the message says which."""


def _text(op: str, args: tuple[Any, ...]) -> str:
    if op in ("var", "int", "bool"):
        return str(args[0])
    if op == "sum":
        parts = [inner.text if factor == 1 else f"{factor}*{inner.text}" for inner, factor in args[0]]
        return f"({' + '.join([*parts, str(args[1])] if args[1] else parts)})"
    if op == "steps":
        ends = ", ".join(f"{start}: {value}" for start, value in zip(args[1], args[2], strict=True))
        return f"steps({args[0].text}; {ends})"
    if op in ("le", "eq"):
        return f"{args[0].text} {'<=' if op == 'le' else '=='} 0"
    if op in ("div", "mul", "and", "or"):
        sign = {"div": " // ", "mul": " * ", "and": " and ", "or": " or "}[op]
        return f"({sign.join(part.text for part in args)})"
    return f"{op}({', '.join(part.text for part in args)})"


@dataclass(frozen=True, eq=False)
class Term:
    """One integer or boolean expression.

    Attributes:
        op: ``var``, ``int``, ``sum``, ``mul``, ``div``, ``mod``, ``min``, ``max``, ``if``, ``steps`` for integers;
            ``bool``, ``le`` (argument <= 0), ``eq`` (argument == 0), ``not``, ``and``, ``or`` for truth values.
        args: operands.
        text: the expression; terms with equal texts are equal.
    """

    op: str
    args: tuple[Any, ...]
    text: str = field(init=False)

    def __post_init__(self) -> None:
        text = _text(self.op, self.args)
        if len(text) > LONGEST_TEXT:
            raise UnreadableError("the expression is too long")
        object.__setattr__(self, "text", text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Term) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    @property
    def value(self) -> int | None:
        """The number, or truth value, that a constant is; None for any other term."""
        return self.args[0] if self.op in ("int", "bool") else None

    @cached_property
    def names(self) -> frozenset[str]:
        """Variables of the expression."""
        if self.op == "var":
            return frozenset(self.args)
        return frozenset(name for inner in operands(self) for name in inner.names)

    @cached_property
    def numbers(self) -> frozenset[int]:
        """Whole numbers in the expression."""
        own: set[int] = set()
        if self.op == "int":
            own = {abs(self.args[0])}
        elif self.op == "sum":
            own = {abs(self.args[1]), *(abs(factor) for _, factor in self.args[0])}
        elif self.op == "steps":
            own = {abs(start) for start in self.args[1]}
        return frozenset(own.union(*(inner.numbers for inner in operands(self))))


def operands(term: Term) -> list[Term]:
    """The terms directly inside of a term."""
    if term.op == "sum":
        return [inner for inner, _ in term.args[0]]
    return [inner for inner in term.args if isinstance(inner, Term)]


def var(name: str) -> Term:
    """A variable."""
    return Term("var", (name,))


def whole(number: int) -> Term:
    """A constant."""
    return Term("int", (int(number),))


TRUE, FALSE = Term("bool", (True,)), Term("bool", (False,))
QUERY, KEY, LENGTH, SEQUENCE, BATCH = var("q"), var("k"), var("S"), var("b"), var("B")
# Variables that are no positions: the length, the number of sequences in a batch, and one of them.
RANGES: dict[str, tuple[int, int]] = {"S": (1, HORIZON), "B": (1, 4096), "b": (0, 4095)}
POSITION_RANGE = (0, HORIZON - 1)


def linear(term: Term) -> tuple[dict[Term, int], int]:
    """The summands of a term with their factors, and its constant."""
    if term.op == "int":
        return {}, term.args[0]
    if term.op == "sum":
        return dict(term.args[0]), term.args[1]
    return {term: 1}, 0


def weighted_sum(parts: Iterable[tuple[Term, int]], constant: int = 0) -> Term:
    """``sum of factor * term, plus constant``."""
    total: dict[Term, int] = {}
    for part, factor in parts:
        inner, offset = linear(part)
        constant += factor * offset
        for atom, inner_factor in inner.items():
            total[atom] = total.get(atom, 0) + factor * inner_factor
    kept = sorted(((atom, factor) for atom, factor in total.items() if factor), key=lambda pair: pair[0].text)
    if not kept:
        return whole(constant)
    if kept[0][1] == 1 and len(kept) == 1 and not constant:
        return kept[0][0]
    return Term("sum", (tuple(kept), constant))


def plus(a: Term, b: Term) -> Term:
    """``a + b``."""
    return weighted_sum([(a, 1), (b, 1)])


def minus(a: Term, b: Term) -> Term:
    """``a - b``."""
    return weighted_sum([(a, 1), (b, -1)])


def times(a: Term, b: Term) -> Term:
    """``a * b``."""
    for one, other in ((a, b), (b, a)):
        if one.op == "int":
            return weighted_sum([(other, one.args[0])])
    return Term("mul", tuple(sorted((a, b), key=lambda term: term.text)))


def floor_divide(a: Term, b: Term) -> Term:
    """``a // b``, rounded down; b must be a constant other than 0."""
    if b.op != "int" or b.args[0] == 0:
        raise UnreadableError("a division by something else than a number")
    divisor = b.args[0]
    if divisor < 0:
        a, divisor = weighted_sum([(a, -1)]), -divisor
    # What is divided without remainder comes out, so that (8 * q + k) // 8 is q + k // 8.
    inner, constant = linear(a)
    out = [(atom, factor // divisor) for atom, factor in inner.items() if factor % divisor == 0]
    rest = weighted_sum([(atom, factor) for atom, factor in inner.items() if factor % divisor], constant % divisor)
    if rest.op == "int":
        return weighted_sum(out, constant // divisor + rest.args[0] // divisor)
    low, high = bounds(rest)
    if low // divisor == high // divisor:
        return weighted_sum(out, constant // divisor + low // divisor)
    return weighted_sum([*out, (Term("div", (rest, whole(divisor))), 1)], constant // divisor)


def remainder(a: Term, b: Term) -> Term:
    """``a % b`` with the sign of b, which must be a constant other than 0."""
    if b.op != "int" or b.args[0] == 0:
        raise UnreadableError("a remainder by something else than a number")
    return minus(a, times(floor_divide(a, b), b))


def smaller(a: Term, b: Term) -> Term:
    """``min(a, b)``."""
    low, high = bounds(minus(a, b))
    if high <= 0 or low >= 0:
        return a if high <= 0 else b
    return Term("min", tuple(sorted((a, b), key=lambda term: term.text)))


def larger(a: Term, b: Term) -> Term:
    """``max(a, b)``."""
    low, high = bounds(minus(a, b))
    if high <= 0 or low >= 0:
        return b if high <= 0 else a
    return Term("max", tuple(sorted((a, b), key=lambda term: term.text)))


def choose(condition: Term, a: Term, b: Term) -> Term:
    """``a if condition else b``, for integers."""
    if condition.op == "bool":
        return a if condition.args[0] else b
    return a if a == b else Term("if", (condition, a, b))


def steps(argument: Term, starts: tuple[int, ...], values: tuple[int, ...]) -> Term:
    """A step function: ``values[i]`` from ``starts[i]`` on; the first value holds below ``starts[0]`` as well."""
    if len(values) == 1:
        return whole(values[0])
    if argument.op == "int":
        return whole(values[max(0, sum(start <= argument.args[0] for start in starts) - 1)])
    return Term("steps", (argument, starts, values))


def at_most(a: Term, b: Term) -> Term:
    """``a <= b``."""
    difference = minus(a, b)
    low, high = bounds(difference)
    if high <= 0 or low > 0:
        return TRUE if high <= 0 else FALSE
    inner, constant = linear(difference)
    divisor = gcd(*inner.values())
    parts = [(atom, factor // divisor) for atom, factor in inner.items()]
    return Term("le", (weighted_sum(parts, -(-constant // divisor)),))


def less(a: Term, b: Term) -> Term:
    """``a < b``."""
    return at_most(plus(a, whole(1)), b)


def equals(a: Term, b: Term) -> Term:
    """``a == b``, for integers."""
    difference = minus(a, b)
    low, high = bounds(difference)
    if low == high == 0 or low > 0 or high < 0:
        return TRUE if low == high == 0 else FALSE
    inner, constant = linear(difference)
    divisor = gcd(*inner.values()) * (1 if next(iter(inner.values())) > 0 else -1)
    if constant % divisor:
        return FALSE
    return Term("eq", (weighted_sum([(a, f // divisor) for a, f in inner.items()], constant // divisor),))


def negate(a: Term) -> Term:
    """``not a``."""
    if a.op == "bool":
        return FALSE if a.args[0] else TRUE
    if a.op == "le":
        return at_most(whole(1), a.args[0])
    if a.op in ("and", "or"):
        return (any_of if a.op == "and" else all_of)(map(negate, a.args))
    return a.args[0] if a.op == "not" else Term("not", (a,))


def all_of(terms: Iterable[Term]) -> Term:
    """Conjunction."""
    return _joined("and", FALSE, TRUE, terms)


def any_of(terms: Iterable[Term]) -> Term:
    """Disjunction."""
    return _joined("or", TRUE, FALSE, terms)


def _joined(op: str, ends: Term, neutral: Term, terms: Iterable[Term]) -> Term:
    kept: dict[Term, None] = {}
    for term in terms:
        for part in term.args if term.op == op else (term,):
            kept[part] = None
    if ends in kept or any(negate(part) in kept for part in kept if part.op not in ("and", "or")):
        return ends
    parts = sorted((part for part in kept if part != neutral), key=lambda part: part.text)
    if len(parts) < 2:
        return parts[0] if parts else neutral
    return Term(op, tuple(parts))


def bounds(term: Term) -> tuple[int, int]:
    """Numbers between which an integer term lies at every length below the horizon."""
    if term.op == "var":
        return RANGES.get(term.args[0], POSITION_RANGE)
    if term.op == "int":
        return term.args[0], term.args[0]
    if term.op == "sum":
        low = high = term.args[1]
        for inner, factor in term.args[0]:
            ends = sorted(factor * end for end in bounds(inner))
            low, high = low + ends[0], high + ends[1]
        return low, high
    if term.op == "steps":
        return min(term.args[2]), max(term.args[2])
    if term.op == "if":
        (low, high), (other_low, other_high) = bounds(term.args[1]), bounds(term.args[2])
        return min(low, other_low), max(high, other_high)
    one, two = bounds(term.args[0]), bounds(term.args[1])
    if term.op == "mul":
        ends = sorted(a * b for a, b in product(one, two))
        return ends[0], ends[-1]
    if term.op == "div":
        return one[0] // two[0], one[1] // two[0]
    pick = min if term.op == "min" else max
    return pick(one[0], two[0]), pick(one[1], two[1])


def substitute(term: Term, places: Mapping[str, Term]) -> Term:
    """The term with other terms in the place of variables."""
    if not term.names & places.keys():
        return term
    if term.op == "var":
        return places[term.args[0]]
    if term.op == "sum":
        return weighted_sum([(substitute(inner, places), factor) for inner, factor in term.args[0]], term.args[1])
    inner = [substitute(part, places) for part in operands(term)]
    if term.op == "steps":
        return steps(inner[0], term.args[1], term.args[2])
    if term.op in ("and", "or"):
        return (all_of if term.op == "and" else any_of)(inner)
    if term.op in ("le", "eq"):
        return (at_most if term.op == "le" else equals)(inner[0], whole(0))
    return MAKERS[term.op](*inner)


MAKERS: dict[str, Callable[..., Term]] = {
    "mul": times,
    "div": floor_divide,
    "min": smaller,
    "max": larger,
    "if": choose,
    "not": negate,
}
