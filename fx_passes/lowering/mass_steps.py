"""``with_mass``: a paged step that also says how much attention each block has received."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node

from kvpass.fx_passes.graph import arguments, aten, is_call
from kvpass.fx_passes.lowering.tree_steps import read_values_from_keys

ops = torch.ops.kvpass


def with_mass(module: GraphModule, block_size: int) -> GraphModule:
    """The same step over the same tensors, that gives the attention mass besides.

    Before: the module of a :class:`~kvpass.fx_passes.lowering.insert_cache.PagedGraph`.
    After: the output is a pair: what it was, and float32 ``[N, W]``: the weights after the softmax that the tokens of
        each block table's entry received in this step, summed over tokens, query heads and attentions.
    Requires: block tables of one meaning: those of all groups name the same tokens.
    Refuses: nothing.
    """
    graph = Graph()
    result = graph.graph_copy(module.graph, {})
    for node in [node for node in graph.nodes if is_call(node, ops.latent_attention)]:
        read_values_from_keys(graph, node)
    masses: list[Node] = []
    last: Node | None = None
    for node in [node for node in graph.nodes if is_call(node, ops.paged_attention)]:
        with graph.inserting_before(node):
            named = {**arguments(node), "mass": True}
            both = graph.call_function(ops.paged_attention_stats.default, kwargs=named)
            output = graph.call_function(operator.getitem, (both, 0))
            mass = graph.call_function(operator.getitem, (both, 2))
            masses.append(graph.call_function(aten.sum.dim_IntList, (mass, [1])))
        node.replace_all_uses_with(output)
        graph.erase_node(node)
    for mass in masses:
        last = mass if last is None else graph.call_function(aten.add.Tensor, (last, mass))
    by_block = graph.call_function(aten.unflatten.int, (last, 1, [-1, block_size]))
    graph.output((result, graph.call_function(aten.sum.dim_IntList, (by_block, [2]))))
    graph.lint()
    return GraphModule(module, graph)
