"""Linear maps of the tokens with parameters, however a graph spells them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.fx_passes.graph import CapturedGraph, arguments, aten, is_call, read_attribute, shape_of


@dataclass(frozen=True, eq=False)
class Projection:
    """One linear map of the tokens, ``source @ weight.T + bias``.

    Attributes:
        node: the result ``[..., out]``.
        source: its input ``[..., in]``.
        weight: node that reads the parameter ``[out, in]``.
        bias: node that reads the parameter ``[out]``, or None.
    """

    node: Node
    source: Node
    weight: Node
    bias: Node | None


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A product of the tokens with a weight, and a bias, both parameters or buffers.

    Attributes:
        node: the result ``[..., out]``.
        source: its input ``[..., in]``.
        weight: node that reads the weight, ``[out, in]`` or, if ``transposed``, ``[in, out]``.
        transposed: see above.
        bias: node that reads the bias ``[out]``, or None.
    """

    node: Node
    source: Node
    weight: Node
    transposed: bool
    bias: Node | None


def read_projection(node: Node) -> Projection | None:
    """The node as a linear map with parameters, however it is written."""
    if not is_call(node, aten.linear, aten.matmul, aten.mm, aten.addmm):
        return None
    named = arguments(node)
    source, bias = named.get("input", named.get("self")), named.get("bias")
    weight = named.get("weight")
    if is_call(node, aten.addmm):
        if named["beta"] != 1 or named["alpha"] != 1:
            return None
        source, bias = named["mat1"], named["self"]
    if weight is None:
        weight = _untransposed(named.get("other", named.get("mat2")))
    if not isinstance(source, Node) or not _is_read(weight, 2) or not (bias is None or _is_read(bias, 1)):
        return None
    assert isinstance(weight, Node) and (bias is None or isinstance(bias, Node))
    whole = bias is None or shape_of(bias) == shape_of(weight)[:1]  # a bias of one entry is added to all
    return Projection(node, source, weight, bias) if whole and len(shape_of(source)) > 1 else None


def _untransposed(node: object) -> Node | None:
    """The matrix whose transpose the node is."""
    if (
        not isinstance(node, Node)
        or not is_call(node, aten.t, aten.transpose, aten.permute)
        or len(shape_of(node)) != 2
    ):
        return None
    source, *dims = node.args
    order = dims[0] if is_call(node, aten.permute) else dims or [0, 1]
    assert isinstance(order, Sequence) and isinstance(source, Node)
    places = [int(i) % 2 for i in order]  # type: ignore[arg-type]
    return source if places == [1, 0] or (places == [0, 1] and not is_call(node, aten.permute)) else None


def _is_read(node: object, rank: int) -> bool:
    return isinstance(node, Node) and node.op == "get_attr" and len(shape_of(node)) == rank


def read_linear_map(node: Node) -> LinearMap | None:
    """The node as a linear map with parameters, however it is written; its bias may be added by an op of its own."""
    projection = read_projection(node)
    if projection is not None:
        return LinearMap(node, projection.source, projection.weight, False, projection.bias)
    named = arguments(node) if node.op == "call_function" else {}
    if is_call(node, aten.add) and named["alpha"] == 1:
        for given, bias in ((named["self"], named["other"]), (named["other"], named["self"])):
            inner = read_linear_map(given) if isinstance(given, Node) and len(given.users) == 1 else None
            whole = inner is not None and inner.bias is None and _is_parameter(bias, shape_of(given)[-1:])
            if inner is not None and whole:
                return LinearMap(node, inner.source, inner.weight, inner.transposed, bias)
    source, bias, weight = (
        (named["mat1"], named["self"], named["mat2"])
        if is_call(node, aten.addmm) and named["alpha"] == named["beta"] == 1
        else (named.get("self"), None, named.get("other", named.get("mat2")))
    )
    if not is_call(node, aten.matmul, aten.mm, aten.addmm) or not isinstance(source, Node):
        return None
    width = shape_of(node)[-1:]
    if not _is_parameter(weight, (*shape_of(source)[-1:], *width)) or len(shape_of(source)) < 2:
        return None
    if bias is not None and not _is_parameter(bias, width):
        return None
    assert isinstance(weight, Node)
    return LinearMap(node, source, weight, True, bias)


def _is_parameter(node: object, shape: Sequence[object]) -> bool:
    return isinstance(node, Node) and node.op == "get_attr" and list(shape_of(node)) == list(shape)


def parameters_of(captured: CapturedGraph, projection: LinearMap) -> tuple[Tensor, Tensor | None]:
    """Weight ``[out, in]`` and bias ``[out]`` of a linear map."""
    weight, bias = (
        None if node is None else read_attribute(captured.module, str(node.target)).detach()
        for node in (projection.weight, projection.bias)
    )
    assert weight is not None
    return weight.mT if projection.transposed else weight, bias


def has_plain_parameters(captured: CapturedGraph, projection: LinearMap) -> bool:
    """Whether weight and bias are dense tensors of floats of at least 16 bits, of no special kind."""
    given = [tensor for tensor in parameters_of(captured, projection) if tensor is not None]
    dense = all(type(tensor) is Tensor and tensor.layout is torch.strided for tensor in given)
    return dense and all(tensor.is_floating_point() and tensor.itemsize > 1 for tensor in given)
