"""Axis rules of rows sorted by expert: one weight for each group of equal keys, wherever the groups end.

Rows of tokens that were sorted by their keys stand in groups of equal keys. An op that treats one group in its own way
treats each row by its own key, and so is token-wise, if its groups are those very ones: as many rows in the i-th as
there are keys of value i. Counts are known by how they are made.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from kvpass.fx_passes.graph import arguments, aten, expression, is_call, shape_of
from kvpass.fx_passes.op_facts.facts import is_item_of
from kvpass.fx_passes.token_axis.axes import Axes, Dim, Factor, Kind, MixesTokens, is_free, plain
from kvpass.fx_passes.token_axis.infer_axes import Inference, Part
from kvpass.fx_passes.token_axis.routing_rules import keeps_numbers, row_index


def grouped_product(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    """One matrix per group of rows: token-wise if the groups are those of the rows' own sorted keys."""
    rows, weight, ends = (n for n in node.all_input_nodes[:3])
    axes = inference.axes(rows)
    at = axes[0]
    sorted_rows = len(axes) == 2 and is_picked(at) and is_free(axes[1])
    if not sorted_rows or inference.is_data(weight) or _ends_of_groups(inference, ends) != at[0].tag:
        raise MixesTokens("multiplies groups of tokens whose bounds were not recognised")
    return (at, plain(shape_of(node)[-1]))


def is_picked(dim: Dim) -> bool:
    """Whether a dim counts rows that were picked or sorted, and nothing else."""
    return len(dim) == 1 and dim[0].kind is Kind.PICKED


def split_rows(inference: Inference, node: Node, dim: Dim) -> list[Dim]:
    """Dims of sorted rows split into their groups of equal keys, one part for each key."""
    sizes = arguments(node).get("split_sizes")
    counts = _listed(sizes) if isinstance(sizes, (list, tuple)) else None
    if counts is None or _sort_counted(inference, counts) != dim[0].tag:
        raise MixesTokens("splits groups of tokens whose bounds were not recognised")
    parts: list[Dim] = []
    for i, value in enumerate(node.meta["val"]):
        key = (dim[0].tag, i)
        if key not in inference.part_tags:
            tag = inference.fresh_tag()
            inference.part_tags[key] = tag
            inference.parts[tag] = Part(dim, i, len(node.meta["val"]))
        parts.append((Factor(Kind.PICKED, expression(value.shape[0]), inference.part_tags[key]),))
    return parts


def join_rows(inference: Inference, dims: list[Dim]) -> Dim | None:
    """The dim of all groups of one sort joined in their order; None for anything else."""
    if not dims or not all(is_picked(dim) for dim in dims):
        return None
    parts = [inference.parts.get(dim[0].tag) for dim in dims]
    first = parts[0]
    if first is None or len(parts) != first.count:
        return None
    whole = all(p is not None and p.of == first.of and p.index == i for i, p in enumerate(parts))
    return first.of if whole else None


def _listed(sizes: list[Any] | tuple[Any, ...]) -> Node | None:
    """The tensor whose entries, one after the other and all of them, are the given numbers."""
    source: Node | None = None
    for i, size in enumerate(sizes):
        if not is_call(size, aten.item, aten._local_scalar_dense):
            return None
        entry = size.args[0]
        if is_call(entry, aten.select) and entry.args[1:] == (0, i):
            tensor = entry.args[0]
        elif (
            is_item_of(entry.target)
            and entry.args[1] == i
            and is_call(entry.args[0], aten.unbind)
            and arguments(entry.args[0])["dim"] == 0
        ):
            tensor = entry.args[0].args[0]
        else:
            return None
        if source is not None and tensor is not source:
            return None
        source = tensor
    return source if source is not None and shape_of(source) == (len(sizes),) else None


def _ends_of_groups(inference: Inference, node: Node) -> int | None:
    """The sort whose groups of equal keys end where the values say: a cumulative sum of a histogram of the keys."""
    node = _uncast(node)
    counts = node.args[0] if is_call(node, aten.cumsum) else None
    return _sort_counted(inference, counts) if isinstance(counts, Node) else None


def _uncast(node: Node) -> Node:
    while keeps_numbers(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _sort_counted(inference: Inference, counts: Node) -> int | None:
    """The sort of which the i-th entry counts the keys that are i."""
    counts = _uncast(counts)
    named = arguments(counts)
    if is_call(counts, aten.histc, aten.bincount):
        if is_call(counts, aten.histc) and (named["min"] != 0 or named["max"] != named["bins"] - 1):
            return None
        if is_call(counts, aten.bincount) and named.get("weights") is not None:
            return None
        return _sort_of_keys(inference, _uncast(named["self"]))
    if not is_call(counts, aten.sum) or named.get("keepdim"):
        return None
    marks = _uncast(named["self"])
    rank = len(shape_of(marks))
    summed = sorted(d % rank for d in named.get("dim") or ())
    keys = _marked(marks) if summed == list(range(rank - 1)) else None
    return None if keys is None else _sort_of_keys(inference, keys)


def _marked(marks: Node) -> Node | None:
    """The keys of which a tensor has a 1 at each key, in a last dim of its own, and 0 elsewhere."""
    named = arguments(marks)
    if is_call(marks, aten.one_hot):
        keys = named["self"]
        return keys if isinstance(keys, Node) else None
    if not is_call(marks, aten.scatter) or named["dim"] not in (1, -1) or named.get("value") != 1:
        return None
    # entries of one row differ, so that none is marked twice over: those of topk do
    keys = named["index"]
    top: Any = keys.args[0] if is_item_of(keys.target) and keys.args[1] == 1 else None
    along = is_call(top, aten.topk) and arguments(top)["dim"] % len(shape_of(keys)) == len(shape_of(keys)) - 1
    empty = _uncast(named["self"])
    zeros = is_call(empty, aten.zeros, aten.zeros_like, aten.new_zeros) or (
        is_call(empty, aten.full, aten.full_like, aten.new_full) and arguments(empty)["fill_value"] == 0
    )
    return keys if along and zeros and len(shape_of(marks)) == 2 else None


def _flat(node: Node) -> Node:
    """The tensor that a node reshapes: it has the same entries."""
    while is_call(node, aten.reshape, aten.flatten) or keeps_numbers(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _sort_of_keys(inference: Inference, keys: Node) -> int | None:
    """The sort of which these are the keys, before or after it."""
    source = keys.args[0] if keys.args else None
    if is_item_of(keys.target) and is_call(source, aten.sort) and keys.args[1] == 0:
        descending = arguments(source).get("descending")  # type: ignore[arg-type]
        return None if descending else inference.picks.get(source)  # type: ignore[arg-type]
    for sort, tag in inference.picks.items():
        if is_call(sort, aten.sort, aten.argsort) and not arguments(sort).get("descending"):
            if _flat(sort.args[0]) is _flat(keys):  # type: ignore[arg-type]
                return tag
            taken = is_call(keys, aten.index) and keys.args[0] is sort.args[0]
            index = row_index(inference, keys.args[1][0]) if taken else None  # type: ignore[index]
            if index is not None and index.tag == tag:
                return tag
    return None
