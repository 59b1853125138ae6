"""``select-logits``: only the rows asked for go through what follows the last attention."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Node

from kvpass.fx_passes.graph import CapturedGraph, PassResult, aten, expression, shape_of, tensor_value
from kvpass.fx_passes.optimization.step_graph import StepGraph

PAGED = ("kvpass::paged_attention", "kvpass::latent_attention", "kvpass::write_cache")


@dataclass(frozen=True)
class SelectLogits:
    """Select rows at the earliest node through which everything after the last attention goes.

    Before: a paged step that computes logits for all T tokens.
    After: logits for the R rows of ``logits_index``; and the graph returns what each attention gave beside them, which
        the verification compares.
    Requires: a graph that is token-wise apart from its paged attentions: rows may be selected anywhere after them.
    Refuses: nothing.
    """

    name: str = "select-logits"

    def apply(self, step: StepGraph) -> PassResult:
        """Insert one selection."""
        select_logits(step.captured, step.step["logits_index"])
        step.end.args = ((step.captured.output, *step.results),)
        return PassResult(1)


def select_logits(captured: CapturedGraph, logits_index: Node) -> None:
    """Select rows at the earliest node through which everything after the last attention goes."""
    node = _narrow_waist(captured)
    dim = _token_dim(captured, node)
    users = list(node.users)
    with captured.graph.inserting_after(node):
        selected = captured.graph.call_function(aten.index_select.default, (node, dim, logits_index))
    with captured.fake_mode:
        value = node.meta["val"]
        selected.meta["val"] = value.index_select(dim, logits_index.meta["val"])
    for user in users:
        user.replace_input_with(node, selected)
    _resize(captured, selected, dim)


def _narrow_waist(captured: CapturedGraph) -> Node:
    """The earliest node after the last paged op that alone carries tokens to the logits."""
    order: list[Node] = list(captured.graph.nodes)
    place = {n: i for i, n in enumerate(order)}
    last = max((i for i, n in enumerate(order) if _schema(n) in PAGED), default=0)
    carriers = [n for n in order if _carries_tokens(n)]
    for node in carriers:
        if place[node] <= last or _token_dim(captured, node) < 0:
            continue
        here = place[node]
        crossing = [n for n in carriers if place[n] <= here and n is not node and any(place[u] > here for u in n.users)]
        if not crossing:
            return node
    return captured.output


def _schema(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(schema.name) if schema is not None else ""


def _carries_tokens(node: Node) -> bool:
    """Whether a tensor (or a tuple of them) has one row per token, and so is of another size once rows are selected."""
    if node.op in ("get_attr", "output") or _schema(node) in ("kvpass::write_cache", "aten::sym_size"):
        return False
    values = node.meta.get("val")
    tensors = values if isinstance(values, (tuple, list)) else [values]
    return any(bool(expression(s).free_symbols) for t in tensors if isinstance(t, torch.Tensor) for s in t.shape)


def _token_dim(captured: CapturedGraph, node: Node) -> int:
    """The dim that counts the step's tokens, or -1 when it is not one dim alone."""
    if tensor_value(node) is None:
        return -1
    found = [i for i, s in enumerate(shape_of(node)) if captured.length in s.free_symbols]
    if len(found) != 1:
        return -1
    size = shape_of(node)[found[0]]
    return found[0] if size in (captured.length, captured.length * captured.batch) else -1


def _resize(captured: CapturedGraph, selected: Node, dim: int) -> None:
    """Sizes after the selection count its rows: one sequence of R tokens."""
    order = list(captured.graph.nodes)
    after = set(order[order.index(selected) + 1 :])
    with captured.graph.inserting_after(selected):
        rows = captured.graph.call_function(aten.sym_size.int, (selected, dim))
    rows.meta["val"] = selected.meta["val"].shape[dim]
    replaced: dict[Node, Node | int] = {}

    def resized(size: Node) -> Node | int:
        if size not in replaced:
            replaced[size] = _resized(captured, size, rows)
        return replaced[size]

    for node in order:
        if node not in after or node is rows or isinstance(node.meta.get("val"), (torch.SymInt, int)):
            continue
        node.args = torch.fx.node.map_arg(node.args, lambda n: resized(n) if _is_size(n) else n)
        node.kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: resized(n) if _is_size(n) else n)


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _resized(captured: CapturedGraph, size: Node, rows: Node) -> Node | int:
    expr = size.meta["val"].node.expr
    if not expr.free_symbols & {captured.batch, captured.length}:
        return size
    coefficient, symbols = expr.as_coeff_Mul()
    powers = symbols.as_powers_dict()
    count = int(powers.get(captured.length, 0))
    assert count in (0, 1) and set(powers) <= {captured.batch, captured.length}, f"size {expr} after the last attention"
    if count == 0:
        return int(coefficient)
    if coefficient == 1:
        return rows
    with captured.graph.inserting_after(rows):
        product = captured.graph.call_function(operator.mul, (rows, int(coefficient)))
    product.meta["val"] = size.meta["val"]
    return product
