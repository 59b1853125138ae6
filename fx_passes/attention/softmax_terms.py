"""From the weights over keys back to the softmaxes they come from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch.fx import Node

from kvpass.fx_passes.attention.read_scores import NotUnderstood, ScoreReader, is_as_large
from kvpass.fx_passes.graph import arguments, aten, is_call, shape_of
from kvpass.fx_passes.token_axis.axes import Axes, Kind


@dataclass(frozen=True)
class Softmax:
    """A softmax over keys.

    Attributes:
        node: the softmax.
        scores: its input, without the column of sinks.
        sinks: shape-only node of the extra column, where there is one.
        sinks_first: the column stands before the keys.
    """

    node: Node
    scores: Node
    sinks: Node | None = None
    sinks_first: bool = False


@dataclass(frozen=True)
class Coefficient:
    """A tensor over queries or over keys, not both, that multiplies weights over keys.

    Attributes:
        node: the tensor.
        axes: what its dims count, heads by the names they have where it multiplies.
    """

    node: Node
    axes: Axes


@dataclass(frozen=True)
class Term:
    """One softmax, multiplied with coefficients.

    Attributes:
        softmax: the softmax.
        coefficients: what multiplies it.
        heads: names that its heads have in the sum, where they are others than its own.
        gates: shape-only tensors of zeros and ones that multiplied the weights, in their layout; zeros must be hidden
            already.
    """

    softmax: Softmax
    coefficients: tuple[Coefficient | float, ...] = ()
    heads: dict[int, int] = field(default_factory=dict)
    gates: tuple[Node, ...] = ()


def read_terms(reader: ScoreReader, node: Node, key: Kind) -> list[Term]:
    """Weights over keys as a sum of softmaxes with coefficients.

    Raises:
        NotUnderstood: if they are anything else.
    """
    if is_call(node, aten.softmax, aten._softmax, aten._safe_softmax):
        softmax = _read_softmax(reader, node, key)
        if softmax.sinks is not None:
            raise NotUnderstood("the column of sinks takes part in the product with values", node)
        return [Term(softmax)]
    if is_call(
        node, aten._to_copy, aten.clone, aten.reshape, aten.permute, aten.transpose, aten.unsqueeze, aten.squeeze
    ):
        return read_terms(reader, _input(node), key)
    if is_call(node, aten.slice, aten.narrow):
        return [Term(_without_sinks(reader, node, key))]
    if is_call(node, aten.add, aten.sub):
        return _sum(reader, node, key)
    if is_call(node, aten.mul):
        return _scaled(reader, node, key)
    if is_call(node, aten.nan_to_num) and not arguments(node)["nan"]:
        return read_terms(reader, _input(node), key)  # rows that see nothing, where NaN comes from, are refused
    if is_call(node, aten.masked_fill, aten.where):
        return _kept(reader, node, key)
    raise NotUnderstood("the weights of this attention are no softmax over keys", node)


def _input(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _read_softmax(reader: ScoreReader, node: Node, key: Kind) -> Softmax:
    source = _input(node)
    axes = reader.inference.axes(source)
    d = arguments(node)["dim"] % len(axes)
    if not (len(axes[d]) == 1 and axes[d][0].kind is key):
        raise NotUnderstood("the softmax does not run over the keys", node)
    current = source
    while is_call(current, aten._to_copy, aten.clone) or _is_shift(reader, current):
        current = _input(current)
    if not is_call(current, aten.cat):
        return Softmax(node, source)
    parts = arguments(current)["tensors"]
    scores = [n for n in parts if reader.is_scores(n)]
    others = [n for n in parts if n not in scores]
    single = len(scores) == 1 and len(others) == 1 and shape_of(others[0])[d] == 1
    if not single or reader.inference.is_data(others[0]):
        raise NotUnderstood("the scores are joined with something else than one column of sinks", current)
    return Softmax(node, scores[0], others[0], sinks_first=parts[0] is others[0])


def _is_shift(reader: ScoreReader, node: Node) -> bool:
    """``x - max(x)``: the same for all keys, the column of sinks included."""
    if not is_call(node, aten.sub):
        return False
    named = arguments(node)
    inner, other = named["self"], named["other"]
    row = (
        isinstance(other, Node)
        and reader.inference.is_data(other)
        and not reader.has(reader.kinds_of(other, node), reader.key)
    )
    return row and reader.is_scores(inner) and is_as_large(reader, other, inner)


def _without_sinks(reader: ScoreReader, node: Node, key: Kind) -> Softmax:
    """A softmax whose column of sinks is cut off again."""
    current = _input(node)
    while is_call(current, aten._to_copy, aten.clone):
        current = _input(current)
    if not is_call(current, aten.softmax, aten._softmax):
        raise NotUnderstood("only a part of the weights over keys is used", node)
    softmax = _read_softmax(reader, current, key)
    named = arguments(node)
    axes = reader.inference.axes(current)
    d = named["dim"] % len(axes)
    start = named["start"] or 0
    offset = 1 if softmax.sinks_first else 0
    cut = len(axes[d]) == 1 and axes[d][0].kind is key and shape_of(node)[d] == reader.captured.length
    if softmax.sinks is None or not cut or start != offset or named.get("step", 1) != 1:
        raise NotUnderstood("only a part of the weights over keys is used", node)
    return softmax


def _sum(reader: ScoreReader, node: Node, key: Kind) -> list[Term]:
    named = arguments(node)
    sign = -1.0 if is_call(node, aten.sub) else 1.0
    sign *= float(named.get("alpha", 1))
    operands = (named["self"], named["other"])
    if not all(reader.is_scores(n) for n in operands):
        raise NotUnderstood("something is added to the weights over keys", node)
    names = _names_in_sum(reader, operands, node)
    second = [
        replace(
            t,
            coefficients=(*t.coefficients, *([sign] if sign != 1 else [])),
            heads=names | {own: names.get(name, name) for own, name in t.heads.items()},
        )
        for t in read_terms(reader, operands[1], key)
    ]
    return read_terms(reader, operands[0], key) + second


def _names_in_sum(reader: ScoreReader, operands: tuple[Node, Node], node: Node) -> dict[int, int]:
    """What the heads of the second operand are called in the sum: there they line up with those of the first."""
    first, second = (reader.inference.axes(n) for n in operands)
    pairs = [(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)]
    if any(a.kind is not b.kind or a.size != b.size for a, b in pairs):
        raise NotUnderstood("softmaxes of different shapes are added", node)
    return {b.tag: a.tag for a, b in pairs if b.kind is Kind.HEAD}


def _scaled(reader: ScoreReader, node: Node, key: Kind) -> list[Term]:
    """A factor for each query may as well multiply the result, and one for each key the values."""
    named = arguments(node)
    a, b = named["self"], named["other"]
    weights, other = (a, b) if reader.is_scores(a) and reader.has(reader.inference.axes(a), key) else (b, a)
    if not reader.is_scores(weights):
        raise NotUnderstood("the weights of this attention are no softmax over keys", node)
    if isinstance(other, Node):
        axes = reader.kinds_of(other, node)
        if reader.has(axes, key) and not reader.inference.is_data(other):
            return _gated(reader, weights, other, key, node)
        if reader.has(axes, key) and reader.has(axes, reader.query):
            raise NotUnderstood("the weights over keys are multiplied with another tensor over keys", node)
        other = Coefficient(other, axes)
    return [replace(t, coefficients=(*t.coefficients, other)) for t in read_terms(reader, weights, key)]


def _kept(reader: ScoreReader, node: Node, key: Kind) -> list[Term]:
    """Weights that are set to 0 where a mask says so."""
    named = arguments(node)
    mask, other = (named[k] for k in (("mask", "value") if is_call(node, aten.masked_fill) else ("condition", "other")))
    if not reader.is_scores(named["self"]) or other != 0 or reader.inference.is_data(mask):
        raise NotUnderstood("the weights of this attention are no softmax over keys", node)
    keep = reader.emit(aten.logical_not.default, mask) if is_call(node, aten.masked_fill) else mask
    return _gated(reader, named["self"], keep, key, node)


def _gated(reader: ScoreReader, weights: Node, gate: Node, key: Kind, node: Node) -> list[Term]:
    """Weights times zeros and ones, in the layout that the scores have."""
    terms = read_terms(reader, weights, key)
    own = _names(reader, weights)
    if any(_names(reader, term.softmax.scores) != own for term in terms):
        raise NotUnderstood("weights over keys are masked after they were reshaped", node)
    return [replace(term, gates=(*term.gates, gate)) for term in terms]


def _names(reader: ScoreReader, node: Node) -> list[list[tuple[Kind, int]]]:
    """What each dim counts, heads by their names."""
    return [[(factor.kind, factor.tag) for factor in dim] for dim in reader.inference.axes(node)]
