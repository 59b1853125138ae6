"""Where the tokens are: every dim of a tensor written as a product of named factors.

The proof that a graph treats tokens one by one follows the token axis through every op. A dim is a product of
factors, first factor slowest: ``[batch * heads, length, 64]`` is ``((batch, plain), (token,), (plain,))``. Sizes of
1 have no factor at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import sympy
from torch.fx import Node


class Kind(Enum):
    """What a factor of a dim counts."""

    PLAIN = "plain"
    BATCH = "batch"
    TOKEN = "token"
    LEFT = "left tokens"  # scores: tokens of the left operand of a product of tokens with tokens
    RIGHT = "right tokens"  # scores: tokens of the right operand
    HEAD = "head"  # scores: a plain factor that both operands may carry; the tag says which
    FEATURE = "feature"  # an operand of scores: what is contracted
    PICKED = "picked"  # rows of tokens picked or sorted by data; the tag says by which op
    ANY = "any"  # a dim whose size depends on the input's shape, of a tensor that is the same everywhere


@dataclass(frozen=True)
class Factor:
    """One factor of a dim: what it counts and how many."""

    kind: Kind
    size: sympy.Expr
    tag: int = -1

    def __repr__(self) -> str:
        return f"{self.kind.value}{'' if self.tag < 0 else self.tag}:{self.size}"


Dim = tuple[Factor, ...]
Axes = tuple[Dim, ...]


@dataclass(frozen=True)
class Mixed:
    """A tensor whose rows are no function of one token each, and why."""

    reason: str
    node: Node


class MixesTokens(Exception):
    """Raised by a rule: the op mixes tokens, or no rule says that it does not."""


def plain(size: sympy.Expr | int) -> Dim:
    """A dim that counts nothing in particular."""
    size = sympy.sympify(size)
    return () if size == 1 else (Factor(Kind.PLAIN, size),)


def simplified(factors: list[Factor]) -> Dim:
    """Adjacent plain factors are one; factors of size 1 are none."""
    merged: list[Factor] = []
    for factor in factors:
        if factor.size == 1:
            continue
        if factor.kind is Kind.PLAIN and merged and merged[-1].kind is Kind.PLAIN:
            merged[-1] = Factor(Kind.PLAIN, merged[-1].size * factor.size)
        else:
            merged.append(factor)
    return tuple(merged)


def kinds_in(dim: Dim) -> set[Kind]:
    """The kinds of a dim's factors."""
    return {factor.kind for factor in dim}


def is_free(dim: Dim) -> bool:
    """Whether an op may mix the entries of this dim: it holds neither tokens nor sequences."""
    return kinds_in(dim) <= {Kind.PLAIN, Kind.FEATURE}


def count(axes: Axes, kind: Kind) -> int:
    """How often a kind occurs among all factors."""
    return sum(factor.kind is kind for dim in axes for factor in dim)


def is_score(axes: Axes) -> bool:
    """Whether these are scores of tokens against tokens."""
    return count(axes, Kind.LEFT) + count(axes, Kind.RIGHT) > 0


def check(axes: Axes) -> Axes:
    """The axes, if no kind of token occurs twice.

    Raises:
        MixesTokens: if a value belongs to two tokens or two sequences at once.
    """
    for kind in (Kind.BATCH, Kind.TOKEN, Kind.LEFT, Kind.RIGHT):
        if count(axes, kind) > 1:
            what = "sequences with sequences" if kind is Kind.BATCH else "tokens with tokens"
            raise MixesTokens(f"combines {what} outside of an attention")
    if count(axes, Kind.PICKED) and any(count(axes, kind) for kind in (Kind.TOKEN, Kind.BATCH)):
        raise MixesTokens("combines picked tokens with all tokens")
    return axes


def merge_dims(dims: list[Dim]) -> Dim:
    """The dim of a broadcast result.

    Raises:
        MixesTokens: if two operands count different things along it.
    """
    result: Dim = ()
    for dim in dims:
        if not dim or dim == result:
            continue
        if result and _yields_to(dim, result):
            continue
        if result and not _yields_to(result, dim):
            raise MixesTokens(f"lines up {_name(result)} with {_name(dim)}")
        result = dim
    return result


def _yields_to(weak: Dim, strong: Dim) -> bool:
    """A dim of a tensor that is the same everywhere takes any meaning of its size; plain may be named heads.

    Beside scores, what belongs to each token belongs to the query or key that it lines up with.
    """
    if kinds_in(weak) == {Kind.ANY}:
        return True
    if len(weak) == len(strong) == 1 and weak[0].kind is Kind.TOKEN and strong[0].kind in (Kind.LEFT, Kind.RIGHT):
        return bool(weak[0].size == strong[0].size)
    unnamed = simplified([Factor(Kind.PLAIN, f.size) if f.kind is Kind.HEAD else f for f in strong])
    same_heads = [(f.kind, f.size) for f in weak] == [(f.kind, f.size) for f in strong]
    return unnamed == weak or (same_heads and Kind.HEAD in kinds_in(strong))


def renamed(axes: Axes, names: dict[int, int]) -> Axes:
    """The axes with heads called by other names."""
    return tuple(
        tuple(Factor(f.kind, f.size, names.get(f.tag, f.tag)) if f.kind is Kind.HEAD else f for f in dim)
        for dim in axes
    )


def _name(dim: Dim) -> str:
    return " x ".join(f.kind.value for f in dim)


def broadcast(operands: list[Axes], rank: int) -> Axes:
    """Axes of an elementwise result of ``rank`` dims; operands are lined up at the last dim."""
    out: list[Dim] = []
    for i in range(rank):
        column = [axes[i - rank + len(axes)] for axes in operands if i - rank + len(axes) >= 0]
        out.append(merge_dims(column))
    return check(tuple(out))


def relabel(axes: Axes, shape: tuple[sympy.Expr, ...]) -> Axes:
    """Axes after a reshape to ``shape``.

    Raises:
        MixesTokens: if a dim of the new shape cuts the token or batch axis in parts.
    """
    pending = [factor for dim in axes for factor in dim]
    if pending and all(f.kind is Kind.ANY for f in pending):
        return tuple(() if s == 1 else (Factor(Kind.ANY, s),) for s in shape)
    out: list[Dim] = []
    for size in shape:
        taken: list[Factor] = []
        room = size
        while room != 1:
            if not pending:
                raise MixesTokens("reshapes in a way that cannot be followed")
            head = pending.pop(0)
            rest = sympy.cancel(room / head.size)
            if _is_whole(rest):
                taken.append(head)
                room = rest
                continue
            spare = sympy.cancel(head.size / room)
            if head.kind is not Kind.PLAIN or not _is_whole(spare):
                raise MixesTokens(f"reshapes across the {head.kind.value} axis")
            taken.append(Factor(Kind.PLAIN, room))
            pending.insert(0, Factor(Kind.PLAIN, spare))
            room = sympy.Integer(1)
        out.append(simplified(taken))
    if pending:
        raise MixesTokens("reshapes in a way that cannot be followed")
    return tuple(out)


def _is_whole(value: sympy.Expr) -> bool:
    """Whether an expression is a whole number for every batch size and length: a polynomial with whole factors."""
    numerator, denominator = sympy.fraction(value)
    return bool(denominator == 1 and all(c.is_integer for c in numerator.as_coefficients_dict().values()))


def label_by_size(shape: tuple[sympy.Expr, ...], batch: sympy.Symbol, length: sympy.Symbol) -> Axes:
    """Axes of a tensor in which a dim of the batch's or the length's size is that axis."""
    names = {batch: Kind.BATCH, length: Kind.TOKEN}
    return tuple(
        (Factor(names[s], s),) if s in names else (plain(s) if s.is_number else (Factor(Kind.ANY, s),)) for s in shape
    )


def uniform(shape: tuple[sympy.Expr, ...]) -> Axes:
    """Axes of a tensor that holds one and the same value everywhere."""
    return tuple(plain(s) if s.is_number else (Factor(Kind.ANY, s),) for s in shape)
