"""The table of ops that are known to treat tokens one by one, and under which conditions."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from kvpass.fx_passes.graph import aten, expression, is_call, shape_of
from kvpass.fx_passes.op_facts.declared import DeclaredFacts
from kvpass.fx_passes.op_facts.table import facts_of
from kvpass.fx_passes.shape_values import Dependence
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
    is_score,
    kinds_in,
    plain,
    uniform,
)
from kvpass.fx_passes.token_axis.contraction import contract, contraction_of
from kvpass.fx_passes.token_axis.group_rules import grouped_product
from kvpass.fx_passes.token_axis.indexing_rules import INDEXING_RULES
from kvpass.fx_passes.token_axis.infer_axes import AxisRule, Inference, Several, along, pointwise
from kvpass.fx_passes.token_axis.moving_rules import MOVING_RULES
from kvpass.fx_passes.token_axis.routing_rules import ROUTING_RULES, is_row_sort, nonzero, sort_rows


def where(inference: Inference, node: Node, named: dict[str, Any]) -> Axes | Several:
    """A choice between two tensors; with a condition alone, the rows where it holds."""
    return nonzero(inference, node, named) if len(node.args) == 1 else pointwise(inference, node, named)


def reduction(inference: Inference, node: Node, named: dict[str, Any]) -> Axes | Several:
    """Sums, maxima, norms: the dims worked along vanish, or are 1."""
    if "other" in named:  # max and min of two tensors share the name
        return pointwise(inference, node, named)
    source = named.get("self", named.get("x"))
    axes = inference.axes(source)
    chosen = along(inference, node, axes, named.get("dim"))
    keep = bool(named.get("keepdim", False))
    kept: list[Dim] = [() if i in chosen else dim for i, dim in enumerate(axes) if keep or i not in chosen]
    val = node.meta["val"]
    return Several((tuple(kept),) * len(val)) if isinstance(val, (tuple, list)) else tuple(kept)


def along_dim(inference: Inference, node: Node, named: dict[str, Any]) -> Axes | Several:
    """Ops that work along one dim and keep the shape, or change that dim's size: softmax, cumsum, sort, topk, glu."""
    axes = list(inference.axes(named["self"]))
    if is_call(node, aten.sort, aten.argsort) and is_row_sort(tuple(axes)):
        return sort_rows(inference, node, tuple(axes))
    dims = named.get("dim", named.get("dims", -1))
    chosen = along(inference, node, tuple(axes), dims)
    val = node.meta["val"]
    results = val if isinstance(val, (tuple, list)) else [val]
    outs: list[Axes] = []
    for value in results:
        out = list(axes)
        for d in chosen:
            if is_free(out[d]):
                out[d] = plain(expression(value.shape[d]))
        outs.append(tuple(out))
    return Several(tuple(outs)) if isinstance(val, (tuple, list)) else outs[0]


def normalise_last(inference: Inference, node: Node, named: dict[str, Any]) -> Axes | Several:
    """Layer norm and RMS norm over the last dims."""
    source = named.get("input", named.get("self"))
    axes = inference.axes(source)
    width = len(named["normalized_shape"])
    along(inference, node, axes, list(range(len(axes) - width, len(axes))))
    if isinstance(node.meta["val"], (tuple, list)):
        statistics = (*axes[: len(axes) - width], *([()] * width))
        return Several((axes, *([statistics] * (len(node.meta["val"]) - 1))))
    return axes


def group_norm(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    axes = inference.axes(named["input"])
    along(inference, node, axes, list(range(1, len(axes))))
    return axes


def batch_norm(inference: Inference, node: Node, named: dict[str, Any]) -> Axes | Several:
    """With running statistics it is elementwise; saved statistics are empty then."""
    if named.get("training"):
        raise MixesTokens("normalises over the batch and the tokens")
    axes, val = inference.axes(named["input"]), node.meta["val"]
    saved = [tuple(plain(expression(s)) for s in v.shape) for v in val[1:]] if isinstance(val, (tuple, list)) else []
    return Several((axes, *saved)) if isinstance(val, (tuple, list)) else axes


def product(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    """Matrix products of every spelling."""
    contraction = contraction_of(node)
    assert contraction is not None
    axes = contract(inference, contraction)
    if contraction.added is not None:
        axes = (
            broadcast([axes, inference.axes(contraction.added)], len(axes))
            if not _is_bias(inference, contraction.added, axes)
            else axes
        )
    return axes


def _is_bias(inference: Inference, added: Node, axes: Axes) -> bool:
    scores = any(f.kind in (Kind.LEFT, Kind.RIGHT) for dim in axes for f in dim)
    return scores and inference.kinds[added] is not Dependence.DATA


def attention(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    """A dense attention: rows are those of the query, each from its own token and those that the mask shows it."""
    query, key, value = (inference.axes(named[name]) for name in ("query", "key", "value"))
    if is_call(node, aten.scaled_dot_product_attention) and is_free(key[-2]) and is_free(value[-2]):
        return _over_entries(inference, node, named, query, key, value)
    for axes in (query, key, value):
        if kinds_in(axes[-2]) != {Kind.TOKEN} or not is_free(axes[-1]) or not count(axes, Kind.BATCH):
            raise MixesTokens("is an attention over something else than tokens")
    if is_call(node, aten.scaled_dot_product_attention) and not inference.with_scores:
        raise MixesTokens("multiplies tokens with tokens: an attention that was not recognised")
    return (*query[:-1], value[-1])


def _over_entries(inference: Inference, node: Node, named: dict[str, Any], query: Axes, key: Axes, value: Axes) -> Axes:
    """An attention to what each token has of its own, such as its heads, or to constants: products and a softmax."""
    rank = len(shape_of(node)) - 2
    lead = broadcast([query[:-2], key[:-2], value[:-2]], rank)
    if any(is_score(axes) or not is_free(axes[-1]) for axes in (query, key, value)):
        raise MixesTokens("is an attention over something else than tokens")
    if named["is_causal"] and not is_free(query[-2]):
        raise MixesTokens("hides keys by the place of their query among those of the call")
    if named["attn_mask"] is not None:
        broadcast([(*lead, query[-2], key[-2]), inference.axes(named["attn_mask"])], rank + 2)
    return check((*lead, query[-2], value[-1]))


def convolution(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    """A convolution with kernel 1 is a linear map of each token; any other looks at neighbours."""
    axes = inference.axes(named["input"])
    kernel = shape_of(named["weight"])[2:]
    numbers = (*named.get("padding", ()), *named.get("output_padding", ()))
    if any(k != 1 for k in kernel) or any(s != 1 for s in named["stride"]) or any(p != 0 for p in numbers):
        raise MixesTokens("is a convolution: it reads neighbouring positions")
    if len(axes) != len(shape_of(named["weight"])) or not is_free(axes[1]):
        raise MixesTokens("is a convolution whose channels are no features of one token")
    return (axes[0], plain(shape_of(node)[1]), *axes[2:])


def pad(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    axes = list(inference.axes(named["self"]))
    amounts = named["pad"]
    for i in range(0, len(amounts), 2):
        if (amounts[i], amounts[i + 1]) != (0, 0):
            d = len(axes) - 1 - i // 2
            if not is_free(axes[d]):
                raise MixesTokens("pads, and so shifts, the token axis")
            axes[d] = plain(shape_of(node)[d])
    return tuple(axes)


def as_complex(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    axes = inference.axes(named["self"])
    return axes[:-1]


def as_real(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    return (*inference.axes(named["self"]), plain(2))


def filled(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    """Tensors made of one number."""
    return tuple(plain(s) if s.is_number else (Factor(Kind.ANY, s),) for s in shape_of(node))


def log_sigmoid(inference: Inference, node: Node, named: dict[str, Any]) -> Several:
    """Elementwise; a second result is kept for gradients."""
    return Several((inference.axes(named["self"]), uniform(tuple(expression(s) for s in node.meta["val"][1].shape))))


def pool(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    """Neighbours along the last dim are pooled."""
    axes = inference.axes(named["self"])
    along(inference, node, axes, -1)
    return (*axes[:-1], plain(shape_of(node)[-1]))


def one_hot(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    return (*inference.axes(named["self"]), plain(shape_of(node)[-1]))


def outer(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    return check((*inference.axes(named["self"]), *inference.axes(named["vec2"])))


def first_operand(inference: Inference, node: Node, named: dict[str, Any]) -> Axes:
    """Elementwise in the first operand; the others are parameters of the op."""
    return inference.axes(node.args[0])


def declared_rows(inference: Inference, node: Node, named: dict[str, Any]) -> Axes | Several:
    """An op that was declared to compute each row of its operands by itself, along dims that hold no tokens."""
    facts = facts_of(node.target)
    assert isinstance(facts, DeclaredFacts)
    operands = [inference.axes(named[name]) for name in facts.tokens or () if isinstance(named.get(name), Node)]
    rank = max(map(len, operands))
    for axes in operands:
        along(inference, node, axes, [d for d in facts.dims if -d <= len(axes)])
    rows = [tuple(() if i - len(axes) in facts.dims else dim for i, dim in enumerate(axes)) for axes in operands]
    kept = broadcast(rows, rank)

    def of(value: torch.Tensor) -> Axes:
        if value.dim() != rank:
            raise MixesTokens("was declared to keep its rows, and gives a result of another rank")
        sizes = [expression(size) for size in value.shape]
        return tuple(plain(sizes[i]) if i - rank in facts.dims else dim for i, dim in enumerate(kept))

    val = node.meta["val"]
    return Several(tuple(map(of, val))) if isinstance(val, (tuple, list)) else of(val)


# Rules by the names that the facts of ops call them by.
AXIS_RULES: dict[str, AxisRule] = {
    **{
        rule.__name__: rule
        for rule in (
            pointwise, where, first_operand, log_sigmoid, reduction, along_dim, pool, one_hot, normalise_last,
            group_norm, batch_norm, product, outer, grouped_product, attention, convolution, pad, as_complex,
            as_real, filled, declared_rows,
        )
    },
    **MOVING_RULES,
    **INDEXING_RULES,
    **ROUTING_RULES,
}  # fmt: skip
