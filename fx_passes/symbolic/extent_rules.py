"""Ops that look entries up, or join many in one: the table of :mod:`kvpass.fx_passes.symbolic.extents`."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from kvpass.fx_passes.graph import arguments, aten, shape_of
from kvpass.fx_passes.symbolic.extent_moves import ALONG, MOVES, ActsError, Dims, Extended, Rule, dim_of, dims_of


def _index(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    source, indices = named["self"], named["indices"]
    used = [d for d, index in enumerate(indices) if index is not None]
    if any(indices[d].meta["val"].dtype not in (torch.int64, torch.int32) for d in used):
        raise ActsError(node, "takes entries by truth values")
    inner = max(len(shape_of(indices[d])) for d in used)
    # Neighbouring indices stand where the first of them stood; others come first.
    first = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    places = shape_of(node)[first : first + inner]
    kept = [d for d in range(len(shape_of(source))) if d not in used]
    outer = [d for d in range(len(shape_of(node))) if not first <= d < first + inner]
    varies = extents.varies(source)
    result = {there for d, there in zip(kept, outer, strict=True) if d in varies}
    for d in varies & set(used):
        _check_index(extents, node, source, d, indices[d])
        mine = shape_of(indices[d])
        for e in extents.varies(indices[d]):
            if mine[e] != places[e + inner - len(mine)]:
                raise ActsError(node, "broadcasts along it")
            result.add(first + e + inner - len(mine))
    return frozenset(result)


def _check_index(extents: Extended, node: Node, source: Node, dim: int, index: Node) -> None:
    if not extents.fixed(source, dim) and not extents.never_negative(index):
        raise ActsError(node, "looks up places that may count from the end")


def _index_select(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    source, dim = named["self"], dim_of(named, node)
    varies = extents.varies(source)
    return varies if dim in varies and extents.varies(named["index"]) else varies - {dim}


def _gather(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    dim = dim_of(named, node)
    varies = extents.varies(named["self"])
    return (varies - {dim}) | extents.varies(named["index"]) if dim in varies else varies


def _embedding(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    varies, last = extents.varies(named["weight"]), len(shape_of(node)) - 1
    rows = extents.varies(named["indices"]) if 0 in varies else frozenset[int]()
    return rows | {last} if 1 in varies else rows


def _bucketize(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    """Which of some fixed steps a number has passed."""
    if not all(extents.fixed(named["boundaries"], d) for d in range(len(shape_of(named["boundaries"])))):
        raise ActsError(node, ALONG)
    extents.varies(named["boundaries"])
    return extents.aligned(named["self"], node)


def _running(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    """Each entry follows from those up to its place."""
    return extents.varies(named["self"]) | {dim_of(named, named["self"])}


def _one_hot(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    if named["num_classes"] < 0:
        raise ActsError(node, "counts classes over all tokens")
    return extents.varies(named["self"]) | {len(shape_of(node)) - 1}


def _outer(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    return extents.varies(named["self"]) | {1 for _ in extents.varies(named["vec2"])}


def _reduction(of_equals: bool, summed: bool) -> Rule:
    """A number for all entries along some dims.

    Args:
        of_equals: the number for entries that are all equal does not depend on how many they are.
        summed: entries that are 0 make no difference.
    """

    def rule(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
        source = named["self"]
        varies, dims = extents.varies(source), dims_of(named.get("dim"), source)
        sizes, beyond = (extents.captured.length, extents.captured.batch), None
        for d in dims:
            if extents.fixed(source, d) or (of_equals and d not in varies and shape_of(source)[d] in sizes):
                continue
            rest = [e for e in range(len(shape_of(source))) if e not in dims]
            beyond = next((e for e in rest if extents.vanishes(source, d, e)), None) if summed else None
            if beyond is None or len(dims) > 1:
                raise ActsError(node, ALONG)
        kept = list(range(len(shape_of(source)))) if named.get("keepdim") else _others(source, dims)
        if len(kept) != len(shape_of(node)):
            raise ActsError(node, "is written in a way that is not known")
        outer = (varies | ({beyond} if beyond is not None else set())) - set(dims)
        return frozenset(kept.index(d) for d in outer)

    return rule


def _others(source: Node, dims: list[int]) -> list[int]:
    return [d for d in range(len(shape_of(source))) if d not in dims]


def _getitem(extents: Extended, node: Node, named: dict[str, Any]) -> Dims:
    """One result of several; each has its rule by the op that gives them."""
    source: Any = node.args[0]
    packet = getattr(source.target, "overloadpacket", None)
    inner = arguments(source)
    if packet in PARTS:
        dim = dim_of(inner, inner["self"])
        varies = extents.varies(inner["self"])
        sizes = inner.get("split_size", inner.get("split_sizes", inner.get("chunks", 1)))
        sizes = sizes if isinstance(sizes, list | tuple) else [sizes]
        if dim in varies and (not extents.fixed(inner["self"], dim) or None in map(extents.number, sizes)):
            raise ActsError(source, ALONG)
        return varies if packet is not aten.unbind else frozenset(d - (d > dim) for d in varies if d != dim)
    if packet in RUNNING_PAIRS:
        return _running(extents, node, inner)
    if packet in (aten.max, aten.min) and "dim" in inner:
        values = node.args[1] == 0
        return _reduction(bool(values), False)(extents, node, inner)
    raise ActsError(source, "is an op of which nothing is known")


PARTS = {aten.unbind, aten.split, aten.split_with_sizes, aten.chunk}
RUNNING_PAIRS = {aten.cummax, aten.cummin}
RULES: dict[object, Rule] = {
    **MOVES,
    operator.getitem: _getitem,
    aten.index: _index,
    aten.index_select: _index_select,
    aten.gather: _gather,
    aten.embedding: _embedding,
    aten.bucketize: _bucketize,
    **dict.fromkeys((aten.cumsum, aten.cumprod, aten.logcumsumexp), _running),
    aten.one_hot: _one_hot,
    aten.outer: _outer,
    **dict.fromkeys((aten.any, aten.amax, aten.amin, aten.all), _reduction(True, False)),
    **dict.fromkeys((aten.max, aten.min), _reduction(True, False)),
    aten.sum: _reduction(False, True),
    **dict.fromkeys((aten.mean, aten.prod), _reduction(False, False)),
}
