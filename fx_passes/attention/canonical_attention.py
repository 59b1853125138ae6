"""The canonical attention node, and how it is made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from kvpass.fx_passes.graph import CapturedGraph, aten, emit
from kvpass.fx_passes.token_axis.axes import Axes, Factor, Kind, MixesTokens

SPELLING = "kvpass_spelling"  # key in a site's meta: how the model spelled it


@dataclass(frozen=True)
class DenseInputs:
    """Operands of ``kvpass::dense_attention``, in canonical layout."""

    query: Node
    key: Node
    value: Node
    bias: Node | None
    scale: float
    softcap: float | None = None
    sinks: Node | None = None


def emit_dense(captured: CapturedGraph, inputs: DenseInputs, node: Node, spelling: str) -> Node:
    """Insert the canonical attention that takes the place of ``node``.

    Its result has the precision of the wider of query and value, as a product of weights and values has it; keys and
    values keep the dtypes that they have.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    wide = torch.promote_types(query.meta["val"].dtype, value.meta["val"].dtype)
    if query.meta["val"].dtype != wide:
        query = emit(captured, aten._to_copy.default, query, dtype=wide, like=node)
    target = torch.ops.kvpass.dense_attention.default
    rest = (inputs.bias, inputs.scale, inputs.softcap, inputs.sinks)
    dense = emit(captured, target, query, key, value, *rest, like=node)
    dense.meta[SPELLING] = spelling
    return dense


def attention_sites(captured: CapturedGraph) -> list[Node]:
    """All canonical attentions, in graph order."""
    target = torch.ops.kvpass.dense_attention.default
    return [node for node in captured.graph.nodes if node.op == "call_function" and node.target is target]


def factors_of(axes: Axes, kind: Kind) -> list[Factor]:
    """All factors of a kind, in dim order."""
    return [f for dim in axes for f in dim if f.kind is kind]


def one_factor(axes: Axes, kind: Kind) -> Factor:
    """The factor of a kind.

    Raises:
        MixesTokens: if there is not exactly one.
    """
    found = factors_of(axes, kind)
    if len(found) != 1:
        raise MixesTokens(f"has an operand without a {kind.value} axis")
    return found[0]
