"""``scaled_dot_product_attention`` in canonical form."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from kvpass.fx_passes.attention.canonical_attention import DenseInputs, emit_dense, one_factor
from kvpass.fx_passes.attention.layouts import arrange, spread
from kvpass.fx_passes.attention.read_scores import NotUnderstood
from kvpass.fx_passes.graph import CapturedGraph, arguments, aten, emit, shape_of
from kvpass.fx_passes.shape_values import ShapeEvaluator
from kvpass.fx_passes.token_axis.axes import Axes, Factor, Kind, is_score, kinds_in
from kvpass.fx_passes.token_axis.infer_axes import Inference


def rewrite_sdpa(captured: CapturedGraph, inference: Inference, evaluator: ShapeEvaluator, node: Node) -> Node:
    """Rewrite one ``scaled_dot_product_attention``; returns the node that takes its place."""
    named = arguments(node)
    if named["dropout_p"]:
        raise NotUnderstood("this attention drops weights at random", node)
    operands = [named[name] for name in ("query", "key", "value")]
    (q, q_axes, q_groups), (k, _, _), (v, _, v_groups) = (_operand(captured, inference, n, node) for n in operands)
    scale = named["scale"]
    if scale is None:
        scale = float(shape_of(operands[0])[-1]) ** -0.5
    if not isinstance(scale, (int, float)):
        raise NotUnderstood("the scale of the scores depends on the length of the sequence", node)
    bias = _bias(captured, inference, node, named, q_axes, q_groups)
    dense = emit_dense(captured, DenseInputs(q, k, v, bias, float(scale)), node, "sdpa")
    batch, heads, tokens, _ = q_groups
    width = v_groups[3]
    axes = (*q_axes[:-1], tuple(width))
    return spread(captured, dense, [batch, heads, tokens, width], axes, node)


def _operand(
    captured: CapturedGraph, inference: Inference, operand: Node, node: Node
) -> tuple[Node, Axes, list[list[Factor]]]:
    """An operand in canonical layout, its axes with heads and width named, and the canonical dims."""
    axes = inference.axes(operand)
    if is_score(axes) or kinds_in(axes[-2]) != {Kind.TOKEN} or not kinds_in(axes[-1]) <= {Kind.PLAIN}:
        raise NotUnderstood("this attention runs over something else than tokens", node)
    # heads and width may be of one size: name the width, so that no two factors are equal
    width = tuple(Factor(Kind.FEATURE, f.size) for f in axes[-1])
    heads = [
        Factor(Kind.HEAD, f.size, i) for i, f in enumerate(f for d in axes[:-2] for f in d if f.kind is Kind.PLAIN)
    ]
    pending = iter(heads)
    named = tuple(tuple(next(pending) if f.kind is Kind.PLAIN else f for f in dim) for dim in axes[:-2])
    full: Axes = (*named, axes[-2], width)
    groups = [[one_factor(axes, Kind.BATCH)], heads, [one_factor(axes, Kind.TOKEN)], list(width)]
    return arrange(captured, operand, full, groups, node), full, groups


def _bias(
    captured: CapturedGraph,
    inference: Inference,
    node: Node,
    named: dict[str, Any],
    query_axes: Axes,
    groups: list[list[Factor]],
) -> Node | None:
    mask = named["attn_mask"]
    if mask is None:
        if not named["is_causal"]:
            return None
        length = captured.size("length")
        device = node.meta["val"].device
        ones = emit(captured, aten.ones.default, [length, length], dtype=torch.bool, device=device, like=node)
        return _bool_to_bias(captured, emit(captured, aten.tril.default, ones, like=node), node)
    if inference.is_data(mask):
        raise NotUnderstood("the mask of this attention depends on token values (data)", node)
    if named["is_causal"]:
        raise NotUnderstood("this attention has a mask and is_causal at once", node)
    bias = _bool_to_bias(captured, mask, node) if mask.meta["val"].dtype == torch.bool else mask
    (tokens,) = groups[2]
    key = Factor(Kind.RIGHT, tokens.size)
    full = (*query_axes[:-1], (key,))
    shape = shape_of(bias)
    axes = tuple(() if s == 1 else dim for s, dim in zip(shape, full[len(full) - len(shape) :], strict=True))
    return arrange(captured, bias, axes, [groups[0], groups[1], [tokens], [key]], node)


def _bool_to_bias(captured: CapturedGraph, mask: Node, node: Node) -> Node:
    return emit(captured, aten.where.Scalar, mask, 0.0, float("-inf"), like=node)
