"""From the input of a softmax back to ``q @ k^T``: scale, softcap, bias and mask on the way.

Every op between the product and the softmax is one row of :data:`READERS`. What has no row is no attention that
kvpass understands, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
    reads_parameter,
    shape_of,
    tensor_value,
)
from kvpass.fx_passes.op_facts.facts import is_item_of
from kvpass.fx_passes.shape_values import Dependence, ShapeEvaluator
from kvpass.fx_passes.token_axis.axes import Axes, Kind, is_score
from kvpass.fx_passes.token_axis.contraction import Contraction, contraction_of
from kvpass.fx_passes.token_axis.fixed_values import is_fixed
from kvpass.fx_passes.token_axis.infer_axes import Inference

SMALLEST_SCALE = 0.05  # of scores that are masked already: less, and a fill of -1e4 would hide nothing
HIDDEN = -1e4  # a fill or bias of at most this hides a key: exp(-1e4) is 0 in every float format

COPIES = (aten._to_copy, aten.clone, aten.detach, aten.alias)


class NotUnderstood(Exception):
    """The scores are computed in a way that has no canonical form."""

    def __init__(self, reason: str, node: Node) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


@dataclass(frozen=True)
class Scores:
    """``cap * tanh(scale * q.k) + bias`` (or ``scale * q.k + bias``), in the layout of one node of the graph.

    Attributes:
        contraction: the product of queries and keys.
        scale: factor of the product.
        cap: height of the tanh, where there is one.
        bias: shape-only node that broadcasts against the scores.
        gate: shape-only node of zeros and ones that multiplied the scores; zeros must be hidden by the bias.
        factors: tensors that multiply the scores and have no key axis or no query axis, with their axes.
        shifted: something that is the same for all keys of a query was added and left out: softmax does not see it.
    """

    contraction: Contraction
    scale: float = 1.0
    cap: float | None = None
    bias: Node | None = None
    gate: Node | None = None
    factors: tuple[tuple[Node, Axes], ...] = ()
    shifted: bool = False


class ScoreReader:
    """Reads the scores of one softmax. New nodes go to the graph's insertion point."""

    def __init__(self, captured: CapturedGraph, inference: Inference, evaluator: ShapeEvaluator, key: Kind) -> None:
        self.captured = captured
        self.inference = inference
        self.evaluator = evaluator
        self.key = key
        self.query = Kind.LEFT if key is Kind.RIGHT else Kind.RIGHT

    def read(self, node: Node) -> Scores:
        """The canonical form of the scores at ``node``.

        Raises:
            NotUnderstood: where an op has no reader or no canonical form.
        """
        contraction = contraction_of(node)
        if contraction is not None:
            return self._product(contraction)
        packet = getattr(node.target, "overloadpacket", None)
        reader = READERS.get(packet)
        if reader is None:
            raise NotUnderstood("the scores of this attention pass through an op that kvpass cannot read", node)
        return reader(self, node, arguments(node))

    def _product(self, contraction: Contraction) -> Scores:
        scores = Scores(contraction, scale=contraction.alpha)
        if contraction.added is None or contraction.beta == 0:
            return scores
        self.must_be_shape_only(contraction.added, contraction.node)
        bias = self.emit(aten.mul.Tensor, contraction.added, contraction.beta)
        return replace(scores, bias=bias)

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new node at the insertion point."""
        return emit(self.captured, target, *args, **kwargs)

    def is_scores(self, value: Any) -> bool:
        """Whether a node holds scores."""
        if not self.inference.is_data(value) or tensor_value(value) is None:
            return False
        axes = self.inference.results.get(value)
        return isinstance(axes, tuple) and is_score(axes)

    def kinds_of(self, other: Node, like: Node) -> Axes:
        """What the dims of a broadcast operand count, read off the scores it is combined with."""
        axes = self.inference.axes(like)
        shape = shape_of(other)
        tail = axes[len(axes) - len(shape) :] if shape else ()
        return tuple(() if size == 1 else dim for size, dim in zip(shape, tail, strict=True))

    def has(self, axes: Axes, kind: Kind) -> bool:
        """Whether a kind occurs in the axes."""
        return any(factor.kind is kind for dim in axes for factor in dim)

    def must_be_shape_only(self, other: Node, node: Node) -> None:
        """Refuse a mask or bias that depends on the tokens."""
        if self.inference.is_data(other):
            raise NotUnderstood("the mask or bias of this attention depends on token values (data)", node)

    def is_hidden(self, fill: Any) -> bool:
        """Whether a fill value hides a key for certain."""
        if isinstance(fill, (int, float)):
            return fill <= HIDDEN
        if not isinstance(fill, Node) or self.inference.is_data(fill) or is_symbolic_scalar(fill):
            return False
        if not is_fixed(self.evaluator, fill):
            return False
        with self.evaluator.deciding("what a mask fills scores with"):
            return bool(self.evaluator.evaluate(fill, 2, 5).max() <= HIDDEN)

    def constant(self, value: Any, learned: bool = False) -> float | None:
        """A number, where the argument is one or is a constant tensor of one entry; a parameter if ``learned``."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, Node) or self.inference.kinds[value] is not Dependence.CONSTANT:
            return None
        tensor = tensor_value(value)
        if tensor is None or tensor.numel() != 1 or (not learned and reads_parameter(self.captured, value)):
            return None
        with self.evaluator.deciding("a factor of the scores"):
            return float(self.evaluator.evaluate(value, 2, 5).item())


Reader = Callable[[ScoreReader, Node, dict[str, Any]], Scores]


def _pass_through(reader: ScoreReader, node: Node, named: dict[str, Any]) -> Scores:
    if not node.meta["val"].dtype.is_floating_point:
        raise NotUnderstood("the scores are cast to whole numbers", node)
    return reader.read(named["self"])


def _move(reader: ScoreReader, node: Node, named: dict[str, Any]) -> Scores:
    """Reshapes and permutations: the bias is moved along, spread to the full shape first."""
    source = named["self"]
    scores = reader.read(source)

    def moved(tensor: Node | None) -> Node | None:
        if tensor is None:
            return None
        rank = range(len(shape_of(source)))
        sizes = [reader.emit(aten.sym_size.int, source, d) for d in rank]
        return reader.emit(node.target, reader.emit(aten.expand.default, tensor, sizes), *node.args[1:])

    return replace(scores, bias=moved(scores.bias), gate=moved(scores.gate))


def _multiply(reader: ScoreReader, node: Node, named: dict[str, Any]) -> Scores:
    a, b = named["self"], named["other"]
    if reader.is_scores(a) and reader.is_scores(b):
        raise NotUnderstood("scores are multiplied with scores", node)
    inner, other = (a, b) if reader.is_scores(a) else (b, a)
    return _scale(reader, node, reader.read(inner), inner, other)


def _divide(reader: ScoreReader, node: Node, named: dict[str, Any]) -> Scores:
    inner, other = named["self"], named["other"]
    if not reader.is_scores(inner) or reader.is_scores(other) or named.get("rounding_mode") is not None:
        raise NotUnderstood("something is divided by scores", node)
    number = reader.constant(other)
    if number:
        return _scale(reader, node, reader.read(inner), inner, 1.0 / number)
    if not isinstance(other, Node) or is_symbolic_scalar(other):
        raise NotUnderstood("the scale of the scores depends on the length of the sequence", node)
    inverse = reader.emit(aten.reciprocal.default, other)
    reader.inference.kinds[inverse] = reader.inference.kinds[other]
    return _scale(reader, node, reader.read(inner), inner, inverse)


def _scale(reader: ScoreReader, node: Node, scores: Scores, inner: Node, other: Any) -> Scores:
    number = reader.constant(other, learned=scores.cap is not None)  # a softcap is a number in the op
    if number is not None:
        if number < SMALLEST_SCALE and scores.bias is not None:
            raise NotUnderstood("scores are multiplied with a number that undoes their mask", node)
        bias = None if scores.bias is None else reader.emit(aten.mul.Tensor, scores.bias, number)
        if scores.cap is not None:
            return replace(scores, cap=scores.cap * number, bias=bias)
        return replace(scores, scale=scores.scale * number, bias=bias)
    if not isinstance(other, Node) or is_symbolic_scalar(other):
        raise NotUnderstood("the scale of the scores depends on the length of the sequence", node)
    kinds = reader.kinds_of(other, node)
    if reader.has(kinds, reader.key) and reader.has(kinds, reader.query):
        reader.must_be_shape_only(other, node)
        if scores.gate is not None:
            raise NotUnderstood("scores are multiplied with two masks", node)
        bias = None if scores.bias is None else reader.emit(aten.mul.Tensor, scores.bias, other)  # -inf * 0 is NaN
        return replace(scores, gate=other, bias=bias)
    if scores.cap is not None:
        raise NotUnderstood("scores are multiplied with a tensor after their softcap", node)
    if scores.bias is not None:
        if reader.inference.is_data(other) or reader.has(kinds, reader.key):
            raise NotUnderstood("scores are multiplied with a tensor after their mask or bias", node)
        scores = replace(scores, bias=_scaled_bias(reader, scores.bias, other))
    if scores.shifted and reader.has(kinds, reader.key):
        raise NotUnderstood("scores are shifted before they are multiplied with a tensor over keys", node)
    return replace(scores, factors=(*scores.factors, (other, kinds)))


def _scaled_bias(reader: ScoreReader, bias: Node, factor: Node) -> Node:
    """A bias times a factor that hides what the bias hides. NaN marks factors that are too small, or negative."""
    hides = reader.emit(aten.ge.Scalar, factor, SMALLEST_SCALE)
    return reader.emit(aten.where.ScalarOther, hides, reader.emit(aten.mul.Tensor, bias, factor), float("nan"))


def _add(reader: ScoreReader, node: Node, named: dict[str, Any]) -> Scores:
    a, b = named["self"], named["other"]
    if reader.is_scores(a) and reader.is_scores(b) and not (_is_row(reader, a) or _is_row(reader, b)):
        raise NotUnderstood("scores are added to scores", node)
    alpha = named.get("alpha", 1)
    if reader.is_scores(a) and not _is_row(reader, a):
        return _bias(reader, node, reader.read(a), b, alpha)
    if alpha != 1:
        raise NotUnderstood("scores are added with a factor", node)
    return _bias(reader, node, reader.read(b), a, 1)


def _negate(reader: ScoreReader, node: Node, named: dict[str, Any]) -> Scores:
    return _scale(reader, node, reader.read(named["self"]), named["self"], -1.0)


def _subtract(reader: ScoreReader, node: Node, named: dict[str, Any]) -> Scores:
    a, b = named["self"], named["other"]
    if not reader.is_scores(a):
        raise NotUnderstood("scores are subtracted from something", node)
    return _bias(reader, node, reader.read(a), b, -named.get("alpha", 1))


def _is_row(reader: ScoreReader, value: Any) -> bool:
    """Whether a tensor is the same for all keys of a query: the softmax does not see it."""
    return isinstance(value, Node) and not reader.has(reader.inference.axes(value), reader.key)


def _bias(reader: ScoreReader, node: Node, scores: Scores, other: Any, alpha: float) -> Scores:
    if isinstance(other, Node) and reader.inference.is_data(other):
        if not reader.has(reader.kinds_of(other, node), reader.key):
            if alpha == -1 and is_as_large(reader, other, arguments(node)["self"]):
                return replace(scores, shifted=True)
            raise NotUnderstood(
                "something that depends on token values is added to all scores of a query: a softmax does not see it, "
                "but for rounding; only their own largest one, or their mean, may be subtracted",
                node,
            )
        raise NotUnderstood("the mask or bias of this attention depends on token values (data)", node)
    if is_symbolic_scalar(other):
        return replace(scores, shifted=True)
    term = other if isinstance(other, Node) else reader.emit(aten.full.default, [], float(other))
    if alpha != 1:
        term = reader.emit(aten.mul.Tensor, term, alpha)
    return replace(scores, bias=term if scores.bias is None else reader.emit(aten.add.Tensor, scores.bias, term))


def is_as_large(reader: ScoreReader, node: Node, scores: Node) -> bool:
    """Whether a node holds the largest of these scores, their mean, or their sum in logarithms.

    They may be taken before the mask; of scores times a large number they would be no number of this size.
    """
    while is_call(node, *COPIES) or is_item_of(node.target):
        node = node.args[0]  # type: ignore[assignment]
    if not is_call(node, aten.amax, aten.max, aten.mean, aten.logsumexp) or not reader.is_scores(node.args[0]):
        return False
    if _original(node.args[0]) is _original(scores):
        return True
    taken, meant = reader.read(node.args[0]), reader.read(scores)  # type: ignore[arg-type]
    same = (taken.contraction, taken.scale, taken.cap, taken.factors) == (
        meant.contraction, meant.scale, meant.cap, meant.factors,
    )  # fmt: skip
    return same and taken.bias is None and taken.gate is None


def _original(node: Any) -> Any:
    while is_call(node, *COPIES):
        node = node.args[0]
    return node


def _tanh(reader: ScoreReader, node: Node, named: dict[str, Any]) -> Scores:
    scores = reader.read(named["self"])
    if scores.bias is not None or scores.gate is not None or scores.cap is not None:
        raise NotUnderstood("a tanh runs over scores that are masked already", node)
    if scores.shifted:
        raise NotUnderstood("scores are shifted before a tanh", node)
    return replace(scores, cap=1.0)


def _where(reader: ScoreReader, node: Node, named: dict[str, Any]) -> Scores:
    kept, fill = named["self"], named["other"]
    keep = named["condition"]
    if not reader.is_scores(kept):
        kept, fill = fill, kept
        keep = None
    if not reader.is_scores(kept) or reader.is_scores(fill):
        raise NotUnderstood("scores are chosen from two kinds of scores", node)
    reader.must_be_shape_only(named["condition"], node)
    if keep is None:
        keep = reader.emit(aten.logical_not.default, named["condition"])
    return _hide(reader, node, reader.read(kept), keep, fill)


def _masked_fill(reader: ScoreReader, node: Node, named: dict[str, Any]) -> Scores:
    reader.must_be_shape_only(named["mask"], node)
    keep = reader.emit(aten.logical_not.default, named["mask"])
    return _hide(reader, node, reader.read(named["self"]), keep, named["value"])


def _hide(reader: ScoreReader, node: Node, scores: Scores, keep: Node, fill: Any) -> Scores:
    if not reader.is_hidden(fill):
        raise NotUnderstood(f"scores are filled with {fill}, which does not hide a key: use -inf", node)
    minus_infinity = float("-inf")
    if scores.bias is None:
        zero = reader.emit(aten.full.default, [], 0.0, dtype=torch.float32)
        return replace(scores, bias=reader.emit(aten.where.ScalarOther, keep, zero, minus_infinity))
    return replace(scores, bias=reader.emit(aten.where.ScalarOther, keep, scores.bias, minus_infinity))


def _at_least(reader: ScoreReader, node: Node, named: dict[str, Any]) -> Scores:
    """``maximum(scores, finfo.min)`` and ``clamp(min=...)`` change nothing that is visible."""
    bound = named.get("other", named.get("min"))
    inner = named["self"]
    if not reader.is_scores(inner) and isinstance(bound, Node):
        inner, bound = bound, inner
    if named.get("max") is not None or not reader.is_hidden(bound):
        raise NotUnderstood("scores are clamped", node)
    return reader.read(inner)


def _finite(reader: ScoreReader, node: Node, named: dict[str, Any]) -> Scores:
    """``nan_to_num`` changes no finite score, and a hidden one stays hidden."""
    scores = reader.read(named["self"])
    if scores.bias is not None and named["neginf"] is not None and named["neginf"] > HIDDEN:
        raise NotUnderstood("the mask is taken back: -inf becomes a number that hides no key", node)
    return scores


READERS: dict[object, Reader] = {
    aten.nan_to_num: _finite,
    aten._to_copy: _pass_through,
    aten.clone: _pass_through,
    aten.reshape: _move,
    aten.permute: _move,
    aten.transpose: _move,
    aten.unsqueeze: _move,
    aten.squeeze: _move,
    aten.mul: _multiply,
    aten.div: _divide,
    aten.true_divide: _divide,
    aten.add: _add,
    aten.sub: _subtract,
    aten.neg: _negate,
    aten.tanh: _tanh,
    aten.where: _where,
    aten.masked_fill: _masked_fill,
    aten.maximum: _at_least,
    aten.max: _at_least,
    aten.clamp: _at_least,
    aten.clamp_min: _at_least,
}
