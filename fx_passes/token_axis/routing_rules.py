"""Axis rules of routing: rows of tokens picked or sorted by data, worked on one by one, and brought back.

Mixtures of experts sort the rows of all tokens by expert, or pick those of one expert, so that an op on a dim of
picked rows sees rows of many tokens. It is still token-wise if every picked row goes back to where it came from. So a
picked dim remembers the pick, and an index tensor is known by what its values say: the row that an entry came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from kvpass.fx_passes.graph import arguments, aten, expression, is_call, shape_of
from kvpass.fx_passes.op_facts.facts import is_item_of
from kvpass.fx_passes.token_axis.axes import Axes, Dim, Factor, Kind, MixesTokens, is_free, kinds_in, plain
from kvpass.fx_passes.token_axis.infer_axes import AxisRule, Inference, Several

CASTS = (aten._to_copy, aten.clone)
# What holds every row number and every expert that there can be; bfloat16 rounds from 257 on, a byte wraps at 128.
WHOLE = (torch.int32, torch.int64, torch.float32, torch.float64)


@dataclass(frozen=True)
class RowIndex:
    """Values of an index tensor: for each entry of a picked dim, the row of ``target`` that it belongs to."""

    target: Dim
    tag: int


def picked_dim(inference: Inference, node: Node) -> Dim:
    """The dim of rows that a node picks; one and the same however often it is asked for."""
    if node not in inference.picks:
        inference.picks[node] = inference.fresh_tag()
    size = (
        shape_of(node)[0]
        if not isinstance(node.meta["val"], (tuple, list))
        else expression(node.meta["val"][0].shape[0])
    )
    return (Factor(Kind.PICKED, size, inference.picks[node]),)


def sort_rows(inference: Inference, node: Node, axes: Axes) -> Axes | Several:
    """``sort`` and ``argsort`` of one number per row: the result's rows are picked rows."""
    dim = picked_dim(inference, node)
    return Several(((dim,), (dim,))) if isinstance(node.meta["val"], (tuple, list)) else (dim,)


def is_row_sort(axes: Axes) -> bool:
    """Whether a sorted tensor holds one number for each row of tokens."""
    return len(axes) == 1 and Kind.TOKEN in kinds_in(axes[0])


def nonzero(inference: Inference, node: Node, named: dict[str, Any]) -> Axes | Several:
    """Rows where a mask holds, ``[rows, rank]``."""
    axes = inference.axes(node.args[0])
    if sum(Kind.TOKEN in kinds_in(dim) for dim in axes) != 1:
        raise MixesTokens("picks entries that belong to no one token")
    dim = picked_dim(inference, node)
    if isinstance(node.meta["val"], (tuple, list)):
        return Several(tuple((dim,) for _ in node.meta["val"]))
    return (dim, plain(len(axes)))


def keeps_numbers(node: Node) -> bool:
    """Whether a node is a cast, or a copy, that keeps whole numbers as they are."""
    return is_call(node, *CASTS) and node.meta["val"].dtype in WHOLE


def row_index(inference: Inference, node: Any) -> RowIndex | None:
    """What the values of an index tensor say, or None when they are no rows of a picked dim."""
    if not isinstance(node, Node):
        return None
    if keeps_numbers(node):
        return row_index(inference, node.args[0])
    if is_call(node, aten.floor_divide, aten.div):
        return _divided(inference, node)
    if is_call(node, aten.argsort):
        return _sorted_from(inference, node)
    source = node.args[0] if node.args else None
    if is_item_of(node.target) and isinstance(source, Node):
        if is_call(source, aten.sort) and node.args[1] == 1:
            return _sorted_from(inference, source)
        if is_call(source, aten.nonzero_numpy, aten.where):
            return _nonzero_column(inference, source, int(node.args[1]))  # type: ignore[arg-type]
        if (
            is_call(source, aten.unbind)
            and is_call(source.args[0], aten.nonzero)
            and arguments(source)["dim"] in (1, -1)
        ):
            return _nonzero_column(inference, source.args[0], int(node.args[1]))  # type: ignore[arg-type]
    if is_call(node, aten.select) and is_call(source, aten.nonzero) and node.args[1] in (1, -1):
        return _nonzero_column(inference, source, int(node.args[2]))  # type: ignore[arg-type]
    if is_call(node, aten.squeeze) and is_call(source, aten.nonzero):
        return _nonzero_column(inference, source, 0)
    return None


def _sorted_from(inference: Inference, sort: Node) -> RowIndex | None:
    keys = inference.results.get(sort.args[0])  # type: ignore[arg-type]
    if sort not in inference.picks or not isinstance(keys, tuple) or not is_row_sort(keys):
        return None
    return RowIndex(keys[0], inference.picks[sort])


def _nonzero_column(inference: Inference, node: Any, column: int) -> RowIndex | None:
    axes = inference.results.get(node.args[0])
    if node not in inference.picks or not isinstance(axes, tuple):
        return None
    return RowIndex(axes[column], inference.picks[node])


def _divided(inference: Inference, node: Node) -> RowIndex | None:
    """Row numbers of ``tokens x k`` divided by k, rounded down, are row numbers of tokens."""
    named = arguments(node)
    inner = row_index(inference, named["self"])
    divisor = named["other"]
    exact = is_call(node, aten.floor_divide) or named.get("rounding_mode") in ("floor", "trunc")
    if inner is None or not exact or not isinstance(divisor, int) or not inner.target:
        return None
    if divisor == 1:
        return inner
    last = inner.target[-1]
    return RowIndex(inner.target[:-1], inner.tag) if last.kind is Kind.PLAIN and last.size == divisor else None


def take_rows(inference: Inference, source: Node, indices: list[Node | None], node: Node) -> Axes | None:
    """Axes of ``source[indices]`` where the indices pick rows of tokens, or bring picked rows back; else None."""
    axes = inference.axes(source)
    given = [i for i, n in enumerate(indices) if n is not None]
    if given != list(range(given[0], given[-1] + 1)):
        return None
    back = _places_in_sorted(inference, indices[given[0]])
    if back is not None and len(given) == 1:
        target, tag = back
        at = axes[given[0]]
        if len(at) == 1 and at[0].kind is Kind.PICKED and at[0].tag == tag:
            return (*axes[: given[0]], target, *axes[given[0] + 1 :])
        return None
    picks = [row_index(inference, indices[i]) for i in given]
    tags = {pick.tag for pick in picks if pick is not None}
    if None in picks or len(tags) != 1:
        return None
    for i, pick in zip(given, picks, strict=True):
        if pick is None or axes[i] != pick.target:
            return None
    rest = (*axes[: given[0]], *axes[given[-1] + 1 :])
    if not all(is_free(dim) for dim in rest):
        return None
    first = indices[given[0]]
    assert first is not None
    (rows,) = inference.axes(first)
    return (*axes[: given[0]], rows, *axes[given[-1] + 1 :])


def _places_in_sorted(inference: Inference, node: Any) -> tuple[Dim, int] | None:
    """The dim and the sort of an index that says where in the sorted rows each row stands: a sort undone."""
    if keeps_numbers(node):
        return _places_in_sorted(inference, node.args[0])
    if is_call(node, aten.argsort):
        inner = row_index(inference, node.args[0])
        backwards = arguments(node).get("descending")
        return None if inner is None or backwards or _is_subset(inference, inner) else (inner.target, inner.tag)
    if not is_call(node, aten.index_put):
        return None
    named = arguments(node)
    indices = named["indices"]
    inner = row_index(inference, indices[0]) if len(indices) == 1 else None
    values = named["values"]
    counts = is_call(values, aten.arange) and len(values.args) == 1 and shape_of(values) == shape_of(node)
    if inner is None or named.get("accumulate") or not counts or _is_subset(inference, inner):
        return None
    return inner.target, inner.tag


def _is_subset(inference: Inference, index: RowIndex) -> bool:
    """Whether not every row was picked: then an inverse has holes."""
    pick = next(n for n, tag in inference.picks.items() if tag == index.tag)
    return not is_call(pick, aten.sort, aten.argsort)


def index_put(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    """The places of rows in a sort; any other write by index is refused."""
    back = _places_in_sorted(inference, node)
    if back is None:
        return _put_rows(inference, node, named["self"], named["indices"], named["values"])
    return (back[0],)


def index_add(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    """Adds picked rows to the rows of the tokens that they came from."""
    if named["dim"] not in (0, -len(shape_of(node))):
        raise MixesTokens("adds rows along a dim that is not the first")
    return _put_rows(inference, node, named["self"], [named["index"]], named["source"])


def _put_rows(inference: Inference, node: Node, base: Node, indices: list[Node | None], values: Node) -> Axes:
    axes, rows = inference.axes(base), inference.axes(values)
    pick = row_index(inference, indices[0]) if len(indices) == 1 else None
    same_rest = [d or e for d, e in zip(axes[1:], rows[1:], strict=False)] == list(rows[1:])
    at = rows[0] if rows else ()
    matches = pick is not None and len(at) == 1 and at[0].kind is Kind.PICKED and at[0].tag == pick.tag
    if pick is None or not matches or not same_rest or (kinds_in(axes[0]) - {Kind.ANY} and axes[0] != pick.target):
        raise MixesTokens("writes rows to tokens chosen by data")
    return (pick.target, *rows[1:])


def counted(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    """Counts over all tokens: of use as bounds of groups only, where they are recognised without their axes."""
    raise MixesTokens("counts over all tokens")


ROUTING_RULES: dict[str, AxisRule] = {rule.__name__: rule for rule in (nonzero, index_put, index_add, counted)}
