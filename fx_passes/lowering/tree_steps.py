"""``with_tree_mask``: a paged step whose new tokens may be nodes of trees, for drafted tokens with alternatives."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from kvpass.fx_passes.graph import arguments, aten, describe, is_call
from kvpass.types import Refusal

ops = torch.ops.kvpass
# What a step says of the places of tokens; their positions in their sequences are an input by themselves.
PLACES = ("block_tables", "seq_lens", "query_start")


def with_tree_mask(module: GraphModule) -> GraphModule | Refusal:
    """The same step over the same tensors, with a tree mask.

    Before: the module of a :class:`~kvpass.fx_passes.lowering.insert_cache.PagedGraph`.
    After: one more input, bool ``[T, M]``, follows ``logits_index``: each attention shows a token its ancestors among
        the step's tokens, and counts windows, chunks and biases by depth. Attention over latents is a
        ``paged_attention`` of one head, which takes a mask.
    Requires: that the positions which the step is given are those of the depths.
    Refuses: where anything but these attentions asks where tokens stand: among a tree's nodes it would read the order
        in which they are computed.
    """
    graph = Graph()
    copies: dict[Node, Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    with graph.inserting_after(inputs["logits_index"]):
        mask = graph.placeholder("tree_mask")
    places = [inputs[name] for name in PLACES]
    places += [user for place in places for user in place.users if is_call(user, aten.select.int)]
    for node in dict.fromkeys(user for place in places for user in place.users if user not in places):
        if is_call(node, ops.latent_attention):
            node = read_values_from_keys(graph, node)
        if not is_call(node, ops.paged_attention):
            reason = "it asks for the places of tokens, which are not their positions where they are nodes of a tree"
            return Refusal(reason, describe(node), pass_name="with-tree-mask")
        node.update_kwarg("tree_mask", mask)
    graph.lint()
    return GraphModule(module, graph)


def read_values_from_keys(graph: Graph, node: Node) -> Node:
    """Replace an attention over latents by one whose values are its keys, cut to what is a value; gives it."""
    named: dict[str, Any] = arguments(node)
    width, form, cache = named.pop("value_dim"), named.pop("format"), named.pop("cache")
    caches = {"key_cache": cache, "value_cache": cache, "key_format": form, "value_format": form}
    with graph.inserting_before(node):
        paged = graph.call_function(ops.paged_attention.default, kwargs={**named, **caches})
        values = graph.call_function(aten.slice.Tensor, (paged, 2, 0, width))
    node.replace_all_uses_with(values)
    graph.erase_node(node)
    return paged
