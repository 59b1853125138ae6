"""Spellings of a softmax: by ``exp`` and its sum, by log-sum-exp, masked after the ``exp``, with sinks in the sum."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from kvpass.fx_passes.graph import FULL, CapturedGraph, arguments, aten, emit, is_call, shape_of, tensor_value
from kvpass.fx_passes.op_facts.facts import is_item_of
from kvpass.fx_passes.shape_values import Dependence, classify

ROUNDINGS = 16  # what is added to a sum of at least 1, in units of its rounding, and is left out


@dataclass(frozen=True)
class _Weights:
    """Weights that are not normalised: ``exp(logits)``, or a softmax of them, times ``gates``.

    Attributes:
        node: where they stand in the graph.
        logits: what is exponentiated.
        gates: tensors that multiply the weights; the softmax sees their logarithm added to the logits.
        dim: of the softmax, counted from 0; None for an ``exp``.
    """

    node: Node
    logits: Node
    gates: tuple[Node, ...] = ()
    dim: int | None = None


def by_division(captured: CapturedGraph, node: Node) -> Node | None:
    """``exp(x) / exp(x).sum(d, keepdim=True)`` is ``softmax(x, d)``."""
    return _normalised(captured, node, node.args[0], node.args[1])


def divided_after_values(captured: CapturedGraph, node: Node) -> Node | None:
    """``(exp(x) @ v) / exp(x).sum(-1, keepdim=True)`` is ``softmax(x, -1) @ v``."""
    product, total = node.args[0], node.args[1]
    if not is_call(product, aten.matmul, aten.bmm) or not isinstance(product, Node):
        return None
    weights = product.args[0]
    if not is_call(weights, aten.exp) or not isinstance(weights, Node):
        return None
    dim = _summed_dim(weights, total)
    rank = len(shape_of(weights))
    if dim is None or dim % rank != rank - 1 or len(shape_of(product)) != rank:
        return None
    softmax = emit(captured, aten.softmax.int, weights.args[0], dim, like=node)
    assert callable(product.target)
    return emit(captured, product.target, softmax, *product.args[1:], like=node)


def in_base_two(captured: CapturedGraph, node: Node) -> Node | None:
    """``exp2(x)`` is ``exp(x * log(2))``; what positions are computed with is left to the last bit as it is."""
    if classify(captured)[node] is not Dependence.DATA:
        return None
    scaled = emit(captured, aten.mul.Tensor, node.args[0], math.log(2.0), like=node)
    return emit(captured, aten.exp.default, scaled, like=node)


def by_reciprocal(captured: CapturedGraph, node: Node) -> Node | None:
    """``exp(x) * (1 / exp(x).sum(d, keepdim=True))`` is ``softmax(x, d)``."""
    for top, bottom in (node.args[:2], node.args[1::-1]):
        if is_call(bottom, aten.reciprocal) and isinstance(bottom, Node):
            return _normalised(captured, node, top, bottom.args[0])
    return None


def _normalised(captured: CapturedGraph, node: Node, top: object, bottom: object) -> Node | None:
    weights = _weights(captured, top, node)
    if weights is None or not _may_be_gated(captured, weights):
        return None
    dim = _summed_dim(weights.node, bottom)
    if dim is not None and weights.dim in (None, dim % len(shape_of(weights.node))):
        return emit(captured, aten.softmax.int, _logits(captured, weights, node), dim, like=node)
    if is_call(bottom, aten.clamp, aten.clamp_min) and isinstance(bottom, Node):
        return _above(captured, node, weights, bottom)
    if is_call(bottom, aten.add) and isinstance(bottom, Node) and arguments(bottom)["alpha"] == 1:
        for total, extra in (bottom.args[:2], bottom.args[1::-1]):
            dim = _summed_dim(weights.node, total)
            if dim is not None:
                return _with_extra(captured, node, weights, dim, extra)
    return None


def _weights(captured: CapturedGraph, top: object, node: Node) -> _Weights | None:
    """What a numerator exponentiates, and what it multiplies that with."""
    if not isinstance(top, Node):
        return None
    if is_call(top, aten.exp, aten.softmax):
        source = top.args[0]
        dim = _dim_of(top) if is_call(top, aten.softmax) else None
        return _Weights(top, source, dim=dim) if isinstance(source, Node) else None
    if is_call(top, aten.mul):
        for inner, gate in (top.args[:2], top.args[1::-1]):
            found = _weights(captured, inner, node) if is_call(inner, aten.exp, aten.softmax, aten.mul) else None
            if found is not None and isinstance(gate, Node) and tensor_value(gate) is not None:
                return replace(found, node=top, gates=(*found.gates, gate))
    kept = _kept_where(captured, top, node)
    if kept is not None:
        found = _weights(captured, kept[0], node)
        return None if found is None else replace(found, node=top, gates=(*found.gates, kept[1]))
    return None


def _may_be_gated(captured: CapturedGraph, weights: _Weights) -> bool:
    """Whether a logarithm of the gates is safe.

    That of a negative gate is NaN, which the reader of masks refuses. So the gates must come to it: the logits are
    scores of tokens against tokens, and the gates depend on shapes only.
    """
    if not weights.gates:
        return True
    kinds = classify(captured)
    of_tokens = sum(size == captured.length for size in shape_of(weights.logits)) >= 2
    return of_tokens and all(kinds.get(gate) is not Dependence.DATA for gate in weights.gates)


def _kept_where(captured: CapturedGraph, node: Node, like: Node) -> tuple[Node, Node] | None:
    """A tensor and where it is kept, of ``masked_fill(x, m, 0)`` and ``where(m, x, 0)``."""
    named = arguments(node)
    if is_call(node, aten.masked_fill) and named["value"] == 0:
        source = named["self"]
        if is_call(source, aten.exp, aten.softmax):
            return source, emit(captured, aten.logical_not.default, named["mask"], like=like)
    if is_call(node, aten.where) and len(node.args) == 3 and named["other"] == 0:
        source = named["self"]
        if is_call(source, aten.exp, aten.softmax):
            return source, named["condition"]
    return None


def _logits(captured: CapturedGraph, weights: _Weights, node: Node) -> Node:
    """The logits of which the weights, gates included, are the exponential."""
    logits = weights.logits
    value = tensor_value(logits)
    assert value is not None
    for gate in weights.gates:
        held = gate if gate.meta["val"].is_floating_point() else _cast(captured, gate, value.dtype, node)
        logits = emit(captured, aten.add.Tensor, logits, emit(captured, aten.log.default, held, like=node), like=node)
    return logits


def _cast(captured: CapturedGraph, node: Node, dtype: object, like: Node) -> Node:
    return emit(captured, aten._to_copy.default, node, dtype=dtype, like=like)


def _summed_dim(top: Node, total: object) -> int | None:
    """The dim over which ``total`` sums ``top``, kept as a dim of size 1."""
    if is_call(total, aten.unsqueeze) and isinstance(total, Node) and is_call(total.args[0], aten.sum):
        inner, at = total.args[0], total.args[1]
        assert isinstance(inner, Node) and isinstance(at, int)
        rank = len(shape_of(top))
        dims = arguments(inner).get("dim")
        single = inner.args[0] is top and not arguments(inner).get("keepdim")
        return (
            at % rank
            if single and isinstance(dims, (list, tuple)) and [d % rank for d in dims] == [at % rank]
            else None
        )
    if not is_call(total, aten.sum) or not isinstance(total, Node) or total.args[0] is not top:
        return None
    named = arguments(total)
    dims = named.get("dim")
    if isinstance(dims, (list, tuple)) and len(dims) == 1 and named.get("keepdim"):
        return int(dims[0])
    return None


def _with_extra(captured: CapturedGraph, node: Node, weights: _Weights, dim: int, extra: object) -> Node | None:
    """Weights over their sum and something more: a softmax with one more logit, whose weight is dropped."""
    if not is_call(weights.node, aten.exp):
        return None
    logits = weights.logits
    shift = _row_shift(logits, dim)
    sink: object
    if isinstance(extra, (int, float)):
        if shift is not None:
            largest = _is_largest(shift, logits.args[0], dim)
            little = 0 <= extra <= ROUNDINGS * torch.finfo(node.meta["val"].dtype).eps
            return emit(captured, aten.softmax.int, logits, dim, like=node) if largest and little else None
        if extra <= 0:
            return None
        sink = math.log(extra)
    elif is_call(extra, aten.exp) and isinstance(extra, Node):
        sink = extra.args[0]
        if isinstance(shift, Node) and is_call(sink, aten.neg) and isinstance(sink, Node) and sink.args[0] is shift:
            sink, logits = 0.0, logits.args[0]  # type: ignore[assignment]
        elif isinstance(shift, Node) and is_call(sink, aten.sub) and isinstance(sink, Node):
            same = sink.args[1] is shift and arguments(sink)["alpha"] == 1
            sink, logits = (sink.args[0], logits.args[0]) if same else (sink, logits)  # type: ignore[assignment]
    else:
        return None
    return _softmax_with_sink(captured, node, logits, dim, sink)


def _above(captured: CapturedGraph, node: Node, weights: _Weights, bottom: Node) -> Node | None:
    """Weights over their sum kept above a number of at most 1, which the sum of ``exp(x - largest)`` is anyway."""
    named = arguments(bottom)
    dim = _summed_dim(weights.node, named["self"])
    bound = named["min"]
    if dim is None or not is_call(weights.node, aten.exp) or named.get("max") is not None:
        return None
    shift = _row_shift(weights.logits, dim)
    if not isinstance(bound, (int, float)) or bound > 1 or shift is None:
        return None
    if not _is_largest(shift, weights.logits.args[0], dim):
        return None
    return emit(captured, aten.softmax.int, weights.logits, dim, like=node)


def _is_largest(shift: Node, of: object, dim: int) -> bool:
    """Whether a node holds the largest entries along a dim: then ``exp(x - largest)`` sums to 1 or more."""
    rank = len(shape_of(shift))
    if is_item_of(shift.target) and shift.args[1] == 0:
        shift = shift.args[0]  # type: ignore[assignment]
    if not is_call(shift, aten.amax, aten.max) or "dim" not in arguments(shift):
        return False
    named = arguments(shift)
    dims = named["dim"] if isinstance(named["dim"], (list, tuple)) else [named["dim"]]
    return named["self"] is of and bool(named["keepdim"]) and [d % rank for d in dims] == [dim % rank]


def _row_shift(logits: Node, dim: int) -> Node | None:
    """What is subtracted from logits, where it is one number along the dim."""
    if not is_call(logits, aten.sub) or arguments(logits)["alpha"] != 1:
        return None
    shift = logits.args[1]
    rank = len(shape_of(logits))
    row = isinstance(shift, Node) and len(shape_of(shift)) == rank and shape_of(shift)[dim % rank] == 1
    return shift if row else None  # type: ignore[return-value]


def _softmax_with_sink(captured: CapturedGraph, node: Node, logits: Node, dim: int, sink: object) -> Node | None:
    """``softmax(cat([sink, logits]))`` without its first column."""
    d = dim % len(shape_of(logits))
    column = emit(captured, aten.slice.Tensor, logits, d, 0, 1, like=node)
    filled = emit(captured, aten.zeros_like.default, column, like=node)
    if sink != 0.0:
        filled = emit(captured, aten.add.Tensor, filled, sink, like=node)
        if shape_of(filled) != shape_of(column) or filled.meta["val"].dtype != column.meta["val"].dtype:
            return None
    joined = emit(captured, aten.cat.default, [filled, logits], d, like=node)
    weights = emit(captured, aten.softmax.int, joined, d, like=node)
    return emit(captured, aten.slice.Tensor, weights, d, 1, FULL, like=node)


def _dim_of(softmax: Node) -> int:
    return int(arguments(softmax)["dim"]) % len(shape_of(softmax))


def _logsumexp_dim(total: object, of: object) -> int | None:
    """The dim of ``logsumexp(of, d, keepdim=True)``, counted from 0."""
    if not is_call(total, aten.logsumexp) or not isinstance(total, Node) or total.args[0] is not of:
        return None
    named = arguments(total)
    return int(named["dim"][0]) % len(shape_of(total)) if named["keepdim"] and len(named["dim"]) == 1 else None


def by_exponential(captured: CapturedGraph, node: Node) -> Node | None:
    """``exp(log_softmax(x))`` and ``exp(x - logsumexp(x))`` are ``softmax(x)``."""
    inner = node.args[0]
    if is_call(inner, aten.log_softmax, aten._log_softmax):
        assert isinstance(inner, Node)
        return emit(captured, aten.softmax.int, inner.args[0], inner.args[1], like=node)
    if is_call(inner, aten.sub):
        assert isinstance(inner, Node)
        dim = _logsumexp_dim(inner.args[1], inner.args[0])
        if dim is not None and arguments(inner)["alpha"] == 1:
            return emit(captured, aten.softmax.int, inner.args[0], dim, like=node)
    return None


def log_of_sum(captured: CapturedGraph, node: Node) -> Node | None:
    """``log(exp(x).sum(d, keepdim=True))`` is ``logsumexp(x, d, keepdim=True)``."""
    total = node.args[0]
    inner = total.args[0] if is_call(total, aten.sum) and isinstance(total, Node) else None
    if not is_call(inner, aten.exp) or not isinstance(inner, Node):
        return None
    dim = _summed_dim(inner, total)
    return None if dim is None else emit(captured, aten.logsumexp.default, inner.args[0], [dim], True, like=node)


def shifted_log_of_sum(captured: CapturedGraph, node: Node) -> Node | None:
    """``m + logsumexp(x - m)`` is ``logsumexp(x)``, for an m that is one number along the summed dim."""
    if arguments(node).get("alpha", 1) != 1:
        return None
    for shift, total in (node.args[:2], node.args[1::-1]):
        inner = total.args[0] if is_call(total, aten.logsumexp) and isinstance(total, Node) else None
        if not is_call(inner, aten.sub) or not isinstance(inner, Node) or inner.args[1] is not shift:
            continue
        dim = _logsumexp_dim(total, inner)
        row = isinstance(shift, Node) and dim is not None and shape_of(shift) == shape_of(total)  # type: ignore[arg-type]
        if row and arguments(inner)["alpha"] == 1:
            return emit(captured, aten.logsumexp.default, inner.args[0], [dim], True, like=node)
    return None


def product_by_sum(captured: CapturedGraph, node: Node) -> Node | None:
    """``(a[..., i, 1, d] * b[..., 1, j, d]).sum(d)`` is a matrix product, where i or j counts tokens twice over.

    Any order of the dims is read: the summed dim is the one both operands have, i and j those that only one has.
    """
    named = arguments(node)
    dims, product = named.get("dim"), node.args[0]
    if not is_call(product, aten.mul) or not isinstance(dims, (list, tuple)) or len(dims) != 1:
        return None
    assert isinstance(product, Node)
    a, b = product.args[0], product.args[1]
    shape = shape_of(product)
    if not (isinstance(a, Node) and isinstance(b, Node)) or sum(s == captured.length for s in shape) < 2:
        return None
    if len(shape_of(a)) != len(shape) or len(shape_of(b)) != len(shape):
        return None
    d = int(dims[0]) % len(shape)
    rows = [i for i in range(len(shape)) if shape_of(b)[i] == 1 and shape_of(a)[i] == shape[i] != 1]
    columns = [i for i in range(len(shape)) if shape_of(a)[i] == 1 and shape_of(b)[i] == shape[i] != 1]
    if shape_of(a)[d] != shape[d] or shape_of(b)[d] != shape[d] or node.meta["val"].dtype != product.meta["val"].dtype:
        return None
    if a.meta["val"].dtype != b.meta["val"].dtype:
        return None
    row = next((i for i in rows if shape[i] == captured.length), None)
    column = next((i for i in columns if shape[i] == captured.length or shape[d] == captured.length), None)
    if row is None or column is None or rows != [row] or columns != [column]:
        return None
    batch = [i for i in range(len(shape)) if i not in (row, column, d)]
    left = emit(captured, aten.permute.default, a, [*batch, row, d, column], like=node)
    left = emit(captured, aten.squeeze.dim, left, -1, like=node)
    right = emit(captured, aten.permute.default, b, [*batch, d, column, row], like=node)
    right = emit(captured, aten.squeeze.dim, right, -1, like=node)
    out = emit(captured, aten.matmul.default, left, right, like=node)
    order = [*batch, row, column]
    if named.get("keepdim"):
        out, order = emit(captured, aten.unsqueeze.default, out, -1, like=node), [*order, d]
    kept = sorted(order)
    return emit(captured, aten.permute.default, out, [order.index(i) for i in kept], like=node)
