"""Ops that make and move entries: half of the table of :mod:`kvpass.fx_passes.symbolic.extents`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.fx import Node

from kvpass.fx_passes.graph import FULL, CapturedGraph, aten, expression, shape_of
from kvpass.fx_passes.symbolic.entry_moves import grouped_dims
from kvpass.fx_passes.symbolic.index_terms import UnreadableError

Dims = frozenset[int]
ALONG = "works along it"
# Small multiples of 1 / GRAIN are counted without rounding in these dtypes, as far as any mask is evaluated.
GRAIN = 64
WIDE = (torch.float32, torch.float64)


class ActsError(Exception):
    """A size takes part in the entries of a tensor."""

    def __init__(self, node: Node, why: str) -> None:
        packet = getattr(node.target, "overloadpacket", None)
        super().__init__(f"`{getattr(packet, '__name__', None) or node.name}` {why}")


class Extended(Protocol):
    """What rules ask of :class:`kvpass.fx_passes.symbolic.extents.Extents`."""

    captured: CapturedGraph

    def varies(self, node: Node) -> Dims: ...
    def number(self, value: Any) -> float | None: ...
    def fixed(self, node: Node, dim: int) -> bool: ...
    def aligned(self, operand: Node, result: Node, dims: Dims | None = None) -> Dims: ...
    def never_negative(self, node: Node) -> bool: ...
    def vanishes(self, node: Node, dim: int, beyond: int) -> bool: ...


Rule = Callable[[Extended, Node, dict[str, Any]], Dims]


def dim_of(named: dict[str, Any], node: Node, key: str = "dim") -> int:
    """A dim counted from 0; `node` has the rank that it counts in."""
    return int(named[key]) % max(1, len(shape_of(node)))


def dims_of(dims: Any, node: Node) -> list[int]:
    rank = len(shape_of(node))
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return list(range(rank))
    return [int(d) % max(1, rank) for d in ([dims] if isinstance(dims, int) else dims)]


def _same_place(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    return extents.aligned(named["self"], node)


def _from_source(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    """Written over whatever was there."""
    value = named.get("src", named.get("value"))
    if isinstance(value, Node) and "val" in value.meta and hasattr(value.meta["val"], "dim"):
        return extents.aligned(value, node)
    if extents.number(value) is None:
        raise ActsError(node, "takes it for a number")
    return frozenset()


def _arange(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    dtype = node.meta["val"].dtype
    for value in (named.get("start", 0), named.get("step", 1)):
        number = extents.number(value)
        if number is None:
            raise ActsError(node, "counts from it, or in steps of it")
        # What rounds is computed in groups of entries, and where a group begins depends on the length.
        if dtype.is_floating_point and not (dtype in WIDE and abs(number) <= 8 and float(number * GRAIN).is_integer()):
            raise ActsError(node, "counts in numbers that are rounded")
    return frozenset({0})


def _eye(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    return frozenset({0, 1})


def _unsqueeze(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    dim = dim_of(named, node)
    return frozenset(d + (d >= dim) for d in extents.varies(named["self"]))


def _squeeze(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    source = named["self"]
    shape = shape_of(source)
    dropped = {d for d in (dims_of(named["dim"], source) if "dim" in named else range(len(shape))) if shape[d] == 1}
    kept = [d for d in range(len(shape)) if d not in dropped]
    return frozenset(kept.index(d) for d in extents.varies(source))


def _permute(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    order = dims_of(named["dims"], named["self"])
    return frozenset(order.index(d) for d in extents.varies(named["self"]))


def _transpose(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    one, other = (dim_of(named, node, key) for key in ("dim0", "dim1"))
    moved = {one: other, other: one}
    return frozenset(moved.get(d, d) for d in extents.varies(named["self"]))


def _t(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    last = len(shape_of(node)) - 1
    return frozenset(last - d for d in extents.varies(named["self"]))


def _reshape(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    """Dims may be split and merged where all but the first of them have fixed sizes."""
    source, varies = named["self"], extents.varies(named["self"])
    if node.meta["val"].dtype != source.meta["val"].dtype:
        raise ActsError(node, "reads bits of other numbers")
    old, new = shape_of(source), shape_of(node)
    try:
        groups = list(grouped_dims(list(old), list(new)))
    except UnreadableError:
        groups = [(list(range(len(old))), list(range(len(new))))]
    result: set[int] = set()
    for mine, theirs in groups:
        if not varies & set(mine):
            continue
        mine, theirs = [d for d in mine if old[d] != 1], [d for d in theirs if new[d] != 1]
        inner = [*(old[d] for d in mine[1:]), *(new[d] for d in theirs[1:])]
        if not all(size.is_number for size in inner):
            raise ActsError(node, "splits or merges dims whose sizes depend on it")
        result.update(theirs)
    return frozenset(result)


def _slice(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    source, dim = named["self"], dim_of(named, node)
    varies = extents.varies(source)
    if dim in varies:
        start, step = extents.number(named["start"] or 0), extents.number(named.get("step", 1))
        if start is None or step is None:
            raise ActsError(node, "begins at a place, or takes steps, that depend on it")
        if start < 0 and not extents.fixed(source, dim):
            raise ActsError(node, "counts from the end")
    return varies


def _select(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    source, dim = named["self"], dim_of(named, named["self"])
    varies = extents.varies(source)
    if dim in varies:
        index = extents.number(named["index"])
        if index is None:
            raise ActsError(node, "takes a place that depends on it")
        if index < 0 and not extents.fixed(source, dim):
            raise ActsError(node, "counts from the end")
    return frozenset(d - (d > dim) for d in varies if d != dim)


def _cat(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    parts = [part for part in named["tensors"] if shape_of(part) != (0,)]
    dim = dim_of(named, node)
    if not all(extents.fixed(part, dim) for part in parts[:-1]):
        raise ActsError(node, "joins something behind a part whose size depends on it")
    joined = frozenset({dim}) if len(parts) > 1 else frozenset()
    return joined.union(*(extents.varies(part) for part in parts))


def _stack(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    dim = dim_of(named, node)
    inner = frozenset[int]().union(*(extents.varies(part) for part in named["tensors"]))
    return frozenset({dim, *(d + (d >= dim) for d in inner)})


def _pad(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    source, pads = named["self"], list(named["pad"])
    if named.get("mode", "constant") != "constant":
        raise ActsError(node, "pads with entries of its own")
    if extents.number(named["value"] or 0) is None:
        raise ActsError(node, "takes it for a number")
    varies, rank = set(extents.varies(source)), len(shape_of(source))
    for dim, front, back in zip(range(rank - 1, -1, -1), pads[::2], pads[1::2], strict=False):
        before, after = extents.number(front), extents.number(back)
        if before is None:
            raise ActsError(node, "pads in front by a size that depends on it")
        if not extents.fixed(source, dim) and (after is None or after > 0):
            raise ActsError(node, "pads at its end")
        if before or after != 0:
            varies.add(dim)
    return frozenset(varies)


def _flip(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    return _moved_within(extents, node, named["self"], dims_of(named["dims"], node))


def _roll(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    shifts = named["shifts"] if isinstance(named["shifts"], list | tuple) else [named["shifts"]]
    numbers = [extents.number(shift) for shift in shifts]
    if not named["dims"]:  # over the tensor laid out in one row
        varies = extents.varies(named["self"])
        if varies and numbers != [0] and len(shape_of(node)) > 1:
            raise ActsError(node, ALONG)
        return varies if numbers == [0] else _moved_within(extents, node, named["self"], [0])
    dims = [d for d, shift in zip(dims_of(named["dims"], node), numbers, strict=True) if shift != 0]
    varies = _moved_within(extents, node, named["self"], dims)
    if None in numbers and varies & set(dims):
        raise ActsError(node, "turns by it")
    return varies


def _moved_within(extents: Extended, node: Node, source: Node, dims: list[int]) -> Dims:
    """Entries trade places along dims of fixed sizes, or along dims where all are equal."""
    varies = extents.varies(source)
    if any(d in varies and not extents.fixed(source, d) for d in dims):
        raise ActsError(node, ALONG)
    return varies


def _repeat(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    source = named["self"]
    shift = len(shape_of(node)) - len(shape_of(source))
    varies = extents.varies(source)
    for d in varies:
        if not extents.fixed(source, d) and extents.number(named["repeats"][d + shift]) != 1:
            raise ActsError(node, "lays a pattern of that size")
    return frozenset(d + shift for d in varies)


def _repeat_interleave(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    source, dim = named["self"], named["dim"]
    varies = extents.varies(source)
    if dim is None and len(shape_of(source)) != 1:
        raise ActsError(node, "merges dims")
    place = dims_of(dim or 0, node)[0]
    if isinstance(named["repeats"], Node) and hasattr(named["repeats"].meta["val"], "dim"):
        raise ActsError(node, "repeats each entry its own number of times")
    if place in varies and extents.number(named["repeats"]) is None:
        raise ActsError(node, "repeats each entry a number of times that depends on it")
    return varies


def _triangle(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    if extents.number(named["diagonal"]) is None:
        raise ActsError(node, "cuts along a diagonal that depends on it")
    rank = len(shape_of(node))
    return extents.varies(named["self"]) | {rank - 1, rank - 2}


def _diagonal(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    source = named["self"]
    taken = {dim_of(named, source, "dim1"), dim_of(named, source, "dim2")}
    varies, rest = extents.varies(source), [d for d in range(len(shape_of(source))) if d not in taken]
    last = {len(rest)} if varies & taken else set()
    return frozenset({*last, *(rest.index(d) for d in varies - taken)})


def _slice_scatter(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    dim = dim_of(named, node)
    given = [default if named[key] is None else named[key] for key, default in _RANGE]
    if given[1] is not FULL and expression(given[1]) == shape_of(node)[dim]:
        given[1] = FULL
    ends = [extents.number(value) for value in given]
    if None in ends or (min(e for e in ends if e is not None) < 0 and not extents.fixed(node, dim)):
        raise ActsError(node, "writes to places that depend on it")
    return extents.varies(named["self"]) | extents.varies(named["src"]) | {dim}


def _select_scatter(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    dim, index = dim_of(named, node), extents.number(named["index"])
    if index is None or (index < 0 and not extents.fixed(node, dim)):
        raise ActsError(node, "writes to a place that depends on it")
    inner = frozenset(d + (d >= dim) for d in extents.varies(named["src"]))
    return extents.varies(named["self"]) | inner | {dim}


def _diff(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    dim = dim_of(named, node)
    parts = [part for part in (named["prepend"], named["self"], named["append"]) if part is not None]
    if not all(extents.fixed(part, dim) for part in parts[:-1]):
        raise ActsError(node, "joins something behind a part whose size depends on it")
    return frozenset({dim}).union(*(extents.varies(part) for part in parts))


def _unfold(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    dim, varies = dim_of(named, named["self"], "dimension"), extents.varies(named["self"])
    return varies | {len(shape_of(node)) - 1} if dim in varies else varies


def _to_complex(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    return extents.varies(named["self"]) - {len(shape_of(node))}


def _to_real(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    return extents.varies(named["self"]) | {len(shape_of(node)) - 1}


_RANGE = (("start", 0), ("end", FULL), ("step", 1))
MOVES: dict[object, Rule] = {
    **dict.fromkeys((aten.copy, aten.fill), _from_source),
    aten.arange: _arange,
    aten.eye: _eye,
    aten.unsqueeze: _unsqueeze,
    aten.squeeze: _squeeze,
    **dict.fromkeys((aten.expand, aten.alias, aten.detach, aten.lift_fresh_copy, aten.contiguous), _same_place),
    aten.permute: _permute,
    aten.transpose: _transpose,
    aten.t: _t,
    **dict.fromkeys((aten.reshape, aten.view, aten._unsafe_view, aten.unflatten, aten.flatten), _reshape),
    **dict.fromkeys((aten.slice, aten.narrow), _slice),
    aten.select: _select,
    aten.cat: _cat,
    aten.stack: _stack,
    **dict.fromkeys((aten.constant_pad_nd, aten.pad), _pad),
    aten.flip: _flip,
    aten.roll: _roll,
    aten.repeat: _repeat,
    aten.repeat_interleave: _repeat_interleave,
    **dict.fromkeys((aten.tril, aten.triu), _triangle),
    aten.diagonal: _diagonal,
    aten.slice_scatter: _slice_scatter,
    aten.select_scatter: _select_scatter,
    aten.diff: _diff,
    aten.unfold: _unfold,
    aten.view_as_complex: _to_complex,
    aten.view_as_real: _to_real,
}
