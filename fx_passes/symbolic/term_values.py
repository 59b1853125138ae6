"""Terms on whole tensors of positions, and terms from such tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from kvpass.fx_passes.symbolic.index_terms import (
    Term,
    UnreadableError,
    floor_divide,
    operands,
    steps,
    weighted_sum,
    whole,
)


def evaluate(term: Term, values: Mapping[str, Tensor], known: dict[str, Tensor] | None = None) -> Tensor:
    """The term where its variables have ``values``, int64 tensors that broadcast; bool or int64, not expanded."""
    known = {} if known is None else known
    if term.text not in known:
        known[term.text] = _evaluate(term, values, known)
    return known[term.text]


def _evaluate(term: Term, values: Mapping[str, Tensor], known: dict[str, Tensor]) -> Tensor:
    if term.op == "var":
        return values[term.args[0]]
    if term.op in ("int", "bool"):
        return torch.tensor(term.args[0])
    if term.op == "sum":
        total = torch.tensor(term.args[1])
        for inner, factor in term.args[0]:
            total = total + factor * evaluate(inner, values, known)
        return total
    inner = [evaluate(part, values, known) for part in operands(term)]
    if term.op == "steps":
        place = torch.bucketize(inner[0], torch.tensor(term.args[1]), right=True) - 1
        return torch.tensor(term.args[2])[place.clamp(min=0)]
    if term.op in ("and", "or"):
        joined: Tensor = inner[0]
        for part in inner[1:]:
            joined = joined & part if term.op == "and" else joined | part
        return joined
    return OPS[term.op](*inner)


OPS: dict[str, Callable[..., Tensor]] = {
    "mul": torch.mul,
    "div": partial(torch.div, rounding_mode="floor"),
    "min": torch.minimum,
    "max": torch.maximum,
    "if": torch.where,
    "le": lambda a: a <= 0,
    "eq": lambda a: a == 0,
    "not": torch.logical_not,
}


def fit(values: Tensor, argument: Term, low: int, most: int = 256) -> Term:
    """A term of ``argument`` that is ``values[i]``, int64, where the argument is ``low + i``; exact at every place.

    Raises:
        UnreadableError: if the values are no straight line, no rounded-down quotient and have too many steps.
    """
    change = values[1:] - values[:-1]
    if len(values) > 1 and bool((change == change[0]).all()):
        slope = int(change[0])
        return weighted_sum([(argument, slope)], int(values[0]) - slope * low)
    places = change.nonzero().flatten() + 1
    if len(places) < most:
        starts = [0, *places.tolist()]
        return steps(argument, tuple(low + start for start in starts), tuple(values[starts].tolist()))
    first, divisor = int(places[0]), int(places[1] - places[0])
    step = int(change[first - 1])
    regular = torch.equal(places, torch.arange(first, len(values), divisor, device=values.device))
    if regular and first <= divisor and bool((change[places - 1] == step).all()):
        # The quotient goes up by one at each place, and is 0 before the first.
        quotient = floor_divide(weighted_sum([(argument, 1)], divisor - first - low), whole(divisor))
        return weighted_sum([(quotient, step)], int(values[0]))
    raise UnreadableError("a function of one position with too many steps")


def runs(values: Tensor) -> list[tuple[int, int]]:
    """Ranges ``[start, stop)`` over which a vector is constant, in order."""
    places = (values[1:] != values[:-1]).nonzero().flatten() + 1
    return list(pairwise([0, *places.tolist(), len(values)]))
