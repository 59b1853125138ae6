"""Read the graph of a mask, or of positions, as an expression in query, key and length.

:class:`EntryReader` answers what one entry of a shape-only node is, given the place of the entry as terms. Ops that
move entries translate the place; elementwise ops are in :mod:`kvpass.fx_passes.symbolic.entry_rules`; constants are
looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from kvpass.fx_passes.graph import CapturedGraph, arguments, aten, expression, is_symbolic_scalar, shape_of
from kvpass.fx_passes.shape_values import LIKES, NEW, Dependence, ShapeEvaluator, is_elementwise
from kvpass.fx_passes.symbolic.constant_lookup import look_up
from kvpass.fx_passes.symbolic.entry_moves import MOVES, joined
from kvpass.fx_passes.symbolic.entry_rules import LOGIC, RULES, cast, pointwise
from kvpass.fx_passes.symbolic.entry_values import Place, Value, counted, of_number, of_term, of_truth, select
from kvpass.fx_passes.symbolic.index_terms import (
    BATCH,
    LENGTH,
    RANGES,
    Term,
    UnreadableError,
    at_most,
    choose,
    equals,
    floor_divide,
    larger,
    less,
    minus,
    plus,
    remainder,
    smaller,
    times,
    var,
    whole,
)
from kvpass.fx_passes.symbolic.prove_terms import Prover


class EntryReader:
    """What the entries of shape-only nodes are.

    Attributes:
        conditions: what must hold of the places that were looked up; a graph has no value where one of them does not.
        notes: what was recognised on the way, for the report.
    """

    def __init__(self, captured: CapturedGraph, evaluator: ShapeEvaluator, prover: Prover) -> None:
        self.captured = captured
        self.evaluator = evaluator
        self.prover = prover
        self.conditions: list[Term] = []
        self.notes: dict[str, None] = {}
        self._known: dict[tuple[Node, Place], Value] = {}
        self._constants: dict[Node, Tensor] = {}
        self._fresh = 0

    def entry(self, node: Node, place: Place) -> Value:
        """The entry of a tensor node at ``place``, one term per dim.

        Raises:
            UnreadableError: if an op on the way has no reader or no exact form.
        """
        key = (node, place)
        if key not in self._known:
            self._known[key] = self._read(node, place)
        return self._known[key]

    def broadcast(self, node: Node, place: Place) -> Value:
        """The entry at the place of a result that ``node`` is broadcast to."""
        shape = shape_of(node)
        own = place[len(place) - len(shape) :]
        sizes = (self.number(size).value for size in shape)  # 1 - max(0, 1 - S) is 1, though it does not look it
        return self.entry(node, tuple(whole(0) if size == 1 else p for size, p in zip(sizes, own, strict=True)))

    def fresh(self) -> Term:
        """A position of its own."""
        self._fresh += 1
        return var(f"j{self._fresh}")

    def size(self, node: Node, dim: int) -> Term:
        """Entries along a dim."""
        return self.number(shape_of(node)[dim])

    def number(self, value: Any) -> Term:
        """A size, or a number computed from sizes, as a term."""
        return self._translated(expression(value))

    def _read(self, node: Node, place: Place) -> Value:
        if self.evaluator.kinds[node] is Dependence.DATA:
            raise UnreadableError("depends on the tokens")
        if self.evaluator.kinds[node] is Dependence.CONSTANT:
            if node not in self._constants:
                self._constants[node] = self.evaluator.evaluate(node, 1, 2)
            return look_up(self._constants[node], place, self.conditions)
        dtype = node.meta["val"].dtype
        if node is self.captured.position_ids:
            return of_term(dtype, place[1])
        packet = getattr(node.target, "overloadpacket", None)
        reader = READERS.get(packet)
        if reader is not None:
            return reader(self, node, place)
        if packet in NEW or packet in LIKES or packet in FULL:
            return self._filled(node, packet)
        if packet in RULES or packet in LOGIC or is_elementwise(node):
            return self._pointwise(node, place, dtype)
        raise UnreadableError(f"{node.target} has no reader")

    def _filled(self, node: Node, packet: object) -> Value:
        named = arguments(node)
        dtype = node.meta["val"].dtype
        value = FILLS.get(packet, named.get("fill_value"))
        if isinstance(value, Node):
            return cast(of_term(torch.int64, self.number(value)), dtype)
        if value is None:
            raise UnreadableError(f"{node.target} leaves its entries open")
        return of_number(dtype, value)

    def _pointwise(self, node: Node, place: Place, dtype: torch.dtype) -> Value:
        operands: list[Value] = []
        dtypes: list[torch.dtype | None] = []
        ranks: list[int] = []
        kwargs: dict[str, Any] = {}
        limits: list[str] = []
        for name, value in arguments(node).items():
            if isinstance(value, Node) and not is_symbolic_scalar(value):
                operands.append(self.broadcast(value, place))
                dtypes.append(value.meta["val"].dtype)
                ranks.append(len(shape_of(value)))
            elif name in OPERANDS and value is not None and not isinstance(value, str):
                scalar = self.number(value) if isinstance(value, Node) else None
                operands.append(of_term(torch.int64, scalar) if scalar is not None else _literal(value))
                dtypes.append(None)
                ranks.append(0)
            elif name not in OPERANDS:
                kwargs[name] = value
                continue
            else:
                continue
            if name in ("min", "max"):
                limits.append(name)
        target: Any = node.target
        if target.overloadpacket is aten.clamp:
            kwargs["bounds"] = tuple(limits)
            overload = target

            def clamp(x: Any, *ends: Any, bounds: tuple[str, ...]) -> Any:
                return overload(x, **dict(zip(bounds, ends, strict=True)))

            clamp.overloadpacket = aten.clamp  # type: ignore[attr-defined]
            target = clamp
        return pointwise(target, operands, dtypes, ranks, kwargs, dtype)

    def _translated(self, size: sympy.Basic) -> Term:
        if size == self.captured.length:
            return LENGTH
        if size == self.captured.batch:
            return BATCH
        if isinstance(size, sympy.Integer):
            return whole(int(size))
        inner = [self._translated(part) for part in size.args]
        fold = SIZE_FUNCTIONS.get(type(size).__name__)
        if fold is None or not inner:
            raise UnreadableError(f"the size {size} has no form")
        result = inner[0]
        for part in inner[1:]:
            result = fold(result, part)
        return result


def _literal(value: float) -> Value:
    return of_number({bool: torch.bool, int: torch.int64}.get(type(value), torch.float64), value)


def _arange(reader: EntryReader, node: Node, place: Place) -> Value:
    named = arguments(node)
    dtype = node.meta["val"].dtype
    start, step = named.get("start", 0), named.get("step", 1)
    if isinstance(start, float) or isinstance(step, float):
        if start != int(start) or step != int(step):
            raise UnreadableError("an arange of broken numbers")
        start, step = int(start), int(step)
    term = plus(reader.number(start), times(reader.number(step), place[0]))
    return cast(of_term(torch.int64, term), dtype)


def _where(reader: EntryReader, node: Node, place: Place) -> Value:
    named = arguments(node)
    dtype = node.meta["val"].dtype
    condition = reader.broadcast(named["condition"], place).truth
    shown, other = (_cast_operand(reader, named[k], place, dtype) for k in ("self", "other"))
    return select(condition, shown, other, dtype)


def _masked_fill(reader: EntryReader, node: Node, place: Place) -> Value:
    named = arguments(node)
    dtype = node.meta["val"].dtype
    condition = reader.broadcast(named["mask"], place).truth
    filled, kept = (_cast_operand(reader, named[k], place, dtype) for k in ("value", "self"))
    return select(condition, filled, kept, dtype)


def _cast_operand(reader: EntryReader, operand: Any, place: Place, dtype: torch.dtype) -> Value:
    if not isinstance(operand, Node):
        return of_number(dtype, operand)
    if is_symbolic_scalar(operand):
        return cast(of_term(torch.int64, reader.number(operand)), dtype)
    return cast(reader.broadcast(operand, place), dtype)


def _diff(reader: EntryReader, node: Node, place: Place) -> Value:
    """The step from each entry to the next, as masks take it of position ids to find packed sequences."""
    named = arguments(node)
    source, dtype = named["self"], node.meta["val"].dtype
    dim = int(named["dim"]) % len(place)
    if named["n"] != 1 or dtype == torch.bool:
        raise UnreadableError("a difference of differences")
    parts = [part for part in (named["prepend"], source, named["append"]) if part is not None]
    after = (*place[:dim], plus(place[dim], whole(1)), *place[dim + 1 :])
    values = [joined(reader, parts, dim, at, dtype).term for at in (after, place)]
    return of_term(dtype, minus(*values))


def _cumsum(reader: EntryReader, node: Node, place: Place) -> Value:
    """A sum of entries that are all equal, as in counted positions, or all 0, as in the ids of one packed sequence."""
    source: Any = node.args[0]
    dtype = node.meta["val"].dtype
    dim = int(arguments(node)["dim"]) % len(place)
    summed = reader.fresh()
    (name,) = summed.names
    entry = reader.entry(source, (*place[:dim], summed, *place[dim + 1 :]))
    term = counted(entry)
    if name in term.names:
        if reader.size(source, dim) != LENGTH:
            raise UnreadableError("a running sum over something else than the tokens")
        start = counted(reader.entry(source, (*place[:dim], whole(0), *place[dim + 1 :])))
        constant = start if start.op == "int" else whole(0)
        if not reader.prover.proves(equals(term, constant)):
            raise UnreadableError("a running sum of entries that differ")
        if entry.dtype == torch.bool and constant == whole(0):
            reader.notes["packed-sequence detection, one sequence"] = None
        term = constant
    return cast(of_term(torch.int64, times(term, plus(place[dim], whole(1)))), dtype)


def _sum(reader: EntryReader, node: Node, place: Place) -> Value:
    """A sum of entries that are all equal, or that are 1 up to a place and 0 behind it, as keys that are seen."""
    named = arguments(node)
    source, dims = named["self"], named.get("dim")
    if isinstance(dims, list | tuple) and len(dims) == 1:
        (dims,) = dims
    if not isinstance(dims, int):
        raise UnreadableError("a sum over several dims")
    dim, summed = dims % len(shape_of(source)), reader.fresh()
    rest = [p for d, p in enumerate(place) if not (named.get("keepdim") and d == dim)]
    term = counted(reader.entry(source, (*rest[:dim], summed, *rest[dim:])))
    size, dtype = reader.size(source, dim), node.meta["val"].dtype
    if not term.names & summed.names:
        return cast(of_term(torch.int64, times(term, size)), dtype)
    for other in rest if size == LENGTH else []:
        if other.op == "var" and other.args[0] not in RANGES:
            shown = choose(at_most(summed, other), whole(1), whole(0))
            if reader.prover.proves(equals(term, shown)):
                return cast(of_term(torch.int64, plus(other, whole(1))), dtype)
    raise UnreadableError("a sum of entries that differ")


def _any_or_all(reader: EntryReader, node: Node, place: Place) -> Value:
    """``any`` and ``all`` of entries that are all equal."""
    source: Any = node.args[0]
    shape = shape_of(source)
    dims = arguments(node).get("dim")
    reduced = {
        d % len(shape) for d in (range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims)
    }
    rest = (
        iter(place)
        if not arguments(node).get("keepdim")
        else iter([p for d, p in enumerate(place) if d not in reduced])
    )
    inner = tuple(reader.fresh() if d in reduced else next(rest) for d in range(len(shape)))
    if not all(reader.prover.proves(less(whole(0), reader.size(source, d))) for d in reduced):
        raise UnreadableError("any or all of entries that may be none")
    truth = reader.entry(source, inner).truth
    if truth.names & {name for d in reduced for name in inner[d].names}:
        raise UnreadableError("any or all of entries that differ")
    return of_truth(truth)


FULL = {aten.full, aten.ones, aten.zeros, aten.scalar_tensor}
FILLS: dict[object, float] = {
    **dict.fromkeys((aten.ones, aten.new_ones, aten.ones_like), 1),
    **dict.fromkeys((aten.zeros, aten.new_zeros, aten.zeros_like), 0),
}
# Arguments of elementwise ops that are operands, though they may be numbers.
OPERANDS = {"self", "other", "input", "min", "max", "exponent", "end", "weight"}

READERS: dict[object, Callable[[EntryReader, Node, Place], Value]] = {
    **MOVES,
    aten.arange: _arange,
    aten.where: _where,
    aten.masked_fill: _masked_fill,
    aten.diff: _diff,
    aten.cumsum: _cumsum,
    aten.sum: _sum,
    **dict.fromkeys((aten.any, aten.all), _any_or_all),
}

SIZE_FUNCTIONS: dict[str, Callable[[Term, Term], Term]] = {
    "Add": plus,
    "Mul": times,
    "Max": larger,
    "Min": smaller,
    "FloorDiv": floor_divide,
    "CleanDiv": floor_divide,
    "Mod": remainder,
    "PythonMod": remainder,
}
