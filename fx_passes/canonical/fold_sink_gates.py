"""``fold-sink-gates``: a gate by the log-sum-exp of the scores is a sink in the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from kvpass.fx_passes.graph import (
    FULL,
    CapturedGraph,
    PassResult,
    arguments,
    aten,
    emit,
    is_call,
    shape_of,
    tensor_value,
)

SOFTMAXES = (aten.softmax, aten._softmax, aten._safe_softmax)


@dataclass(frozen=True)
class Gate:
    """``sigmoid(logsumexp(scores) - sink)``.

    Attributes:
        scores: the scores that are summed over the keys, before casts.
        sink: a tensor or number that broadcasts against the log-sum-exp.
        keepdim: the log-sum-exp keeps the dim of the keys as 1, and the sink has it too.
    """

    scores: Node
    sink: Node | float
    keepdim: bool


@dataclass(frozen=True)
class FoldSinkGates:
    """Put a sink that is written as a gate after the attention into its softmax.

    With ``l = logsumexp(s)``, ``softmax(s) * sigmoid(l - sink)`` is ``exp(s) / (sum(exp(s)) + exp(sink))``: the softmax
    with one more column, which is cut off again.

    Before: ``softmax(s) @ v * sigmoid(logsumexp(s) - sink)``, or the gate on the weights, with the keys in any dim; the
        gate may also be written with ``exp``, or as ``exp(l - logaddexp(l, sink))``.
    After: ``softmax(cat(sink, s))[1:] @ v``, which ``find-attention`` reads.
    Requires: ``canonicalize``.
    Refuses: nothing; a gate that is none of these stays as it is.
    """

    name: str = "fold-sink-gates"

    def apply(self, captured: CapturedGraph) -> PassResult:
        """Rewrite every such product."""
        rewritten = 0
        for node in list(captured.graph.nodes):
            replacement = _folded(captured, node) if is_call(node, aten.mul) else None
            if replacement is not None:
                node.replace_all_uses_with(replacement)
                captured.graph.erase_node(node)
                rewritten += 1
        if rewritten:
            captured.tidy()
        return PassResult(rewritten)


def _folded(captured: CapturedGraph, node: Node) -> Node | None:
    for out, factor in (node.args[:2], node.args[1::-1]):
        if not isinstance(out, Node) or not isinstance(factor, Node):
            continue
        if tensor_value(out) is None or tensor_value(factor) is None or shape_of(out) != shape_of(node):
            continue
        product = _uncast(out) if is_call(_uncast(out), aten.matmul, aten.bmm) else None
        weights = out if product is None else product.args[0]
        softmax = _uncast(weights)
        if not is_call(softmax, *SOFTMAXES):
            continue
        keys = _from_end(arguments(softmax)["dim"], softmax)
        gate = read_gate(factor, keys) if product is None or keys == -1 else None
        if gate is None or _uncast(softmax.args[0]) is not gate.scores:
            continue
        with captured.graph.inserting_before(node):
            joined = _softmax_with_sink(captured, softmax, keys, gate, node)
            current = _cast(captured, joined, weights, node)
            if product is not None:
                current = emit(captured, product.target, current, product.args[1], like=node)
            return _cast(captured, current, node, node)
    return None


def _from_end(dim: int, node: Node) -> int:
    """A dim counted from the end: -1 is the last."""
    rank = len(shape_of(node))
    return dim % rank - rank


def _uncast(node: Any) -> Any:
    while is_call(node, aten._to_copy):
        node = node.args[0]
    return node


def _cast(captured: CapturedGraph, node: Node, to: Any, like: Node) -> Node:
    dtype = to.meta["val"].dtype
    return (
        node if node.meta["val"].dtype == dtype else emit(captured, aten._to_copy.default, node, dtype=dtype, like=like)
    )


def _softmax_with_sink(captured: CapturedGraph, softmax: Node, keys: int, gate: Gate, like: Node) -> Node:
    scores = softmax.args[0]
    assert isinstance(scores, Node)
    dtype, rank = scores.meta["val"].dtype, len(shape_of(scores))
    sizes = [
        1 if d == keys else emit(captured, aten.sym_size.int, scores, rank + d, like=like) for d in range(-rank, 0)
    ]
    if isinstance(gate.sink, Node):
        sink = gate.sink
        if not gate.keepdim and len(shape_of(sink)) >= -keys:
            sink = emit(captured, aten.unsqueeze.default, sink, keys, like=like)
        sink = _cast(captured, sink, scores, like)
    else:
        device = scores.meta["val"].device
        sink = emit(captured, aten.full.default, [1], gate.sink, dtype=dtype, device=device, like=like)
    column = emit(captured, aten.expand.default, sink, sizes, like=like)
    joined = emit(captured, aten.cat.default, [column, scores], keys, like=like)
    weights = emit(captured, softmax.target, joined, *softmax.args[1:], like=like, **softmax.kwargs)
    return emit(captured, aten.slice.Tensor, weights, keys, 1, FULL, like=like)


def read_gate(node: Node, keys: int) -> Gate | None:
    """The gate of a product with scores, or with ``[..., Sq, width]``: the dim of the keys, from the end, is 1."""
    rank = len(shape_of(node))
    if rank < -keys - 1 or (rank >= -keys and shape_of(node)[keys] != 1):
        return None
    current = _uncast(node)
    added = is_call(current, aten.unsqueeze) and _from_end(current.args[1], current) == keys
    gate = _read_value(_uncast(current.args[0]) if added else current, keys)
    broadcast = rank == -keys - 1  # the keys come first, and the gate does without
    return gate if gate is not None and gate.keepdim is not (added or broadcast) else None


def _read_value(node: Any, keys: int) -> Gate | None:
    """``sigmoid(l - sink)`` in its spellings."""
    if is_call(node, aten.sigmoid):
        return _read_difference(node.args[0], 1, keys)
    if is_call(node, aten.exp):
        return _read_exp(_uncast(node.args[0]), keys)
    bottom: Any = node.args[0] if is_call(node, aten.reciprocal) else None
    if is_call(node, aten.div) and node.args[0] == 1:
        bottom = node.args[1]
    if not is_call(bottom, aten.add) or arguments(bottom)["alpha"] != 1:
        return None
    for one, other in (bottom.args[:2], bottom.args[1::-1]):
        if one == 1 and is_call(other, aten.exp):
            return _read_difference(other.args[0], -1, keys)
    return None


def _read_difference(node: Any, sign: int, keys: int) -> Gate | None:
    """``l - sink`` for a sign of 1, ``sink - l`` for -1."""
    node = _uncast(node)
    if is_call(node, aten.neg):
        return _read_difference(node.args[0], -sign, keys)
    if not is_call(node, aten.sub) or arguments(node)["alpha"] != 1:
        return None
    total, sink = node.args[:2] if sign == 1 else node.args[1::-1]
    return _read_pair(total, sink, node, keys)


def _read_exp(node: Any, keys: int) -> Gate | None:
    """``l - logaddexp(l, sink)``."""
    if not is_call(node, aten.sub) or arguments(node)["alpha"] != 1 or not is_call(node.args[1], aten.logaddexp):
        return None
    total = node.args[1]
    for one, other in (total.args[:2], total.args[1::-1]):
        if _same_sum(one, node.args[0]):
            return _read_pair(one, other, node, keys)
    return None


def _same_sum(a: Any, b: Any) -> bool:
    """Whether two nodes are the same log-sum-exp, if computed twice."""
    return a is b or (is_call(a, aten.logsumexp) and is_call(b, aten.logsumexp) and arguments(a) == arguments(b))


def _read_pair(total: Any, sink: Any, node: Node, keys: int) -> Gate | None:
    total = _uncast(total)
    if not is_call(total, aten.logsumexp) or shape_of(node) != shape_of(total):
        return None
    named = arguments(total)
    scores, keepdim = named["self"], bool(named["keepdim"])
    if [_from_end(d, scores) for d in named["dim"]] != [keys]:
        return None
    if not isinstance(sink, Node):
        return Gate(_uncast(scores), float(sink), keepdim)
    rank = len(shape_of(sink))
    if keepdim and rank >= -keys and shape_of(sink)[keys] != 1:
        return None
    return Gate(_uncast(scores), sink, keepdim)
