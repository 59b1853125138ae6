"""Ops that move entries, as :class:`kvpass.fx_passes.symbolic.entry_reader.EntryReader` reads them.

Each translates the place of an entry of the result to the place of the entry of the source that stands there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch.fx import Node

from kvpass.fx_passes.graph import arguments, aten, expression, shape_of
from kvpass.fx_passes.symbolic.entry_rules import cast
from kvpass.fx_passes.symbolic.entry_values import Entries, Place, Value, of_number, select
from kvpass.fx_passes.symbolic.index_terms import (
    Term,
    UnreadableError,
    at_most,
    equals,
    floor_divide,
    larger,
    less,
    minus,
    plus,
    remainder,
    smaller,
    times,
    weighted_sum,
    whole,
)


def _unsqueeze(reader: Entries, node: Node, place: Place) -> Value:
    dim = int(arguments(node)["dim"]) % len(place)
    return reader.entry(node.args[0], place[:dim] + place[dim + 1 :])  # type: ignore[arg-type]


def _squeeze(reader: Entries, node: Node, place: Place) -> Value:
    source: Any = node.args[0]
    shape = shape_of(source)
    dims = arguments(node).get("dim", range(len(shape)))
    dropped = {d % len(shape) for d in (dims if isinstance(dims, list | tuple | range) else [dims])}
    rest = iter(place)
    return reader.entry(
        source, tuple(whole(0) if d in dropped and size == 1 else next(rest) for d, size in enumerate(shape))
    )


def _same_place(reader: Entries, node: Node, place: Place) -> Value:
    return cast(reader.broadcast(node.args[0], place), node.meta["val"].dtype)  # type: ignore[arg-type]


def _permute(reader: Entries, node: Node, place: Place) -> Value:
    source: Any = node.args[0]
    order = [int(d) % len(place) for d in arguments(node)["dims"]]
    return reader.entry(source, tuple(place[order.index(d)] for d in range(len(place))))


def _transpose(reader: Entries, node: Node, place: Place) -> Value:
    source, a, b = node.args
    moved = list(place)
    moved[a], moved[b] = place[b], place[a]  # type: ignore[index]
    return reader.entry(source, tuple(moved))  # type: ignore[arg-type]


def _reshape(reader: Entries, node: Node, place: Place) -> Value:
    source: Any = node.args[0]
    if source.meta["val"].dtype != node.meta["val"].dtype:
        raise UnreadableError("the bits of other numbers")
    old, new = list(shape_of(source)), list(shape_of(node))
    result: list[Term] = []
    for group, taken in grouped_dims(old, new):
        result += _regroup(reader, [old[d] for d in group], [new[d] for d in taken], [place[d] for d in taken])
    return reader.entry(source, tuple(result))


def grouped_dims(old: list[Any], new: list[Any]) -> Iterator[tuple[list[int], list[int]]]:
    """The shortest groups of dims of two shapes that hold equally many entries, in order; new dims of 1 may be left.

    Raises:
        UnreadableError: if there are none.
    """
    i = j = 0
    while i < len(old):
        group, have, want = [i], old[i], sympy.Integer(1)
        taken: list[int] = []
        while sympy.simplify(have - want) != 0:
            if j < len(new) and (want == 1 or len(group) > 1 or _divides(want * new[j], have)):
                want, taken, j = want * new[j], [*taken, j], j + 1
            elif group[-1] + 1 < len(old):
                have, group = have * old[group[-1] + 1], [*group, group[-1] + 1]
            else:
                raise UnreadableError(f"a reshape of {old} to {new}")
        yield group, taken
        i = group[-1] + 1


def _divides(part: sympy.Expr, total: sympy.Expr) -> bool:
    ratio = sympy.simplify(total / part)
    return bool(ratio.is_polynomial() and sympy.denom(ratio) == 1)


def _regroup(reader: Entries, old: list[Any], new: list[Any], place: list[Term]) -> list[Term]:
    """The place in dims ``old`` of what stands at ``place`` in dims ``new``; both hold equally many entries."""
    flat = whole(0)
    for size, index in zip(new, place, strict=True):
        flat = plus(times(flat, reader.number(size)), index) if size != 1 else flat
    if len([size for size in old if size != 1]) <= 1:
        return [flat if size != 1 else whole(0) for size in old]
    result: list[Term] = []
    for size in reversed(old[1:]):
        result.insert(0, remainder(flat, reader.number(size)))
        flat = floor_divide(flat, reader.number(size))
    return [flat, *result]


def _slice(reader: Entries, node: Node, place: Place) -> Value:
    named = arguments(node)
    dim, step = int(named["dim"]) % len(place), named["step"]
    start = _from_end(reader, named["self"], dim, named["start"])
    moved = weighted_sum([(start, 1), (place[dim], step)])
    return reader.entry(named["self"], (*place[:dim], moved, *place[dim + 1 :]))


def _from_end(reader: Entries, source: Node, dim: int, index: Any) -> Term:
    """A start or end as the op takes it: negative ones count from the end."""
    start = whole(0) if index is None else reader.number(index)
    size = reader.size(source, dim)
    counted = start if start.op != "int" else (start if start.args[0] >= 0 else larger(plus(size, start), whole(0)))
    return smaller(counted, size) if counted.op == "int" and counted.args[0] > 0 else counted


def _select(reader: Entries, node: Node, place: Place) -> Value:
    named = arguments(node)
    dim = int(named["dim"]) % (len(place) + 1)
    index = reader.number(named["index"])
    if index.op == "int" and index.args[0] < 0:
        index = plus(reader.size(named["self"], dim), index)
    return reader.entry(named["self"], (*place[:dim], index, *place[dim:]))


def _cat(reader: Entries, node: Node, place: Place) -> Value:
    parts, dtype = list(node.args[0]), node.meta["val"].dtype  # type: ignore[arg-type]
    dim = int(arguments(node)["dim"]) % len(place)
    return joined(reader, parts, dim, place, dtype)


def joined(reader: Entries, parts: list[Any], dim: int, place: Place, dtype: torch.dtype) -> Value:
    filled = [part for part in parts if 0 not in shape_of(part)]
    starts = [whole(0)]
    for part in filled:
        starts.append(plus(starts[-1], reader.size(part, dim)))
    result: Value | None = None
    for part, start, stop in reversed(list(zip(filled, starts[:-1], starts[1:], strict=True))):
        inside = less(place[dim], stop)
        if result is not None and inside.value is False:
            continue
        value = cast(reader.entry(part, (*place[:dim], minus(place[dim], start), *place[dim + 1 :])), dtype)
        result = value if result is None else select(inside, value, result, dtype)
    assert result is not None
    return result


def _stack(reader: Entries, node: Node, place: Place) -> Value:
    parts: Any = node.args[0]
    dim = int(arguments(node)["dim"]) % len(place)
    dtype = node.meta["val"].dtype
    inner = place[:dim] + place[dim + 1 :]
    result = cast(reader.entry(parts[-1], inner), dtype)
    for i, part in enumerate(parts[:-1]):
        result = select(equals(place[dim], whole(i)), cast(reader.entry(part, inner), dtype), result, dtype)
    return result


def _flip(reader: Entries, node: Node, place: Place) -> Value:
    source: Any = node.args[0]
    dims = {int(d) % len(place) for d in arguments(node)["dims"]}
    moved = (minus(minus(reader.size(source, d), whole(1)), p) if d in dims else p for d, p in enumerate(place))
    return reader.entry(source, tuple(moved))


def _repeat(reader: Entries, node: Node, place: Place) -> Value:
    source: Any = node.args[0]
    shape = shape_of(source)
    own = place[len(place) - len(shape) :]
    times_repeated = [expression(n) for n in arguments(node)["repeats"]][len(place) - len(shape) :]
    moved = [
        whole(0) if size == 1 else p if n == 1 else remainder(p, reader.number(size))
        for size, n, p in zip(shape, times_repeated, own, strict=True)
    ]
    return reader.entry(source, tuple(moved))


def _index(reader: Entries, node: Node, place: Place) -> Value:
    named = arguments(node)
    source, indices = named["self"], named["indices"]
    used = [d for d, index in enumerate(indices) if index is not None]
    if any(indices[d].meta["val"].dtype in (torch.bool, torch.uint8) for d in used):
        raise UnreadableError("an index by truth values")
    rank = max(len(shape_of(indices[d])) for d in used)
    # Neighbouring indices stand where the first of them stood; others come first.
    first = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    inner, rest = place[first : first + rank], iter(place[:first] + place[first + rank :])
    moved = [
        _position(reader, source, d, reader.broadcast(indices[d], inner).term) if d in used else next(rest)
        for d in range(len(shape_of(source)))
    ]
    return reader.entry(source, tuple(moved))


def _position(reader: Entries, source: Node, dim: int, index: Term) -> Term:
    """An index into a dim; one that may be negative, or past the end, is a condition of the graph having a value."""
    size = reader.size(source, dim)
    if index.op == "int" and index.args[0] < 0:
        return plus(size, index)
    reader.conditions += [at_most(whole(0), index), less(index, size)]
    return index


def _index_select(reader: Entries, node: Node, place: Place) -> Value:
    named = arguments(node)
    dim = int(named["dim"]) % len(place)
    index = reader.entry(named["index"], (place[dim],)).term
    moved = _position(reader, named["self"], dim, index)
    return reader.entry(named["self"], (*place[:dim], moved, *place[dim + 1 :]))


def _gather(reader: Entries, node: Node, place: Place) -> Value:
    named = arguments(node)
    dim = int(named["dim"]) % len(place)
    moved = _position(reader, named["self"], dim, reader.entry(named["index"], place).term)
    return reader.entry(named["self"], (*place[:dim], moved, *place[dim + 1 :]))


def _embedding(reader: Entries, node: Node, place: Place) -> Value:
    named = arguments(node)
    index = _position(reader, named["weight"], 0, reader.entry(named["indices"], place[:-1]).term)
    return reader.entry(named["weight"], (index, place[-1]))


def _triangle(upper: bool) -> Callable[[Entries, Node, Place], Value]:
    def read(reader: Entries, node: Node, place: Place) -> Value:
        named = arguments(node)
        dtype = node.meta["val"].dtype
        diagonal, distance = reader.number(named["diagonal"]), minus(place[-1], place[-2])
        kept = at_most(diagonal, distance) if upper else at_most(distance, diagonal)
        return select(kept, reader.entry(named["self"], place), of_number(dtype, 0), dtype)

    return read


MOVES: dict[object, Callable[[Entries, Node, Place], Value]] = {
    aten.unsqueeze: _unsqueeze,
    aten.squeeze: _squeeze,
    **dict.fromkeys((aten.expand, aten._to_copy, aten.clone, aten.alias, aten.contiguous, aten.to), _same_place),
    aten.permute: _permute,
    aten.transpose: _transpose,
    **dict.fromkeys((aten.reshape, aten.view, aten._unsafe_view, aten.unflatten, aten.flatten), _reshape),
    aten.slice: _slice,
    aten.select: _select,
    aten.cat: _cat,
    aten.stack: _stack,
    aten.flip: _flip,
    aten.repeat: _repeat,
    aten.index: _index,
    aten.index_select: _index_select,
    aten.gather: _gather,
    aten.embedding: _embedding,
    aten.triu: _triangle(True),
    aten.tril: _triangle(False),
}
