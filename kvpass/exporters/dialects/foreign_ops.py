"""Ops that are neither ATen's nor kvpass's: known by what they mean, kept where they can be imported, or refused."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch.fx import Graph

from kvpass.exporters.dialects.contrib_paged import ONNX_CONTRIB_PAGED
from kvpass.exporters.dialects.contrib_rows import ONNX_CONTRIB
from kvpass.exporters.dialects.lowerings import Call, lowers
from kvpass.exporters.dialects.native_ops import NATIVE, as_it_is
from kvpass.exporters.dialects.onnx_paged import ONNX_PAGED
from kvpass.exporters.dialects.onnx_rows import ONNX_GROWING, ONNX_STATIC
from kvpass.exporters.dialects.plain_ops import PLAIN
from kvpass.exporters.dialects.tensorrt_rows import ONNX_TENSORRT

lowers("grouped_product", NATIVE)(as_it_is)


@lowers("grouped_product", PLAIN)
@lowers("grouped_product", ONNX_PAGED)
@lowers("grouped_product", ONNX_STATIC)
@lowers("grouped_product", ONNX_GROWING)
@lowers("grouped_product", ONNX_CONTRIB)
@lowers("grouped_product", ONNX_CONTRIB_PAGED)
@lowers("grouped_product", ONNX_TENSORRT)
def _grouped_product(call: Call) -> Tensor:
    """Rows ``[T, in]`` times the matrix of their group, of ``[G, in, out]``; groups end where ``offs [G]`` says.

    Each matrix is multiplied with all rows, so that no size depends on data.
    """
    rows, weights, ends, *_ = call.given.values()
    owner = (torch.arange(rows.shape[0], device=rows.device)[:, None] >= ends[None]).sum(-1)
    out: Tensor = rows.new_zeros(rows.shape[0], weights.shape[2])
    for group in range(weights.shape[0]):
        out = torch.where((owner == group)[:, None], rows @ weights[group], out)
    return out


def modules_of(graph: Graph) -> tuple[str, ...]:
    """The modules that register the foreign ops of a graph, of those whose module is known."""
    return tuple(sorted({OPDEFS[name]._init_fn.__module__ for name in _foreign(graph) if name in OPDEFS}))


def unknown_ops(graph: Graph) -> list[str]:
    """The foreign ops of a graph of which nobody knows what registers them."""
    return sorted(name for name in _foreign(graph) if name not in OPDEFS)


def _foreign(graph: Graph) -> set[str]:
    return {
        node.target._schema.name
        for node in graph.nodes
        if isinstance(node.target, OpOverload) and node.target.namespace not in ("aten", "kvpass")
    }
