"""Which nodes count positions, and how to compute them for tokens at any position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.fx_passes.graph import (
    CapturedGraph,
    arguments,
    aten,
    emit,
    expression,
    is_call,
    numbers_in,
    shape_of,
    tensor_value,
)
from kvpass.fx_passes.shape_values import Dependence, ShapeEvaluator, reads_shape_only
from kvpass.fx_passes.token_axis.axes import Axes, Factor, Kind, Mixed, label_by_size, plain
from kvpass.fx_passes.token_axis.axis_rules import AXIS_RULES
from kvpass.fx_passes.token_axis.infer_axes import Inference, computes_with_sizes, infer_axes

PROBES = ((1, 3), (2, 8), (3, 17), (1, 2051))  # (batch, length)
LONGEST_PROBE = 8192
SOURCE = "kvpass_positions"  # key in a node's meta: how its value follows from positions


@dataclass(frozen=True)
class Counting:
    """A node whose value at token i is ``start + step * i``."""

    start: float
    step: float

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
        captured.module.register_buffer(name, self.values, persistent=False)
        table = captured.graph.get_attr(name)
        table.meta["val"] = captured.fake_mode.from_tensor(self.values, static_shapes=True)
        rows = emit(captured, aten.index_select.default, table, self.dim, positions, like=node)
        return rows


PositionSource = Counting | Lookup | Tabulated


def position_sources(
    captured: CapturedGraph, kinds: dict[Node, Dependence], evaluator: ShapeEvaluator
) -> dict[Node, Axes]:
    """Nodes that count positions, with their axes; how they follow from positions is left in ``meta``.

    ``arange`` over the length and slices of tables by the length are read off the op. Everything else that no rule
    can follow (a cumulative sum of ones) is evaluated: when it counts, it is a source; when it is some other function
    of the position alone, it is tabulated.
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
            if _by_value(captured, evaluator, node):
                found[node] = _axes_of(captured, node)
            else:
                failed.add(node)


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


def _by_value(captured: CapturedGraph, evaluator: ShapeEvaluator, node: Node) -> bool:
    """Establish a source from the values at several sizes, some of them beyond every constant that is involved."""
    needed = evaluator.needed(node)
    numbers = numbers_in(needed, captured)
    thresholds = sorted(n for n in numbers if n <= LONGEST_PROBE)
    # it may count on until a bound that no probe reaches, and as slowly as the length tells
    beyond = max(numbers, default=0) > LONGEST_PROBE or any(_takes_length(n) for n in needed)
    upper = captured.max_length or LONGEST_PROBE + 3
    probes = [(b, min(n, upper)) for b, n in (*PROBES, *((1, n + 3) for n in thresholds[-3:]))]
    dim = next(i for i, s in enumerate(shape_of(node)) if s == captured.length)
    rows: list[Tensor] = []
    for batch, length in probes:
        try:
            value = evaluator.evaluate(node, batch, length)
        except (IndexError, RuntimeError, ValueError):
            continue
        row = _one_sequence(captured, node, value)
        if row is None:
            return False
        rows.append(row)
    if not rows:
        return False
    longest = max(rows, key=lambda r: r.shape[dim])
    if any(not torch.equal(longest.narrow(dim, 0, r.shape[dim]), r) for r in rows):
        return False
    node.meta[SOURCE] = (None if beyond else _counting(longest)) or Tabulated(longest, dim)
    return True


def _takes_length(node: Node) -> bool:
    """Whether the batch size or length takes part in the arithmetic, as a number or as a sum over all tokens."""
    if node.op != "call_function" or tensor_value(node) is None or reads_shape_only(node):
        return False
    lengths = [
        any(not s.is_number for s in shape_of(n)) for n in (node, *node.all_input_nodes) if tensor_value(n) is not None
    ]
    return computes_with_sizes(arguments(node)) or (any(lengths) and not lengths[0])


def _one_sequence(captured: CapturedGraph, node: Node, value: Tensor) -> Tensor | None:
    """The value without the batch, or None when sequences differ or values are not numbers."""
    for d, size in enumerate(shape_of(node)):
        if size == captured.batch:
            first = value.narrow(d, 0, 1)
            if not torch.equal(first.expand_as(value), value):
                return None
            value = first
    return value if value.dtype.is_complex or not torch.isnan(value).any() else None


def _counting(value: Tensor) -> Counting | None:
    flat = value.flatten()
    if value.dtype == torch.bool or value.dtype.is_complex or max(value.shape) != flat.numel():
        return None
    start = flat[0].item()
    counted = torch.arange(flat.numel(), device=flat.device) + start
    return Counting(start, 1) if torch.equal(counted.to(flat.dtype), flat) else None


def _in_shape(captured: CapturedGraph, node: Node, current: Node, rest: tuple[int, ...]) -> Node:
    """Positions ``[T]`` in the shape of the node: 1 for every dim but that of the tokens."""
    shape = [-1 if s == captured.length else 1 for s in shape_of(node)]
    return current if shape == [-1] else emit(captured, aten.reshape.default, current, shape, like=node)


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
