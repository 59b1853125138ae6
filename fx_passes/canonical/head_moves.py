"""Heads picked out of scores, or split in groups, after they were multiplied: the same is done to queries and keys.

``softmax(q @ k^T)[:, ::2]`` is ``softmax(q[:, ::2] @ k[:, ::2]^T)``: a batched product, a softmax over another dim and
everything elementwise treat each head by itself. The move sinks by one op at a time, until it stands on tensors that
hold one row per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from kvpass.fx_passes.graph import (
    CapturedGraph,
    arguments,
    aten,
    emit,
    is_call,
    is_symbolic_scalar,
    shape_of,
    tensor_value,
)
from kvpass.fx_passes.op_facts.facts import OpKind
from kvpass.fx_passes.op_facts.table import facts_of

SOFTMAXES = (aten.softmax, aten._softmax, aten._safe_softmax)


@dataclass(frozen=True)
class _Move:
    """What is done along one dim of a tensor, and what along that dim where it has size 1."""

    whole: Callable[[Node, int], Node]
    single: Callable[[Node, int], Node]

    def on(self, operand: Node, dim: int) -> Node:
        """The operand, moved along a dim of its own; one that is broadcast along it stays as it is."""
        if dim < 0:
            return operand
        return (self.single if shape_of(operand)[dim] == 1 else self.whole)(operand, dim)


def pick_heads(captured: CapturedGraph, node: Node) -> Node | None:
    """A slice of scores along a dim that counts no tokens, brought before the op that made them."""
    named = arguments(node)
    source, rank = named["self"], len(shape_of(node))
    d = named["dim"] % rank

    def taken(operand: Node, dim: int) -> Node:
        return emit(captured, aten.slice.Tensor, operand, dim, named["start"], named["end"], named["step"], like=node)

    return _sink(captured, source, d, _Move(taken, lambda operand, dim: operand), node)


def pick_one_head(captured: CapturedGraph, node: Node) -> Node | None:
    """``scores.select(dim, i)`` as a slice of one, brought before the op that made them."""
    named = arguments(node)
    source = named["self"]
    d = named["dim"] % len(shape_of(source))
    return _part(captured, node, source, d, named["index"], 1, dropped=True)


def pick_group(captured: CapturedGraph, node: Node) -> Node | None:
    """One of the parts that scores are split into, as a slice."""
    parts, index = node.args
    if not is_call(parts, aten.split, aten.split_with_sizes, aten.unbind) or not isinstance(parts, Node):
        return None
    source, d = arguments(parts)["self"], arguments(parts)["dim"] % len(shape_of(arguments(parts)["self"]))
    assert isinstance(index, int)
    if is_call(parts, aten.unbind):
        return _part(captured, node, source, d, index, 1, dropped=True)
    sizes = [value.shape[d] for value in parts.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return None
    return _part(captured, node, source, d, sum(sizes[:index]), sizes[index], dropped=False)


def _part(
    captured: CapturedGraph, node: Node, source: Node, d: int, start: Any, count: int, dropped: bool
) -> Node | None:
    if not _may_sink(captured, source, d) or not isinstance(start, int):
        return None
    start %= int(shape_of(source)[d])
    taken = emit(captured, aten.slice.Tensor, source, d, start, start + count, 1, like=node)
    return emit(captured, aten.squeeze.dim, taken, d, like=node) if dropped else taken


def split_heads(captured: CapturedGraph, node: Node) -> Node | None:
    """A reshape of scores that splits one of their dims in two, brought before the op that made them."""
    source = node.args[0]
    assert isinstance(source, Node)
    old, new = shape_of(source), shape_of(node)
    product = _product_of_batches(node)
    if product is not None:  # of several dims of heads, a batch dim of their own each
        several = sum(bool(s.is_number and s != 1) for s in new[:-2]) > 1
        between = captured.batch in new and new.count(captured.length) >= 2
        if not (several and between):
            return None
        return emit(captured, aten.matmul.default, *_operands(captured, node, product), like=node)
    if len(new) != len(old) + 1:
        return None
    d = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), len(old))
    if d == len(old) or old[d + 1 :] != new[d + 2 :] or not (new[d].is_number and new[d + 1].is_number):
        return None
    sizes = [int(new[d]), int(new[d + 1])]

    def unflattened(operand: Node, dim: int) -> Node:
        shape: list[Any] = [_size(captured, operand, i, node) for i in range(len(shape_of(operand)))]
        return emit(captured, aten.reshape.default, operand, [*shape[:dim], *sizes, *shape[dim + 1 :]], like=node)

    def spread(operand: Node, dim: int) -> Node:
        return emit(captured, aten.unsqueeze.default, operand, dim, like=node)

    return _sink(captured, source, d, _Move(unflattened, spread), node)


def _size(captured: CapturedGraph, node: Node, dim: int, like: Node) -> Node | int:
    size = shape_of(node)[dim]
    return int(size) if size.is_number else emit(captured, aten.sym_size.int, node, dim, like=like)


def _may_sink(captured: CapturedGraph, source: Node, d: int) -> bool:
    """Whether a node holds scores of all sequences, dim d counts no tokens, and the op works on that dim as on a batch.

    Only there it is of use; it would be right for any tensor.
    """
    if tensor_value(source) is None or source.op != "call_function":
        return False
    shape = shape_of(source)
    if shape.count(captured.length) < 2 or captured.batch not in shape or not shape[d].is_number or shape[d] == 1:
        return False
    if is_call(source, *SOFTMAXES):
        return bool(arguments(source)["dim"] % len(shape) != d)
    if is_call(source, aten.matmul) or _product_of_batches(source) is not None:
        return d < len(shape) - 2
    facts = facts_of(source.target)
    pointwise = facts is not None and facts.kind is OpKind.POINTWISE
    return pointwise and not any(is_symbolic_scalar(n) for n in source.all_input_nodes)


def _product_of_batches(node: Node) -> Node | None:
    """The ``bmm`` of which a node is the result with its batch dim taken apart, as ``einsum`` leaves it."""
    inner: Any = node
    while is_call(inner, aten.reshape) or (is_call(inner, aten.permute) and _keeps_order(inner)):
        inner = inner.args[0]
    taken_apart = is_call(node, aten.reshape) and is_call(inner, aten.bmm)
    return inner if taken_apart and shape_of(node)[-2:] == shape_of(inner)[-2:] else None


def _operands(captured: CapturedGraph, taken_apart: Node, product: Node) -> list[Node]:
    """The operands of a ``bmm``, their batch dim taken apart as its result's is."""
    lead = arguments(taken_apart)["shape"][:-2]
    operands: list[Node] = []
    for operand in product.args:
        assert isinstance(operand, Node)
        rows = [_size(captured, operand, i, taken_apart) for i in (1, 2)]
        operands.append(emit(captured, aten.reshape.default, operand, [*lead, *rows], like=taken_apart))
    return operands


def _keeps_order(node: Node) -> bool:
    """Whether a permutation moves dims of size 1 alone."""
    named = arguments(node)
    shape = shape_of(named["self"])
    kept = [d % len(shape) for d in named["dims"] if shape[d] != 1]
    return kept == sorted(kept)


def _sink(captured: CapturedGraph, source: Node, d: int, move: _Move, node: Node) -> Node | None:
    """The op of ``source`` on operands that were moved instead of its result."""
    if not _may_sink(captured, source, d):
        return None
    rank = len(shape_of(source))
    target: Any = source.target
    if is_call(source, *SOFTMAXES):
        dim = arguments(source)["dim"] % rank
        rest = (dim - rank if dim > d else dim, *source.args[2:])
        return emit(captured, target, move.on(arguments(source)["self"], d), *rest, like=node, **source.kwargs)
    product = _product_of_batches(source)
    if product is not None:
        operands = (move.on(operand, d) for operand in _operands(captured, source, product))
        return emit(captured, aten.matmul.default, *operands, like=node)

    def moved(operand: Node) -> Node:
        return move.on(operand, d - rank + len(shape_of(operand))) if tensor_value(operand) is not None else operand

    args, kwargs = torch.fx.node.map_arg((source.args, dict(source.kwargs)), moved)
    return emit(captured, target, *args, like=node, **kwargs)
