"""Which nodes count positions, and how to compute them for tokens at any position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.fx_passes.graph import (
    HORIZON,
    CapturedGraph,
    arguments,
    aten,
    emit,
    expression,
    hold,
    is_call,
    shape_of,
    tensor_value,
)
from kvpass.fx_passes.shape_values import Dependence, ShapeEvaluator
from kvpass.fx_passes.symbolic.entry_reader import EntryReader
from kvpass.fx_passes.symbolic.extents import depends_on_extent_only
from kvpass.fx_passes.symbolic.index_terms import QUERY, SEQUENCE, Term, equals, weighted_sum, whole
from kvpass.fx_passes.symbolic.prove_terms import Prover
from kvpass.fx_passes.symbolic.term_values import evaluate
from kvpass.fx_passes.token_axis.axes import Axes, Factor, Kind, Mixed, label_by_size, plain
from kvpass.fx_passes.token_axis.axis_rules import AXIS_RULES
from kvpass.fx_passes.token_axis.infer_axes import Inference, infer_axes

PROBES = ((1, 3), (2, 8), (3, 17), (1, 2051))  # (batch, length)
USUAL = 33  # a length at which a count is taken for what it is meant to be
LONGEST_PROBE = 8192
SOURCE = "kvpass_positions"  # key in a node's meta: how its value follows from positions
NO_SOURCE = "kvpass_no_positions"  # key in a node's meta: why it, or what follows from it, is no such value


@dataclass(frozen=True)
class Counting:
    """A node whose value at token i is ``start + step * i``, in sequences of up to ``limit`` tokens."""

    start: float
    step: float
    limit: int | None = None

    def rebuild(self, captured: CapturedGraph, node: Node, positions: Node) -> Node:
        """The same for given positions, int64 ``[T]``."""
        val = node.meta["val"]
        current = positions
        if self.step != 1:
            current = emit(captured, aten.mul.Tensor, current, _number(self.step), like=node)
        if self.start != 0:
            current = emit(captured, aten.add.Tensor, current, _number(self.start), like=node)
        if current.meta["val"].dtype != val.dtype:
            current = emit(captured, aten._to_copy.default, current, dtype=val.dtype, like=node)
        return _in_shape(captured, node, current, ())


@dataclass(frozen=True)
class Lookup:
    """A node whose entry at token i, along one dim, is row ``start + i`` of a constant table."""

    table: Node
    dim: int
    start: int

    def rebuild(self, captured: CapturedGraph, node: Node, positions: Node) -> Node:
        """Rows of the table for given positions, int64 ``[T]``."""
        index = positions
        if self.start:
            index = emit(captured, aten.add.Tensor, positions, self.start, like=node)
        return emit(captured, aten.index_select.default, self.table, self.dim, index, like=node)


@dataclass(frozen=True, eq=False)
class Tabulated:
    """A node whose value at token i was computed once for all positions up to the table's length."""

    values: Tensor
    dim: int

    def rebuild(self, captured: CapturedGraph, node: Node, positions: Node) -> Node:
        """Rows of the table for given positions, int64 ``[T]``."""
        name = f"_positions_{node.name}"
        table = hold(captured, name, self.values)
        return emit(captured, aten.index_select.default, table, self.dim, positions, like=node)


PositionSource = Counting | Lookup | Tabulated


def position_sources(
    captured: CapturedGraph, kinds: dict[Node, Dependence], evaluator: ShapeEvaluator
) -> dict[Node, Axes]:
    """Nodes that count positions, with their axes; how they follow from positions is left in ``meta``.

    ``arange`` over the length and slices of tables by the length are read off the op. Everything else that no rule
    can follow (a cumulative sum of ones) is a source where it is proven to count, and is tabulated where the length
    says how large it is and nothing else, so that it is a function of the position alone.
    """
    found: dict[Node, Axes] = {}
    failed: set[Node] = set()
    for node in captured.graph.nodes:
        if kinds[node] is not Dependence.SHAPE or tensor_value(node) is None:
            continue
        source = _read_source(captured, kinds, node)
        if source is not None:
            node.meta[SOURCE] = source
            found[node] = _axes_of(captured, node)
    while True:
        inference = Inference(captured, kinds, dict(found), with_scores=True)
        infer_axes(inference, AXIS_RULES)
        candidates = [n for n in captured.graph.nodes if n not in failed and _may_count(inference, kinds, n)]
        # what rules cannot follow and has not one row per token (a mask) may still be summed up to one that does
        opaque = {n for n in inference.results if n in failed or not _has_one_length(captured, n)}
        origins = [n for n in candidates if _blamed(inference, n) is n or _blamed(inference, n) in opaque]
        if not origins:
            return found
        for node in origins:
            why = _prove(captured, evaluator, node)
            if why is None:
                found[node] = _axes_of(captured, node)
                continue
            failed.add(node)
            for one in (node, _blamed(inference, node)):
                if one is not None:
                    one.meta.setdefault(NO_SOURCE, why)


def longest_valid(evaluator: ShapeEvaluator, node: Node, upper: int) -> int:
    """Largest length up to ``upper`` at which a shape-only node can be evaluated and has its symbolic shape.

    A tabulated node must have the rows there that it had when it was probed.
    """
    source = node.meta.get(SOURCE)

    def works(length: int) -> bool:
        try:
            value = evaluator.evaluate(node, 1, length)
            expected = [evaluator.number(s, 1, length) for s in node.meta["val"].shape]
        except (IndexError, RuntimeError, ValueError):
            return False
        if list(value.shape) != expected or not isinstance(source, Tabulated):
            return list(value.shape) == expected
        common = min(length, source.values.shape[source.dim])
        return torch.equal(*(rows.narrow(source.dim, 0, common) for rows in (value, source.values)))

    return largest(works, upper)


def largest(works: Callable[[int], bool], upper: int) -> int:
    """Largest number up to ``upper`` for which ``works`` holds, given that it holds below some bound only."""
    if works(upper):
        return upper
    low, high = 0, upper
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle) else (low, middle)
    return low


def _read_source(captured: CapturedGraph, kinds: dict[Node, Dependence], node: Node) -> PositionSource | None:
    if node is captured.position_ids:
        return Counting(0, 1)
    named = arguments(node) if node.op == "call_function" else {}
    if is_call(node, aten.arange) and shape_of(node) == (captured.length,):
        start, step = named.get("start", 0), named.get("step", 1)
        if isinstance(start, (int, float)) and isinstance(step, (int, float)):
            return Counting(start, step)
    if not is_call(node, aten.slice, aten.narrow) or kinds[named["self"]] is not Dependence.CONSTANT:
        return None
    start = expression(named["start"] or 0)
    d = named["dim"] % len(shape_of(node))
    rows = shape_of(node)[d] == captured.length and named.get("step", 1) == 1
    return Lookup(named["self"], d, int(start)) if rows and start.is_number and start >= 0 else None


def _axes_of(captured: CapturedGraph, node: Node) -> Axes:
    source = node.meta[SOURCE]
    if isinstance(source, Lookup):
        return tuple((Factor(Kind.TOKEN, s),) if i == source.dim else plain(s) for i, s in enumerate(shape_of(node)))
    return label_by_size(shape_of(node), captured.batch, captured.length)


def _blamed(inference: Inference, node: Node) -> Node | None:
    """Where the rules stopped to follow what the node is computed from."""
    result = inference.results.get(node)
    return result.node if isinstance(result, Mixed) else None


def _may_count(inference: Inference, kinds: dict[Node, Dependence], node: Node) -> bool:
    """Whether a shape-only node that rules cannot follow has one entry, or one row, for each token."""
    result = inference.results.get(node)
    mixed = kinds[node] is Dependence.SHAPE and isinstance(result, Mixed)
    return mixed and _has_one_length(inference.captured, node)


def _has_one_length(captured: CapturedGraph, node: Node) -> bool:
    """Whether a tensor has one dim of the length, and of the batch size at most one."""
    shape = shape_of(node) if tensor_value(node) is not None else ()
    symbols = [s for s in shape if not s.is_number]
    return symbols.count(captured.length) == 1 and symbols.count(captured.batch) == len(symbols) - 1 <= 1


def _prove(captured: CapturedGraph, evaluator: ShapeEvaluator, node: Node) -> str | None:
    """Establish a source, by proof; else say why there is none."""
    with evaluator.deciding("the positions"):
        counted = _counted(captured, evaluator, node)
    if isinstance(counted, Counting):
        node.meta[SOURCE] = counted
        return None
    acts = depends_on_extent_only(evaluator, node)
    if acts is not None:
        return counted or f"it may change with the length of the sequence: {acts}"
    rows: list[Tensor] = []
    for batch, length in PROBES:
        try:
            with evaluator.deciding(None):
                value = evaluator.evaluate(node, batch, min(length, captured.max_length or length))
        except (IndexError, RuntimeError, ValueError):
            continue
        row = _one_sequence(captured, node, value)
        if row is None:
            return "it is no number at some place, or differs between the sequences of a batch"
        rows.append(row)
    if not rows:
        return "it has no value"
    dim = next(i for i, s in enumerate(shape_of(node)) if s == captured.length)
    longest = max(rows, key=lambda r: r.shape[dim])
    if any(not torch.equal(longest.narrow(dim, 0, r.shape[dim]), r) for r in rows):
        return "it changes with the length of the sequence"
    evaluator.record(node, "the positions")
    node.meta[SOURCE] = Tabulated(longest, dim)
    return None


def _counted(captured: CapturedGraph, evaluator: ShapeEvaluator, node: Node) -> Counting | str | None:
    """How a node counts, proven for every length; where that is refuted, a sentence that says at which."""
    prover = Prover()
    reader = EntryReader(captured, evaluator, prover)
    places = {1: whole(0), captured.batch: SEQUENCE, captured.length: QUERY}
    if any(size not in places for size in shape_of(node)):
        return None
    longest = captured.max_length or HORIZON
    try:
        value = reader.entry(node, tuple(places[size] for size in shape_of(node)))
        term = value.term
        if value.dtype == torch.bool or not term.names <= {"q", "S"}:
            return None
        usual = {"q": torch.arange(2), "S": torch.tensor(min(USUAL, longest))}
        start, following = (int(n) for n in evaluate(term, usual).expand(2))
        wanted = weighted_sum([(QUERY, following - start)], start)
        reach = prover.holds_up_to(equals(term, wanted), longest=longest)
        if reach.refuted is not None:
            return _refutation(prover, term, wanted, reach.refuted)
        limits = [prover.holds_up_to(condition, longest=longest).limit for condition in reader.conditions]
    except Exception:  # the graph is the user's, and torch may raise anything where it is computed piece by piece
        return None
    limit = min((limit for limit in limits if limit is not None), default=None)
    return Counting(start, following - start, limit) if reach.limit is None and limit != 0 else None


def _refutation(prover: Prover, term: Term, wanted: Term, longest: int) -> str | None:
    example = prover.refute(equals(term, wanted), longest=longest)
    if example is None:
        return None
    at = {name: torch.tensor(example.get(name, 0)) for name in ("q", "S")}
    found, usual = int(evaluate(term, at)), int(evaluate(wanted, at))
    return f"at a length of {example['S']} tokens position {example.get('q', 0)} is {found}, and not {usual}"


def _one_sequence(captured: CapturedGraph, node: Node, value: Tensor) -> Tensor | None:
    """The value without the batch, or None when sequences differ or values are not numbers."""
    for d, size in enumerate(shape_of(node)):
        if size == captured.batch:
            first = value.narrow(d, 0, 1)
            if not torch.equal(first.expand_as(value), value):
                return None
            value = first
    return value if value.dtype.is_complex or not torch.isnan(value).any() else None


def _in_shape(captured: CapturedGraph, node: Node, current: Node, rest: tuple[int, ...]) -> Node:
    """Positions ``[T]`` in the shape of the node: 1 for every dim but that of the tokens."""
    shape = [-1 if s == captured.length else 1 for s in shape_of(node)]
    return current if shape == [-1] else emit(captured, aten.reshape.default, current, shape, like=node)


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
