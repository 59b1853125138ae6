"""An entry of a constant tensor as a function of its place: what a buffer or a learned table holds."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from kvpass.fx_passes.graph import HORIZON
from kvpass.fx_passes.symbolic.entry_values import (
    Curve,
    Leaf,
    Number,
    Scaled,
    Value,
    make,
    of_number,
    of_truth,
    truth_by_table,
    within,
)
from kvpass.fx_passes.symbolic.index_terms import (
    TRUE,
    Term,
    UnreadableError,
    any_of,
    at_most,
    bounds,
    minus,
    plus,
    whole,
)
from kvpass.fx_passes.symbolic.term_values import fit, runs

FEW_RUNS = 8


def look_up(tensor: Tensor, place: tuple[Term, ...], conditions: list[Term]) -> Value:
    """The entry of ``tensor`` at a place.

    Args:
        tensor: any real dtype.
        place: one term per dim.
        conditions: receives what must hold for the place to be inside of the tensor.

    Raises:
        UnreadableError: if it depends on two positions in another way than by their distance.
    """
    if tensor.dtype.is_complex or bool(tensor.isnan().any() if tensor.is_floating_point() else False):
        raise UnreadableError("a table of complex numbers, or with NaN")
    tensor = tensor.detach().cpu()
    open_terms: list[Term] = []
    dim = 0
    for term in place:
        size = tensor.shape[dim]
        if term.op == "int" and 0 <= term.args[0] < size:
            tensor = tensor.select(dim, term.args[0])
            continue
        low, high = bounds(term)
        if low < 0:
            conditions.append(at_most(whole(0), term))
        if high >= size:
            conditions.append(at_most(term, whole(size - 1)))
        first = tensor.select(dim, 0)
        if torch.equal(tensor, first.unsqueeze(dim).expand_as(tensor)):
            tensor = first
            continue
        open_terms.append(term)
        dim += 1
    if tensor.dim() == 2:
        tensor, open_terms = _by_distance(tensor, open_terms)
    if tensor.dim() > 1:
        raise UnreadableError("a table over more than one position")
    return _along(tensor, open_terms[0]) if tensor.dim() else of_number(tensor.dtype, tensor.item())


def _by_distance(tensor: Tensor, terms: list[Term]) -> tuple[Tensor, list[Term]]:
    """A matrix whose entries depend on the difference of their indices, as a vector over it."""
    if not torch.equal(tensor[1:, 1:], tensor[:-1, :-1]):
        raise UnreadableError("a table over two positions")
    rows, row, column = tensor.shape[0], *terms
    return torch.cat([tensor[:, 0].flip(0), tensor[0, 1:]]), [plus(minus(column, row), whole(rows - 1))]


def _along(vector: Tensor, term: Term) -> Value:
    if vector.dtype == torch.bool:
        return of_truth(truth_by_table(vector, term, 0))
    if not vector.is_floating_point():
        fitted = Scaled(fit(vector.to(torch.int64), term, 0))
        return make(vector.dtype, ((TRUE, fitted),))
    ranges = runs(vector)
    if len(ranges) <= FEW_RUNS:
        cases: dict[float, list[Term]] = {}
        for start, stop in ranges:
            cases.setdefault(vector[start].item(), []).append(within(term, start, stop, len(vector)))
        return make(vector.dtype, [(any_of(where), Number(number)) for number, where in cases.items()])
    return make(vector.dtype, ((TRUE, _line(vector, term) or _table(vector, term)),))


def _line(vector: Tensor, term: Term) -> Leaf | None:
    """``factor * (term + offset)``, where that is every entry exactly; so ALiBi is kept as a table."""
    if vector.dtype not in (torch.float32, torch.float64):
        return None
    places = torch.arange(len(vector))
    for factor in {(vector[1] - vector[0]).item(), (vector[-1] - vector[-2]).item()}:
        offset = round(vector[0].item() / factor) if factor else 0
        if abs(offset) < HORIZON and torch.equal((places + offset).to(vector.dtype) * factor, vector):
            return Scaled(plus(term, whole(offset)), factor)
    return None


def _table(vector: Tensor, term: Term) -> Curve:
    def function(x: Tensor) -> Tensor:
        return vector[x.clamp(0, len(vector) - 1)]

    entries = vector.to(torch.float64).numpy().tobytes()
    return Curve(term, f"table {hashlib.sha256(entries).hexdigest()}", function, float(vector.abs().max()))
