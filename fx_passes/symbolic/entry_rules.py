"""Elementwise ops on mask values: exact rules for arithmetic on positions, torch itself for everything else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import floor, isfinite
from typing import Any

import torch

from kvpass.fx_passes.graph import aten
from kvpass.fx_passes.symbolic.entry_values import (
    Curve,
    Leaf,
    Number,
    Scaled,
    Value,
    apply_to_cases,
    curve,
    held,
    moderate,
    of_truth,
    rounded_curve,
    whole_of,
)
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
    equals,
    floor_divide,
    larger,
    minus,
    negate,
    remainder,
    smaller,
    times,
    weighted_sum,
    whole,
)

Rule = Callable[[list[Leaf], dict[str, Any], torch.dtype], Leaf | Term | None]
# Adding a number of moderate size to one as low as this changes nothing that a softmax sees.
FAR_BELOW = -1e30
ONE_ROUNDING = (torch.float32, torch.float64)


def pointwise(
    target: Any,
    operands: list[Value],
    dtypes: list[torch.dtype | None],
    ranks: list[int],
    kwargs: dict[str, Any],
    dtype: torch.dtype,
) -> Value:
    """An elementwise op on values.

    Args:
        target: the op.
        operands: tensors and numbers, in the order of the op's arguments.
        dtypes: of the tensors; None for a number.
        ranks: of the tensors.
        kwargs: the op's other arguments.
        dtype: of the result.

    Raises:
        UnreadableError: if the result has no form as a value.
    """
    packet = target.overloadpacket
    if packet in LOGIC and all(operand.dtype == torch.bool for operand in operands):
        return of_truth(LOGIC[packet]([operand.truth for operand in operands]))
    rule = RULES.get(packet)
    computed_in = _computed_in(operands, dtypes, ranks)

    def by_leaf(leaves: list[Leaf]) -> Leaf | Term:
        if all(isinstance(leaf, Number) for leaf in leaves):
            return _computed(target, leaves, dtypes, ranks, kwargs, dtype)
        exact = [_in_dtype(leaf, computed_in) for leaf in leaves]
        answer = None if rule is None or None in exact else rule(exact, kwargs, dtype)  # type: ignore[arg-type]
        if answer is None:
            answer = curve(target, leaves, dtypes, ranks, kwargs, dtype)
        return rounded_curve(answer, dtype) if rule is _rounded and isinstance(answer, Curve) else answer

    return apply_to_cases(list(operands), dtype, by_leaf)


def _computed_in(operands: list[Value], dtypes: list[torch.dtype | None], ranks: list[int]) -> torch.dtype:
    """The dtype to which torch brings all operands before it computes."""
    samples = [
        torch.ones((1,) if rank else (), dtype=kind) if kind is not None else (1.0 if of.dtype.is_floating_point else 1)
        for of, kind, rank in zip(operands, dtypes, ranks, strict=True)
    ]
    tensors = [sample for sample in samples if isinstance(sample, torch.Tensor)]
    first = max(tensors, key=torch.Tensor.dim)
    kind = first.dtype
    for sample in samples:
        kind = torch.result_type(torch.ones(first.shape, dtype=kind), sample)
    return kind


def _in_dtype(leaf: Leaf, dtype: torch.dtype) -> Leaf | None:
    """The leaf as torch sees it in the dtype in which it computes; None where that rounds a position."""
    if isinstance(leaf, Scaled) and dtype.is_floating_point and leaf.factor == 1:
        return leaf if isinstance(held(dtype, leaf.term), Scaled) else None
    if isinstance(leaf, Number) and dtype.is_floating_point:
        return Number(torch.tensor(leaf.value, dtype=dtype).item())
    return leaf


def cast(value: Value, dtype: torch.dtype) -> Value:
    """The value in another dtype."""
    if value.dtype == dtype:
        return value

    def by_leaf(leaves: list[Leaf]) -> Leaf | Term:
        (leaf,) = leaves
        if isinstance(leaf, Number):
            return Number(torch.tensor(leaf.value, dtype=value.dtype).to(dtype).item())
        if isinstance(leaf, Scaled) and leaf.factor == 1:
            return negate(equals(leaf.term, whole(0))) if dtype == torch.bool else held(dtype, leaf.term)
        if isinstance(leaf, Scaled) and dtype in ONE_ROUNDING:
            return replace(leaf, rounded=True)
        return curve(torch.Tensor.to, leaves, [value.dtype], [1], {"dtype": dtype}, dtype)

    return apply_to_cases([value], dtype, by_leaf)


def _computed(
    target: Any, leaves: list[Any], dtypes: list[Any], ranks: list[int], kwargs: dict[str, Any], dtype: torch.dtype
) -> Number:
    """What torch makes of numbers."""
    inputs = [
        leaf.value if kind is None else torch.full((1,) if rank else (), leaf.value, dtype=kind)
        for leaf, kind, rank in zip(leaves, dtypes, ranks, strict=True)
    ]
    result = target(*inputs, **kwargs)
    if result.dtype != dtype or bool(result.isnan().any()):
        raise UnreadableError(f"{target} gives {result}")
    return Number(result.item())


def _whole(leaf: Leaf) -> Term | None:
    try:
        return whole_of(leaf)
    except UnreadableError:
        return None


def _both(leaves: list[Leaf]) -> tuple[Term, Term] | None:
    one, other = _whole(leaves[0]), _whole(leaves[1])
    return None if one is None or other is None else (one, other)


def _sum(sign: int) -> Rule:
    def rule(leaves: list[Leaf], kwargs: dict[str, Any], dtype: torch.dtype) -> Leaf | None:
        alpha = kwargs.get("alpha", 1) * sign
        for one, other, factor in ((leaves[0], leaves[1], 1), (leaves[1], leaves[0], alpha)):
            if isinstance(other, Number) and dtype.is_floating_point:
                if other.value == 0 and factor == 1:
                    return one if _whole(one) is None else held(dtype, whole_of(one))
                if other.value == 0 and isinstance(one, Scaled):
                    return replace(one, factor=one.factor * factor)
        if dtype.is_floating_point:
            for leaf, factor, other in ((leaves[0], 1, leaves[1]), (leaves[1], alpha, leaves[0])):
                if isinstance(leaf, Number) and leaf.value * factor <= FAR_BELOW and moderate(other):
                    return Number(leaf.value * factor)
        both = _both(leaves)
        if both is not None and isinstance(alpha, int):
            return held(dtype, weighted_sum([(both[0], 1), (both[1], alpha)]))
        one, other = leaves
        if isinstance(one, Scaled) and isinstance(other, Scaled) and one.factor == other.factor and alpha in (1, -1):
            return Scaled(weighted_sum([(one.term, 1), (other.term, alpha)]), one.factor, rounded=True)
        return None

    return rule


def _swapped(rule: Rule) -> Rule:
    return lambda leaves, kwargs, dtype: rule([leaves[1], leaves[0]], kwargs, dtype)


def _mul(leaves: list[Leaf], kwargs: dict[str, Any], dtype: torch.dtype) -> Leaf | None:
    both = _both(leaves)
    if both is not None:
        return held(dtype, times(*both))
    for one, other in (leaves, leaves[::-1]):
        if isinstance(other, Number) and isfinite(other.value):
            if other.value in (0, 1) and dtype.is_floating_point:
                return one if other.value else Number(0.0)
            if isinstance(one, Scaled) and dtype in ONE_ROUNDING:
                return Scaled(one.term, one.factor * other.value, one.factor != 1)
    return None


def _neg(leaves: list[Leaf], kwargs: dict[str, Any], dtype: torch.dtype) -> Leaf | None:
    (leaf,) = leaves
    if not isinstance(leaf, Scaled):
        return None
    return held(dtype, weighted_sum([(leaf.term, -1)])) if leaf.factor == 1 else replace(leaf, factor=-leaf.factor)


def _div(leaves: list[Leaf], kwargs: dict[str, Any], dtype: torch.dtype) -> Leaf | None:
    mode = kwargs.get("rounding_mode")
    both = _both(leaves)
    if both is None or both[1].op != "int" or not both[1].args[0]:
        return None
    if mode is None:
        divisor = both[1].args[0]
        exact = divisor & (divisor - 1) == 0 and dtype in ONE_ROUNDING and isinstance(held(dtype, both[0]), Scaled)
        return Scaled(both[0], 1 / divisor) if exact else None
    if dtype.is_floating_point and not isinstance(held(dtype, both[0]), Scaled):
        return None
    return held(dtype, floor_divide(*both) if mode == "floor" else _toward_zero(*both))


def _toward_zero(a: Term, b: Term) -> Term:
    up = weighted_sum([(floor_divide(weighted_sum([(a, -1)]), b), -1)])
    same_sign = at_most(whole(0), a) if b.args[0] > 0 else at_most(a, whole(0))
    return choose(same_sign, floor_divide(a, b), up)


def _whole_pair(function: Callable[[Term, Term], Term]) -> Rule:
    def rule(leaves: list[Leaf], kwargs: dict[str, Any], dtype: torch.dtype) -> Leaf | None:
        both = _both(leaves)
        return None if both is None else held(dtype, function(*both))

    return rule


def _by_number(function: Callable[[Term, Term], Term]) -> Rule:
    """A rule for whole numbers that needs a constant on the right."""

    def rule(leaves: list[Leaf], kwargs: dict[str, Any], dtype: torch.dtype) -> Leaf | None:
        both = _both(leaves)
        if both is None or both[1].op != "int" or not both[1].args[0]:
            return None
        return held(dtype, function(*both))

    return rule


def _at_most(a: Leaf, b: Leaf) -> Term | None:
    """``a <= b`` where one of them is whole."""
    one, other = _whole(a), _whole(b)
    if one is not None and other is not None:
        return at_most(one, other)
    if one is not None and isinstance(b, Number):
        return (TRUE if b.value > 0 else FALSE) if not isfinite(b.value) else at_most(one, whole(floor(b.value)))
    if other is not None and isinstance(a, Number):
        return (FALSE if a.value > 0 else TRUE) if not isfinite(a.value) else at_most(whole(-floor(-a.value)), other)
    return None


def _compare(swap: bool, opposite: bool) -> Rule:
    def rule(leaves: list[Leaf], kwargs: dict[str, Any], dtype: torch.dtype) -> Term | None:
        found = _at_most(*(leaves[::-1] if swap else leaves))
        return found if found is None or not opposite else negate(found)

    return rule


def _equal(opposite: bool) -> Rule:
    def rule(leaves: list[Leaf], kwargs: dict[str, Any], dtype: torch.dtype) -> Term | None:
        both = _both(leaves)
        if both is not None:
            found = equals(*both)
        elif any(isinstance(a, Number) and _whole(b) is not None for a, b in (leaves, leaves[::-1])):
            found = FALSE  # a number that is not whole
        else:
            return None
        return negate(found) if opposite else found

    return rule


def _abs(leaves: list[Leaf], kwargs: dict[str, Any], dtype: torch.dtype) -> Leaf | None:
    term = _whole(leaves[0])
    return None if term is None else held(dtype, larger(term, weighted_sum([(term, -1)])))


def _clamp(leaves: list[Leaf], kwargs: dict[str, Any], dtype: torch.dtype) -> Leaf | None:
    terms = [_whole(leaf) for leaf in leaves]
    names = kwargs.get("bounds", ())
    if any(term is None for term in terms):
        return None
    result = terms[0]
    for name, bound in zip(names, terms[1:], strict=True):
        result = (larger if name == "min" else smaller)(result, bound)  # type: ignore[arg-type]
    return held(dtype, result)  # type: ignore[arg-type]


def _relu(leaves: list[Leaf], kwargs: dict[str, Any], dtype: torch.dtype) -> Leaf | None:
    term = _whole(leaves[0])
    return None if term is None else held(dtype, larger(term, whole(0)))


def _rounded(leaves: list[Leaf], kwargs: dict[str, Any], dtype: torch.dtype) -> Leaf | None:
    """floor, ceil, round and trunc of what is whole already."""
    term = _whole(leaves[0])
    return None if term is None or kwargs.get("decimals") else held(dtype, term)


def _sign(leaves: list[Leaf], kwargs: dict[str, Any], dtype: torch.dtype) -> Leaf | None:
    term = _whole(leaves[0])
    if term is None:
        return None
    return held(dtype, larger(smaller(term, whole(1)), whole(-1)) if bounds(term) != (0, 0) else term)


def _fmod(a: Term, b: Term) -> Term:
    return minus(a, times(_toward_zero(a, b), b))


LOGIC: dict[object, Callable[[list[Term]], Term]] = {
    **dict.fromkeys((aten.logical_and, aten.bitwise_and, aten.__and__, aten.mul), all_of),
    **dict.fromkeys((aten.logical_or, aten.bitwise_or, aten.__or__, aten.add), any_of),
    **dict.fromkeys((aten.logical_not, aten.bitwise_not), lambda terms: negate(terms[0])),
    **dict.fromkeys(
        (aten.logical_xor, aten.bitwise_xor, aten.__xor__, aten.ne),
        lambda terms: any_of([all_of([terms[0], negate(terms[1])]), all_of([negate(terms[0]), terms[1]])]),
    ),
    aten.eq: lambda terms: any_of([all_of(terms), all_of(map(negate, terms))]),
}

RULES: dict[object, Rule] = {
    aten.add: _sum(1),
    aten.sub: _sum(-1),
    aten.rsub: _swapped(_sum(-1)),
    aten.mul: _mul,
    aten.neg: _neg,
    aten.div: _div,
    aten.floor_divide: _by_number(floor_divide),
    aten.remainder: _by_number(remainder),
    aten.fmod: _by_number(_fmod),
    aten.le: _compare(False, False),
    aten.gt: _compare(False, True),
    aten.ge: _compare(True, False),
    aten.lt: _compare(True, True),
    aten.eq: _equal(False),
    aten.ne: _equal(True),
    aten.abs: _abs,
    aten.minimum: _whole_pair(smaller),
    aten.maximum: _whole_pair(larger),
    aten.clamp: _clamp,
    aten.clamp_min: _whole_pair(larger),
    aten.clamp_max: _whole_pair(smaller),
    aten.relu: _relu,
    **dict.fromkeys((aten.floor, aten.ceil, aten.round, aten.trunc), _rounded),
    aten.sign: _sign,
}
