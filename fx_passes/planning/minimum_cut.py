"""The narrowest cut: what must be remembered of a past token, by minimum cut.

Between the ops that compute something and an attention stand ops that only move entries: reshapes, permutations,
head broadcasts, concatenations, widening casts. A cut through this part of the graph, weighed in bytes per token, says
what to store. What the moves do is found by running them on numbered entries, so that no spelling of ``repeat_kv``
has to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import sympy
import torch
from torch import Tensor
from torch.fx import Node

from kvpass.fx_passes.evaluate import NUMBERED, evaluate_node
from kvpass.fx_passes.graph import arguments, aten, is_call, shape_of
from kvpass.fx_passes.op_facts.facts import is_item_of
from kvpass.fx_passes.op_facts.table import ops_that
from kvpass.fx_passes.shape_values import ShapeEvaluator
from kvpass.fx_passes.token_axis.axes import Kind
from kvpass.fx_passes.token_axis.infer_axes import Inference
from kvpass.fx_passes.token_axis.prove_token_axis import token_axes_of

MOVES = ops_that("numbered")
BATCH, LENGTH = 2, 3  # at which the moves are run
UNIT = 4096  # weight of one byte; what is below breaks ties


@dataclass(frozen=True)
class Cut:
    """What is stored for one attention, and how its keys and values follow from it.

    Attributes:
        nodes: the nodes of the cut; their entries of one token, one node after the other, are the token's row.
        offsets: where each node's entries start in the row.
        width: entries of the row.
        key_map: int64 ``[Hk, D]``: entry of the row for each entry of the attention's keys.
        value_map: int64 ``[Hk, Dv]``: the same for values.
    """

    nodes: tuple[Node, ...]
    offsets: tuple[int, ...]
    width: int
    key_map: Tensor
    value_map: Tensor


def is_move(node: Node) -> bool:
    """Whether a node only moves entries of its input."""
    if is_call(node, aten._to_copy):
        source = node.args[0]
        assert isinstance(source, Node)
        before, after = source.meta["val"].dtype, node.meta["val"].dtype
        return bool(before.is_floating_point and torch.promote_types(before, after) == after and before != after)
    return is_call(node, *MOVES) or is_item_of(node.target)


def narrowest_cut(inference: Inference, evaluator: ShapeEvaluator, key: Node, value: Node) -> Cut:
    """The cut of fewest bytes per token from which keys and values follow by moves alone.

    Args:
        inference: axes of the graph's nodes.
        evaluator: for indices that the moves read.
        key: keys of the attention ``[batch, Hk, length, D]``.
        value: values ``[batch, Hk, length, Dv]``.
    """
    chosen = minimum_cut(inference, key, value)
    cut = _trace(inference, evaluator, chosen, key, value)
    if cut is None:  # entries that come from no token, such as a constant part of the keys
        cut = _trace(inference, evaluator, (key, value) if key is not value else (key,), key, value)
    assert cut is not None
    return cut


def entries_per_token(inference: Inference, node: Node) -> int:
    """How many numbers a node holds for each token."""
    captured = inference.captured
    count = sympy.prod(list(shape_of(node))) / (captured.batch * captured.length)
    return int(count)


def offsets_of(inference: Inference, nodes: Sequence[Node]) -> tuple[tuple[int, ...], int]:
    """Where each node's entries start in a token's row, one node after the other, and the entries of the row."""
    widths = [entries_per_token(inference, node) for node in nodes]
    return tuple(sum(widths[:i]) for i in range(len(nodes))), sum(widths)


def minimum_cut(
    inference: Inference, key: Node, value: Node, passes_through: Callable[[Node], bool] = is_move
) -> tuple[Node, ...]:
    """Nodes of fewest bytes per token that all paths to the keys and values go through, in graph order.

    Args:
        inference: axes of the graph's nodes.
        key: where paths end.
        value: where paths end as well.
        passes_through: whether the inputs of a node may be stored instead of it.
    """
    network = nx.DiGraph()
    stack, seen = [(key, 0), (value, 0)], set()
    while stack:
        node, depth = stack.pop(0)
        if node in seen:
            continue
        seen.add(node)
        inputs = token_inputs(inference, node) if passes_through(node) else []
        if isinstance(node.meta["val"], torch.Tensor) and has_tokens(inference, node):
            size = entries_per_token(inference, node) * node.meta["val"].dtype.itemsize
            network.add_edge((node, "in"), (node, "out"), capacity=size * UNIT + 1 + min(depth, 1000))
        else:
            network.add_edge((node, "in"), (node, "out"))
        if not inputs:
            network.add_edge("source", (node, "in"))
        for source in inputs:
            network.add_edge((source, "out"), (node, "in"))
            stack.append((source, depth + 1))
    for node in {key, value}:
        network.add_edge((node, "out"), "sink")
    _, (reached, _) = nx.minimum_cut(network, "source", "sink")
    cut = [n for n in seen if (n, "in") in reached and (n, "out") not in reached]
    order = {node: i for i, node in enumerate(inference.captured.graph.nodes)}
    return tuple(sorted(cut, key=order.__getitem__))


def token_inputs(inference: Inference, node: Node) -> list[Node]:
    """Tensors among a node's inputs that depend on the tokens."""
    return [n for n in node.all_input_nodes if inference.is_data(n) and not _is_number(n)]


def _is_number(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float))


def has_tokens(inference: Inference, node: Node) -> bool:
    """Whether a node holds entries for every token of every sequence."""
    kinds = [f.kind for dim in token_axes_of(inference, node) for f in dim]
    return kinds.count(Kind.TOKEN) == 1 and kinds.count(Kind.BATCH) == 1


def _trace(
    inference: Inference, evaluator: ShapeEvaluator, nodes: Sequence[Node], key: Node, value: Node
) -> Cut | None:
    offsets, total = offsets_of(inference, nodes)
    env: dict[Node, Any] = {
        node: numbered(inference, evaluator, node, offset, total) for node, offset in zip(nodes, offsets, strict=True)
    }
    maps = [_row_map(run_moves(inference, evaluator, target, env), total) for target in (key, value)]
    if maps[0] is None or maps[1] is None:
        return None
    return Cut(tuple(nodes), offsets, total, maps[0], maps[1])


def numbered(inference: Inference, evaluator: ShapeEvaluator, node: Node, offset: int, total: int) -> Tensor:
    """The node's tensor with every entry replaced by its number: token times row width, plus place in the row."""
    axes = token_axes_of(inference, node)
    atoms = [f for dim in axes for f in dim]
    sizes = [evaluator.number(f.size, BATCH, LENGTH) for f in atoms]
    place, token = torch.zeros(sizes, dtype=torch.int64), torch.zeros(sizes, dtype=torch.int64)
    stride = 1
    for i in reversed(range(len(atoms))):
        along = torch.arange(sizes[i]).view([-1 if j == i else 1 for j in range(len(atoms))])
        if atoms[i].kind is Kind.BATCH:
            token = token + along * LENGTH
        elif atoms[i].kind is Kind.TOKEN:
            token = token + along
        else:
            place = place + along * stride
            stride *= sizes[i]
    shape = [evaluator.number(s, BATCH, LENGTH) for s in node.meta["val"].shape]
    return (token * total + offset + place).reshape(shape)


def run_moves(inference: Inference, evaluator: ShapeEvaluator, target: Node, env: dict[Node, Any]) -> Tensor:
    """What moves make of the numbers in ``env`` on their way to ``target``; entries of no token are -1."""
    pending = [target]
    while pending:
        node = pending[-1]
        if node in env:
            pending.pop()
            continue
        waiting = [n for n in token_inputs(inference, node) if n not in env]
        if waiting:
            pending.extend(waiting)
            continue
        env[node] = _run_move(inference, evaluator, node, env)
        pending.pop()
    result = env[target]
    assert isinstance(result, Tensor)
    return result


def _run_move(inference: Inference, evaluator: ShapeEvaluator, node: Node, env: dict[Node, Any]) -> Any:
    if is_call(node, aten._to_copy):
        return env[node.args[0]]  # type: ignore[index]
    indices = set()
    if is_call(node, aten.index_select, aten.index, aten.gather):
        named = arguments(node)
        given = named["indices"] if "indices" in named else [named["index"]]
        indices = {n for n in given if n is not None}

    if indices & env.keys():  # picked by data
        shape = [evaluator.number(s, BATCH, LENGTH) for s in node.meta["val"].shape]
        return torch.full(shape, -1, dtype=torch.int64)

    def other(n: Node) -> Any:
        if _is_number(n):
            return evaluator.number(n.meta["val"], BATCH, LENGTH)
        with evaluator.deciding("the order of heads" if n in indices else None):
            value = evaluator.evaluate(n, BATCH, LENGTH)
        return value if n in indices else torch.full(value.shape, -1, dtype=torch.int64)

    return evaluate_node(node, env, replace(NUMBERED, other=other))


def _row_map(numbers: Tensor, total: int) -> Tensor | None:
    """``[Hk, D]`` places in the row, or None where an entry is not one of the same token's row."""
    batch, _, length, _ = numbers.shape
    tokens = torch.arange(batch * length).view(batch, 1, length, 1)
    if (numbers < 0).any() or not torch.equal((numbers // total), tokens.expand_as(numbers)):
        return None
    places = numbers % total
    first = places[:1, :, :1]
    return places[0, :, 0].clone() if torch.equal(first.expand_as(places), places) else None
