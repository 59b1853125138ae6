"""``common-subexpressions``: what every layer computes again from shapes and constants is computed once."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.fx_passes.graph import CapturedGraph, PassResult, read_attribute, record_values, tensor_value
from kvpass.fx_passes.shape_values import Dependence, classify, is_random


@dataclass(frozen=True)
class CommonSubexpressions:
    """Merge equal nodes that depend on no token, so that the layers of a model share masks and positions.

    What is proven of a mask or a table of positions is then proven once, however many layers compute it for
    themselves, and computed once in a step.

    Before: layers with masks, positions and buffers of their own.
    After: one node for each value; buffers with equal entries are one.
    Requires: ``canonicalize``.
    Refuses: nothing.
    """

    name: str = "common-subexpressions"

    def apply(self, captured: CapturedGraph) -> PassResult:
        """Walk the graph once, in order."""
        kinds = captured.analysis(classify)
        first: dict[Hashable, Node] = {}
        buffers: dict[Hashable, list[Node]] = {}
        rewritten = 0
        for node in list(captured.graph.nodes):
            if node.op == "get_attr" and tensor_value(node) is None:  # a graph of its own, as torch.cond has them
                continue
            if node.op == "get_attr":
                same = _equal_buffer(captured, node, buffers)
            elif node.op != "call_function" or kinds[node] is Dependence.DATA or is_random(node):
                continue
            else:
                same = first.setdefault(_key(node), node)
            if same is not node:
                node.replace_all_uses_with(same)
                captured.graph.erase_node(node)
                rewritten += 1
        if rewritten:
            captured.tidy()
        return PassResult(rewritten)


def _key(node: Node) -> Hashable:
    return node.target, _frozen(node.args), _frozen(node.kwargs)


def _frozen(value: Any) -> Hashable:
    """An argument as something that can be hashed; numbers of different types differ."""
    if isinstance(value, (tuple, list)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _frozen(v)) for k, v in value.items()))
    return (type(value), repr(value)) if isinstance(value, float) else (type(value), value)


def _equal_buffer(captured: CapturedGraph, node: Node, known: dict[Hashable, list[Node]]) -> Node:
    """The first node that reads the same buffer, or one with the same entries; parameters are left alone."""
    value = read_attribute(captured.module, str(node.target))
    if isinstance(value, torch.nn.Parameter):
        return node
    alike = known.setdefault((value.shape, value.dtype, value.device), [])
    for other in alike:
        known_value = read_attribute(captured.module, str(other.target))
        if known_value is value:
            return other
        if _equal(known_value, value):
            record_values(captured, (other, node), "buffers that are held once")
            return other
    alike.append(node)
    return node


def _equal(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr() == b.data_ptr() and a.stride() == b.stride()) or torch.equal(a, b)
