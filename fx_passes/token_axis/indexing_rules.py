"""Axis rules of ops that pick entries by index."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from kvpass.fx_passes.graph import shape_of
from kvpass.fx_passes.shape_values import Dependence
from kvpass.fx_passes.token_axis.axes import Axes, Dim, MixesTokens, broadcast, is_free, merge_dims, plain
from kvpass.fx_passes.token_axis.infer_axes import AxisRule, Inference, checked
from kvpass.fx_passes.token_axis.routing_rules import take_rows


def is_table(inference: Inference, node: Any) -> bool:
    """Whether a tensor is a constant that can be looked up by rows."""
    return isinstance(node, Node) and inference.kinds[node] is Dependence.CONSTANT


def embedding(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    if not is_table(inference, named["weight"]):
        raise MixesTokens("looks up rows of a table that depends on the tokens")
    return (*inference.axes(named["indices"]), plain(shape_of(node)[-1]))


def index_select(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    axes = list(inference.axes(named["self"]))
    d = named["dim"] % len(axes)
    rows = take_rows(inference, named["self"], [*[None] * d, named["index"]], node)
    if rows is not None:
        return rows
    if is_table(inference, named["self"]):
        (axes[d],) = inference.axes(named["index"])
        return checked(axes)
    if not is_table(inference, named["index"]) or not is_free(axes[d]):
        raise MixesTokens("picks tokens by index")
    axes[d] = plain(shape_of(node)[d])
    return tuple(axes)


def index(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    """``x[i, j, ...]``: a constant table by any indices, or a tensor by constant ones along dims without tokens."""
    source, indices = named["self"], named["indices"]
    if any(n is not None and str(n.meta["val"].dtype) == "torch.bool" for n in indices):
        raise MixesTokens("selects entries by a mask: how many there are depends on data")
    given = [i for i, n in enumerate(indices) if n is not None]
    if given != list(range(given[0], given[-1] + 1)):
        raise MixesTokens("indexes dims that are not neighbours")
    axes = inference.axes(source)
    rows = take_rows(inference, source, indices, node)
    if rows is not None:
        return rows
    picked = [inference.axes(indices[i]) for i in given]
    rank = max(len(a) for a in picked)
    middle = broadcast(picked, rank)
    constant = all(is_table(inference, indices[i]) and is_free(axes[i]) for i in given)
    if not is_table(inference, source) and not constant:
        raise MixesTokens("picks entries along the token axis")
    return checked([*axes[: given[0]], *middle, *axes[given[-1] + 1 :]])


def gather(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    """Picks along one dim that holds no tokens; all other dims line up."""
    source, picked = inference.axes(named["self"]), inference.axes(named["index"])
    return _line_up([source, picked], picked, named["dim"] % max(len(picked), 1))


def scatter(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    """Writes along one dim that holds no tokens; all other dims line up."""
    operands = [inference.axes(named[k]) for k in ("self", "index", "src") if isinstance(named.get(k), Node)]
    return _line_up(operands, operands[0], named["dim"] % max(len(operands[0]), 1))


def _line_up(operands: list[Axes], result: Axes, d: int) -> Axes:
    if any(not is_free(axes[d]) for axes in operands):
        raise MixesTokens("picks or writes entries along the token axis")
    out: list[Dim] = []
    for i, dim in enumerate(result):
        out.append(dim if i == d else merge_dims([axes[i] for axes in operands]))
        if i != d and any(bool(axes[i]) != bool(out[i]) for axes in operands):
            raise MixesTokens("picks or writes entries of only some tokens")
    return checked(out)


INDEXING_RULES: dict[str, AxisRule] = {
    rule.__name__: rule for rule in (embedding, index_select, index, gather, scatter)
}
