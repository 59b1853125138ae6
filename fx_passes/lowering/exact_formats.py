"""``with_exact_formats``: a graph with quantised caches as if they were exact, to tell rewrite from rounding."""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule

from kvpass.fx_passes.graph import copy_graph, is_call
from kvpass.fx_passes.lowering.insert_cache import PagedGraph
from kvpass.types import CachePlan

ops = torch.ops.kvpass
FORMAT_ARGUMENTS = ("key_format", "value_format", "format")


def with_exact_formats(paged: PagedGraph, plan: CachePlan) -> PagedGraph:
    """The same graph over the same tensors, for caches in the exact formats of ``plan``.

    What a format puts around the ops stays, rotations and scales; only the rounding is gone.
    """
    module, observed = (_without_formats(paged.module, whole.graph) for whole in (paged.module, paged.observed))
    return PagedGraph(module, plan, observed, paged.site_names)


def _without_formats(module: GraphModule, graph: Graph) -> GraphModule:
    copied = copy_graph(graph, module)
    for node in copied.graph.nodes:
        if is_call(node, ops.write_cache, ops.norm_rotary_write, ops.paged_attention, ops.latent_attention):
            node.kwargs = {k: v for k, v in node.kwargs.items() if k not in FORMAT_ARGUMENTS}
    copied.recompile()
    return copied
