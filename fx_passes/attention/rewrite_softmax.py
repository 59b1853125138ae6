"""An attention written out with a softmax and two products, in canonical form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from kvpass.fx_passes.attention.canonical_attention import DenseInputs, emit_dense, factors_of, one_factor
from kvpass.fx_passes.attention.layouts import arrange, spread
from kvpass.fx_passes.attention.read_scores import NotUnderstood, ScoreReader, Scores
from kvpass.fx_passes.attention.softmax_terms import Coefficient, Softmax, Term, read_terms
from kvpass.fx_passes.graph import CapturedGraph, arguments, aten, emit, expression, is_call, shape_of
from kvpass.fx_passes.shape_values import ShapeEvaluator
from kvpass.fx_passes.token_axis.axes import Axes, Dim, Factor, Kind, MixesTokens, kinds_in, renamed
from kvpass.fx_passes.token_axis.contraction import Contraction, contraction_of, operand_dims, tagged_operands
from kvpass.fx_passes.token_axis.fixed_values import is_fixed
from kvpass.fx_passes.token_axis.infer_axes import Blocked, Inference


def key_side(inference: Inference, contraction: Contraction) -> tuple[Node, Kind] | None:
    """The operand of a product that holds weights over keys, and the kind of the keys."""
    try:
        left, right = operand_dims(inference, contraction)
    except (MixesTokens, Blocked):
        return None
    for weights, mine, other in ((contraction.left, left[-1], right[-2]), (contraction.right, right[-2], left[-1])):
        if kinds_in(other) == {Kind.TOKEN} and len(mine) == 1 and mine[0].kind in (Kind.LEFT, Kind.RIGHT):
            return weights, mine[0].kind
    return None


def rewrite_softmax(captured: CapturedGraph, inference: Inference, evaluator: ShapeEvaluator, node: Node) -> Node:
    """Rewrite a product of softmax weights with values; returns the node that takes its place."""
    contraction = contraction_of(node)
    assert contraction is not None
    side = key_side(inference, contraction)
    assert side is not None
    weights, key = side
    reader = ScoreReader(captured, inference, evaluator, key)
    total: Node | None = None
    for term in read_terms(reader, weights, key):
        out = _attend(captured, inference, reader, contraction, weights, term, node)
        total = out if total is None else emit(captured, aten.add.Tensor, total, out, like=node)
    assert total is not None
    if contraction.alpha != 1:
        total = emit(captured, aten.mul.Tensor, total, contraction.alpha, like=node)
    if contraction.added is not None and contraction.beta != 0:  # baddbmm with values
        total = emit(captured, aten.add.Tensor, total, contraction.added, alpha=contraction.beta, like=node)
    return total


@dataclass(frozen=True)
class _Layout:
    """The factors of one attention's scores, in canonical order, and what the weights call its heads."""

    batch: Factor
    heads: list[Factor]
    queries: Factor
    tokens: Factor
    names: dict[int, int]

    @property
    def scores(self) -> list[list[Factor]]:
        """Dims ``[B, Hq, Sq, Sk]``."""
        return [[self.batch], self.heads, [self.queries], [self.tokens]]

    def rows(self, of: Factor, width: list[Factor]) -> list[list[Factor]]:
        """Dims ``[B, H, S, width]`` of queries, keys or values."""
        return [[self.batch], self.heads, [of], width]


def _attend(
    captured: CapturedGraph,
    inference: Inference,
    reader: ScoreReader,
    contraction: Contraction,
    weights: Node,
    term: Term,
    node: Node,
) -> Node:
    """One softmax times the values, as a canonical attention in the layout of ``node``."""
    softmax = term.softmax
    scores = reader.read(softmax.scores)
    if softmax.sinks is not None and scores.shifted:
        raise NotUnderstood("scores are shifted before a column of sinks joins them", softmax.node)
    layout, q, k = _queries_and_keys(captured, inference, reader, scores, term, node)
    v, value_axes = _values(captured, inference, contraction, weights, layout.heads, layout.tokens, node)
    of_keys = [c for c in term.coefficients if isinstance(c, Coefficient) and reader.has(c.axes, reader.key)]
    for of_key in of_keys:
        v = _scaled(captured, v, of_key, layout, layout.tokens, node)
    bias = _canonical_bias(captured, reader, scores, term, layout, node)
    sinks = _sinks(captured, reader, softmax, layout, node)
    scale = scores.scale * (1.0 if scores.cap is None else scores.cap)
    dense = emit_dense(captured, DenseInputs(q, k, v, bias, scale, scores.cap, sinks), node, "softmax")
    for coefficient in term.coefficients:
        if coefficient not in of_keys:
            dense = _scaled(captured, dense, coefficient, layout, layout.queries, node)
    out_axes = _output_axes(inference, contraction, weights, value_axes)
    width = factors_of(value_axes, Kind.FEATURE)
    out = spread(captured, dense, layout.rows(layout.queries, width), out_axes, node)
    dtype = node.meta["val"].dtype
    return out if out.meta["val"].dtype == dtype else emit(captured, aten._to_copy.default, out, dtype=dtype, like=node)


def _scaled(
    captured: CapturedGraph, rows: Node, coefficient: Coefficient | float, layout: _Layout, of: Factor, node: Node
) -> Node:
    """Canonical rows ``[B, H, S, width]`` times a number, or one for each row of ``of`` and head."""
    if not isinstance(coefficient, Coefficient):
        return emit(captured, aten.mul.Tensor, rows, coefficient, like=node)
    axes = renamed(coefficient.axes, layout.names)
    target = layout.rows(of, [])
    if not {f for dim in axes for f in dim} <= {f for group in target for f in group}:
        raise NotUnderstood(
            "weights over keys are multiplied with a tensor that their scores do not line up with", node
        )
    return emit(captured, aten.mul.Tensor, rows, arrange(captured, coefficient.node, axes, target, node), like=node)


def _queries_and_keys(
    captured: CapturedGraph, inference: Inference, reader: ScoreReader, scores: Scores, term: Term, node: Node
) -> tuple[_Layout, Node, Node]:
    product = scores.contraction
    left, right = (renamed(axes, term.heads) for axes in tagged_operands(inference, product))
    sides = {Kind.LEFT: (product.left, left), Kind.RIGHT: (product.right, right)}
    (query, query_axes), (keys, key_axes) = sides[reader.query], sides[reader.key]
    named = renamed(inference.axes(product.node), term.heads)
    heads = sorted(factors_of(named, Kind.HEAD), key=lambda f: f.tag)
    layout = _Layout(
        batch=one_factor(query_axes, Kind.BATCH),
        heads=heads,
        queries=one_factor(query_axes, reader.query),
        tokens=one_factor(key_axes, reader.key),
        names=term.heads,
    )
    if one_factor(key_axes, Kind.BATCH) != layout.batch:
        raise MixesTokens("reads keys of other sequences")
    q = arrange(captured, query, query_axes, layout.rows(layout.queries, factors_of(query_axes, Kind.FEATURE)), node)
    k = arrange(captured, keys, key_axes, layout.rows(layout.tokens, factors_of(key_axes, Kind.FEATURE)), node)
    for factor, kinds in scores.factors:  # what scales the scores of a query, or of a key, scales that instead
        axes = renamed(kinds, layout.names)
        if reader.has(axes, reader.key):
            k = emit(
                captured, aten.mul.Tensor, k, arrange(captured, factor, axes, layout.rows(layout.tokens, []), node)
            )
        else:
            q = emit(
                captured, aten.mul.Tensor, q, arrange(captured, factor, axes, layout.rows(layout.queries, []), node)
            )
    return layout, q, k


def _values(
    captured: CapturedGraph,
    inference: Inference,
    contraction: Contraction,
    weights: Node,
    heads: list[Factor],
    tokens: Factor,
    node: Node,
) -> tuple[Node, Axes]:
    """Values in canonical layout, and the axes of the graph's value operand with the heads' names."""
    left, right = operand_dims(inference, contraction)
    weights_left = weights is contraction.left
    mine, theirs = (left, right) if weights_left else (right, left)
    batch = mine[:-2]
    own = theirs[:-2]
    named: list[Dim] = []
    for i, dim in enumerate(own):
        shared = batch[i - len(own) + len(batch)] if i - len(own) + len(batch) >= 0 else ()
        if dim and not shared:
            raise MixesTokens("has heads in its values that its scores do not have")
        named.append(shared if dim else ())
    width = tuple(Factor(Kind.FEATURE, f.size) for f in (theirs[-1] if weights_left else theirs[-2]))
    axes: list[Dim] = [*named, (tokens,), width] if weights_left else [*named, width, (tokens,)]
    operand = contraction.right if weights_left else contraction.left
    if contraction.right_is_transposed and weights_left:
        axes[-1], axes[-2] = axes[-2], axes[-1]
    value_batch = one_factor(tuple(axes), Kind.BATCH)
    groups = [[value_batch], heads, [tokens], list(width)]
    return arrange(captured, operand, tuple(axes), groups, node), tuple(axes)


def _output_axes(inference: Inference, contraction: Contraction, weights: Node, value_axes: Axes) -> Axes:
    """Axes of the product with values, heads by their names."""
    left, right = operand_dims(inference, contraction)
    weights_left = weights is contraction.left
    mine, theirs = (left, right) if weights_left else (right, left)
    width = next((dim for dim in value_axes if kinds_in(dim) == {Kind.FEATURE}), ())
    rank = max(len(mine), len(theirs)) - 2
    batch: list[Dim] = [()] * (rank - len(mine) + 2) + list(mine[:-2])
    rows = mine[-2] if weights_left else mine[-1]
    return (*batch, rows, width) if weights_left else (*batch, width, rows)


def _canonical_bias(
    captured: CapturedGraph, reader: ScoreReader, scores: Scores, term: Term, layout: _Layout, node: Node
) -> Node | None:
    bias = scores.bias
    for gate in (*(() if scores.gate is None else (scores.gate,)), *term.gates):
        bias = _gated(captured, bias, gate, node)
    if bias is None:
        return None
    axes = renamed(reader.kinds_of(bias, term.softmax.scores), layout.names)
    arranged = arrange(captured, bias, axes, layout.scores, node)
    return (
        arranged
        if arranged.meta["val"].is_floating_point()
        else emit(captured, aten._to_copy.default, arranged, dtype=torch.float32, like=node)
    )


def _gated(captured: CapturedGraph, bias: Node | None, gate: Node, node: Node) -> Node:
    """Zeros of the gate wipe a score out: right only where the bias hides the key as well. NaN marks what is not."""
    if bias is None:
        raise NotUnderstood("scores are multiplied with a mask, which hides nothing from a softmax", gate)
    hidden = emit(captured, aten.le.Scalar, bias, -1e4, like=node)
    wiped = emit(captured, aten.where.Scalar, hidden, float("-inf"), float("nan"), like=node)
    open_ = emit(captured, aten.eq.Scalar, gate, 1, like=node)
    closed = emit(captured, aten.eq.Scalar, gate, 0, like=node)
    known = emit(captured, aten.logical_or.default, open_, closed, like=node)
    value = emit(captured, aten.where.self, open_, bias, wiped, like=node)
    return emit(captured, aten.where.ScalarOther, known, value, float("nan"), like=node)


def _sinks(captured: CapturedGraph, reader: ScoreReader, softmax: Softmax, layout: _Layout, node: Node) -> Node | None:
    """The extra logit of each head, ``[Hq]``: it must be the same for every query and sequence."""
    if softmax.sinks is None:
        return None
    sinks = _before_expand(softmax.sinks)
    axes = renamed(reader.kinds_of(sinks, softmax.scores), layout.names)
    if is_call(sinks, aten.repeat):
        sinks, axes = _before_repeat(sinks, axes)
    if not _is_per_head(reader, sinks, axes):
        raise NotUnderstood("the column of sinks is not one number for each head", softmax.node)
    flat = arrange(captured, sinks, axes, layout.scores, node)
    heads = 1
    for factor in layout.heads:
        heads = heads * int(factor.size)
    for dim in (0, 1, 1):
        flat = emit(captured, aten.select.int, flat, dim, 0, like=node)
    return emit(captured, aten.expand.default, flat, [heads], like=node)


def _before_expand(node: Node) -> Node:
    """A tensor before it was spread over sequences and queries, by ``expand`` or by being added to zeros."""
    while is_call(node, aten.expand, aten.add):
        source = node.args[0]
        if is_call(node, aten.add):
            if not is_call(source, aten.zeros_like) or arguments(node)["alpha"] != 1:
                break
            source = node.args[1]
        if not isinstance(source, Node):
            break
        node = source
    return node


def _before_repeat(node: Node, axes: Axes) -> tuple[Node, Axes]:
    """The same before ``repeat``, and what its dims count; as it is where that spreads over anything else."""
    source, repeats = node.args
    assert isinstance(source, Node) and isinstance(repeats, (list, tuple))
    if len(repeats) != len(shape_of(source)):
        return node, axes
    left: list[Dim] = []
    for times, size, dim in zip(repeats, shape_of(source), axes, strict=True):
        count = expression(times)
        factors, spread = list(dim), expression(1)
        while factors and factors[0].kind is not Kind.HEAD and spread != count:
            spread *= factors.pop(0).size
        rest = expression(1)
        for factor in factors:
            rest *= factor.size
        if spread != count or rest != size:
            return node, axes
        left.append(tuple(factors))
    return _before_expand(source), tuple(left)


def _is_per_head(reader: ScoreReader, sinks: Node, axes: Axes) -> bool:
    """Whether a column beside the scores is the same for every sequence and query: read from its values."""
    if not is_fixed(reader.evaluator, sinks):
        return False
    atoms = [factor for dim in axes for factor in dim]
    found: list[torch.Tensor] = []
    relied = False
    for batch, length in ((1, 1), (2, 3)):
        with reader.evaluator.deciding(None):
            value = reader.evaluator.evaluate(sinks, batch, length)
        value = value.reshape([reader.evaluator.number(f.size, batch, length) for f in atoms])
        for i, factor in enumerate(atoms):
            if factor.kind is not Kind.HEAD:
                one = value.narrow(i, 0, 1)
                if not torch.equal(one.expand_as(value), value):
                    return False
                relied |= value.shape[i] > 1
                value = one
        found.append(value)
    if relied:  # one number for each head needs no look at the numbers
        reader.evaluator.record(sinks, "the sinks")
    return torch.equal(*found)
