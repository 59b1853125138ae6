"""Matrix products in one form, whatever op spells them."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from kvpass.fx_passes.graph import arguments, aten, is_call, shape_of
from kvpass.fx_passes.token_axis.axes import (
    Axes,
    Dim,
    Factor,
    Kind,
    MixesTokens,
    broadcast,
    check,
    count,
    is_free,
    kinds_in,
    simplified,
)
from kvpass.fx_passes.token_axis.infer_axes import Inference


@dataclass(frozen=True)
class Contraction:
    """``alpha * left @ right + beta * added``, with left ``[..., M, K]`` and right ``[..., K, N]``.

    Attributes:
        node: the op.
        left: left operand.
        right: right operand.
        right_is_transposed: the graph's tensor is ``[..., N, K]``.
        vector: the right operand is ``[K]`` and the result has no N.
        added: tensor added to the product, where the op has one.
        alpha: factor of the product.
        beta: factor of what is added.
    """

    node: Node
    left: Node
    right: Node
    right_is_transposed: bool = False
    vector: bool = False
    added: Node | None = None
    alpha: float = 1.0
    beta: float = 1.0


def contraction_of(node: Node) -> Contraction | None:
    """The matrix product that a node computes, or None if it computes none."""
    if is_call(node, aten.matmul, aten.mm, aten.bmm, aten.mv):
        left, right = node.args[0], node.args[1]
        assert isinstance(left, Node) and isinstance(right, Node)
        return Contraction(node, left, right, vector=len(shape_of(right)) == 1)
    if is_call(node, aten.linear):
        named = arguments(node)
        return Contraction(node, named["input"], named["weight"], right_is_transposed=True, added=named["bias"])
    if is_call(node, aten.addmm, aten.baddbmm):
        named = arguments(node)
        left, right = (named[k] for k in (("mat1", "mat2") if is_call(node, aten.addmm) else ("batch1", "batch2")))
        return Contraction(
            node, left, right, added=named["self"], alpha=float(named["alpha"]), beta=float(named["beta"])
        )
    return None


def operand_dims(inference: Inference, contraction: Contraction) -> tuple[list[Dim], list[Dim]]:
    """Axes of both operands, in the order ``[..., M, K]`` and ``[..., K, N]``."""
    left = list(inference.axes(contraction.left))
    right = list(inference.axes(contraction.right))
    if contraction.right_is_transposed:
        right[-1], right[-2] = right[-2], right[-1]
    if contraction.vector:
        right.append(())
    if len(left) < 2:
        raise MixesTokens("multiplies a vector with a matrix")
    return left, right


def contract(inference: Inference, contraction: Contraction) -> Axes:
    """Axes of the product.

    Raises:
        MixesTokens: if it sums over tokens that are no keys of an attention.
    """
    left, right = operand_dims(inference, contraction)
    batch = list(broadcast([tuple(left[:-2]), tuple(right[:-2])], max(len(left), len(right)) - 2))
    rows, columns = left[-2], right[-1]
    inner = (left[-1], right[-2])
    if inference.is_data(contraction.left) and inference.is_data(contraction.right):
        query = _query_of(inner)
        if query is not None:
            return _finish([_as_values(dim, query) for dim in (*batch, rows, columns)], contraction)
        if all(Kind.TOKEN in kinds_in(dim) for dim in (rows, columns)):
            return _finish(_scores(inference, batch, rows, columns, inner), contraction)
    if not all(is_free(dim) for dim in inner):
        raise MixesTokens("sums over the tokens of the sequence")
    return _finish([*batch, rows, columns], contraction)


def _finish(dims: list[Dim], contraction: Contraction) -> Axes:
    return check(tuple(dims[:-1] if contraction.vector else dims))


def _query_of(inner: tuple[Dim, Dim]) -> Kind | None:
    """Which side of the scores asks, when the product is one of weights over keys with their values."""
    for weights, values in (inner, inner[::-1]):
        kinds = kinds_in(weights)
        if len(weights) == 1 and kinds_in(values) == {Kind.TOKEN} and kinds <= {Kind.LEFT, Kind.RIGHT}:
            return Kind.LEFT if kinds == {Kind.RIGHT} else Kind.RIGHT
    return None


def _as_values(dim: Dim, query: Kind) -> Dim:
    """Query tokens of scores are tokens again, heads are plain."""
    renamed = {query: Kind.TOKEN, Kind.HEAD: Kind.PLAIN}
    return simplified([Factor(renamed.get(f.kind, f.kind), f.size) for f in dim])


def _scores(inference: Inference, batch: list[Dim], rows: Dim, columns: Dim, inner: tuple[Dim, Dim]) -> list[Dim]:
    if not inference.with_scores:
        raise MixesTokens("multiplies tokens with tokens: an attention that was not recognised")
    if not all(is_free(dim) for dim in inner):
        raise MixesTokens("multiplies tokens with tokens and sums over tokens")

    def name(dim: Dim, tokens: Kind) -> Dim:
        return tuple(
            Factor(tokens, f.size)
            if f.kind is Kind.TOKEN
            else (Factor(Kind.HEAD, f.size, inference.fresh_tag()) if f.kind is Kind.PLAIN else f)
            for f in dim
        )

    if any(count((dim,), Kind.TOKEN) for dim in batch):
        raise MixesTokens("multiplies tokens with tokens per token")
    return [*(name(dim, Kind.LEFT) for dim in batch), name(rows, Kind.LEFT), name(columns, Kind.RIGHT)]


def tagged_operands(inference: Inference, contraction: Contraction) -> tuple[Axes, Axes]:
    """Operands of scores with the head names of their result, in the operands' own dim order.

    What is contracted is a feature; a head that an operand does not have, since it is broadcast, is missing.
    """
    left, right = operand_dims(inference, contraction)
    out = inference.axes(contraction.node)

    def batch_of(own: list[Dim]) -> list[Dim]:
        batch = own[:-2]
        shared = out[:-2][len(out) - 2 - len(batch) :]
        return [named if dim else () for dim, named in zip(batch, shared, strict=True)]

    named_left = (*batch_of(left), out[-2], _features(left[-1]))
    named_right = [*batch_of(right), _features(right[-2]), out[-1]]
    if contraction.right_is_transposed:
        named_right[-1], named_right[-2] = named_right[-2], named_right[-1]
    return named_left, tuple(named_right)


def _features(dim: Dim) -> Dim:
    return tuple(Factor(Kind.FEATURE, f.size) for f in dim)
