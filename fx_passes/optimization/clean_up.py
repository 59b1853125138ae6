"""``clean-up``: what a paged step does not need to do at run time is taken out of its graph."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch.fx import Graph, Node

from kvpass.fx_passes.evaluate import Policy, evaluate_node
from kvpass.fx_passes.graph import (
    CapturedGraph,
    PassResult,
    aten,
    constants_of,
    expression,
    is_call,
    read_attribute,
    record_values,
    shape_of,
    tensor_value,
)
from kvpass.fx_passes.op_facts.table import ops_that
from kvpass.fx_passes.optimization.step_graph import StepGraph

LARGEST_CONSTANT = 1 << 16  # elements that a folded constant may have
VIEWS = ops_that("view")


@dataclass(frozen=True)
class CleanUp:
    """Fold constants and join moves of a paged step.

    Before: the graph that ``insert-cache`` leaves: the original's moves, and those around every paged op.
    After: the batch is 1 and no longer computed; a value that depends on buffers alone is a buffer; a reshape of a
        reshape, a permutation of a permutation and a permutation that only moves dims of size 1 before a reshape are
        one move or none.
    Requires: a paged graph, whose token ids are ``[1, T]``.
    Refuses: nothing. Parameters are never folded: a later change of the model's weights counts, as it did before.
    """

    name: str = "clean-up"

    def apply(self, step: StepGraph) -> PassResult:
        """Clean up once; what it removes is not counted."""
        clean_up(step.captured)
        return PassResult()


def clean_up(captured: CapturedGraph) -> None:
    """Fold constants and join moves of a paged step."""
    _one_batch(captured)
    _fold_constants(captured)
    _join_moves(captured)
    captured.tidy()


def count_nodes(graph: Graph) -> tuple[int, int]:
    """Calls in a graph, and those among them that launch a computation rather than look at its result differently."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    return len(calls), sum(1 for n in calls if n.target is not operator.getitem and _launches(n))


def _launches(node: Node) -> bool:
    return not is_call(node, *VIEWS) and not isinstance(node.meta.get("val"), (int, torch.SymInt))


def _one_batch(captured: CapturedGraph) -> None:
    sizes: dict[int, Node | int] = {0: 1}
    for node in list(captured.graph.nodes):
        if not is_call(node, aten.sym_size) or node.args[0] is not captured.input_ids:
            continue
        dim = node.args[1]
        assert isinstance(dim, int)
        known = sizes.setdefault(dim, node)
        if known is node:
            continue
        for user in list(node.users):
            _replace_input(user, node, known)
        captured.graph.erase_node(node)


def _replace_input(user: Node, old: Node, new: Node | int) -> None:
    """Node.replace_input_with, for a number as well."""

    def replaced(node: Node) -> Node | int:
        return new if node is old else node

    user.args = torch.fx.node.map_arg(user.args, replaced)
    user.kwargs = torch.fx.node.map_arg(user.kwargs, replaced)


def _fold_constants(captured: CapturedGraph) -> None:
    values: dict[Node, torch.Tensor] = {}
    folded = 0
    for node in list(captured.graph.nodes):
        if node.op == "get_attr":
            tensor = read_attribute(captured.module, str(node.target))
            if not isinstance(tensor, torch.nn.Parameter):
                values[node] = tensor
        elif _is_constant(node, values):
            with torch.no_grad():
                values[node] = evaluate_node(node, values, Policy())
    for node, value in values.items():
        if node.op == "get_attr" or all(user in values for user in node.users):
            continue
        record_values(captured, constants_of(node), "a constant that was folded")
        name = f"_folded_{folded}"
        folded += 1
        captured.module.register_buffer(name, value.contiguous(), persistent=False)
        with captured.graph.inserting_before(node):
            constant = captured.graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)


def _is_constant(node: Node, values: dict[Node, torch.Tensor]) -> bool:
    """Whether the node's value is that of a small pure function of constants."""
    tensor = tensor_value(node)
    if node.op != "call_function" or tensor is None or not all(n in values for n in node.all_input_nodes):
        return False
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    return all(isinstance(s, int) for s in tensor.shape) and tensor.numel() <= LARGEST_CONSTANT


def _join_moves(captured: CapturedGraph) -> None:
    for node in list(captured.graph.nodes):
        if is_call(node, aten.reshape):
            source = node.args[0]
            while _is_reshaped(captured, source):
                source = source.args[0]
            node.update_arg(0, source)
            if _sizes(captured, source) == _sizes(captured, node):
                node.replace_all_uses_with(source)
        elif (order := _permutation(node)) is not None:
            source = node.args[0]
            assert isinstance(source, Node)
            while (before := _permutation(source)) is not None:
                order = [before[i] for i in order]
                (source, *_) = source.args
                assert isinstance(source, Node)
            if order == sorted(order):
                node.replace_all_uses_with(source)
            elif source is not node.args[0]:
                with captured.graph.inserting_before(node):
                    joined = captured.graph.call_function(aten.permute.default, (source, order))
                joined.meta = dict(node.meta)
                node.replace_all_uses_with(joined)


def _is_reshaped(captured: CapturedGraph, node: object) -> bool:
    """Whether the elements of ``node`` stand in the order of its first argument."""
    if is_call(node, aten.reshape):
        return True
    order = _permutation(node)
    if order is None:
        return False
    assert isinstance(node, Node)
    sizes = _sizes(captured, node.args[0])
    kept = [i for i in order if sizes[i] != 1]
    return kept == sorted(kept)


def _permutation(node: object) -> list[int] | None:
    """The order of the dims of its argument, if the node is a permutation."""
    if not isinstance(node, Node) or not is_call(node, aten.transpose, aten.permute):
        return None
    rank = len(shape_of(node))
    if is_call(node, aten.permute):
        given: Sequence[int] = node.args[1]  # type: ignore[assignment]
        return [i % rank for i in given]
    first, second = (int(i) % rank for i in node.args[1:3])  # type: ignore[arg-type]
    order = list(range(rank))
    order[first], order[second] = second, first
    return order


def _sizes(captured: CapturedGraph, node: object) -> tuple[sympy.Expr, ...]:
    assert isinstance(node, Node)
    return tuple(_substituted(captured, node))


def _substituted(captured: CapturedGraph, node: Node) -> Iterator[sympy.Expr]:
    for size in shape_of(node):
        yield expression(size).subs({captured.batch: 1})
