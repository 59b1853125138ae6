"""Whether batch size and length say how large a tensor is, and nothing else.

An entry of such a tensor is a function of its place alone. So the tensor at a length is the corner of the tensor at any
longer one: evaluated once, it is exact for every shorter sequence. :class:`Extents` follows along which dims the
entries of each node vary; what brings a size into the entries themselves (as a number, by counting from the end, by
working along a dim of that size) has no answer, and neither has an op that is not in the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from kvpass.fx_passes.graph import arguments, aten, expression, is_symbolic_scalar, shape_of, tensor_value
from kvpass.fx_passes.shape_values import LIKES, NEW, CannotEvaluate, Dependence, ShapeEvaluator, is_elementwise
from kvpass.fx_passes.symbolic.entry_reader import EntryReader
from kvpass.fx_passes.symbolic.entry_values import counted
from kvpass.fx_passes.symbolic.extent_moves import ActsError, Dims
from kvpass.fx_passes.symbolic.extent_rules import RULES
from kvpass.fx_passes.symbolic.index_terms import QUERY, SEQUENCE, Term, UnreadableError, equals, less, whole
from kvpass.fx_passes.symbolic.prove_terms import Prover

FILLED = {*NEW, *LIKES, aten.full, aten.ones, aten.zeros, aten.scalar_tensor}
EMPTY = {aten.new_empty, aten.new_empty_strided, aten.empty_like}


def depends_on_extent_only(evaluator: ShapeEvaluator, node: Node) -> str | None:
    """None where the entries of a shape-only node are functions of their places, equal for all sequences of a batch.

    Else what is in the way, to be read after "... may change with the length of the sequence: ".
    """
    captured = evaluator.captured
    try:
        varies = Extents(evaluator).varies(node)
    except ActsError as acts:
        return str(acts)
    except CannotEvaluate as error:
        return str(error)
    for dim, size in enumerate(shape_of(node)):
        if not size.is_number and size not in (captured.length, captured.batch):
            return f"it has a dim of {size} entries"
        if size == captured.batch and dim in varies:
            return "it differs between the sequences of a batch"
    return None


class Extents:
    """Along which dims the entries of shape-only nodes vary."""

    def __init__(self, evaluator: ShapeEvaluator) -> None:
        self.evaluator = evaluator
        self.captured = evaluator.captured
        self._known: dict[Node, Dims | ActsError] = {}

    def varies(self, node: Node) -> Dims:
        """Dims along which entries may differ; along all others they are equal.

        Raises:
            ActsError: naming the first op that brings a size into the entries.
        """
        if node not in self._known:
            for each in sorted(self.evaluator.needed(node), key=self.evaluator.order.__getitem__):
                if each not in self._known:
                    self._known[each] = self._followed(each)
        found = self._known[node]
        if isinstance(found, ActsError):
            raise found
        return found

    def number(self, value: Any) -> float | None:
        """A number that is the same for every batch and length; None for any other."""
        if isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) or is_symbolic_scalar(value):
            found = expression(value)
            return float(found) if found.is_number else None
        return None

    def fixed(self, node: Node, dim: int) -> bool:
        """Whether a dim has the same size for every batch and length."""
        return bool(shape_of(node)[dim].is_number)

    def aligned(self, operand: Node, result: Node, dims: Dims | None = None) -> Dims:
        """The dims along which an operand varies, as dims of the result that it is broadcast to."""
        mine, whole_shape = shape_of(operand), shape_of(result)
        shift = len(whole_shape) - len(mine)
        varies = self.varies(operand) if dims is None else dims
        if any(mine[d] != whole_shape[d + shift] for d in varies):
            raise ActsError(result, "broadcasts along it")
        return frozenset(d + shift for d in varies)

    def never_negative(self, node: Node) -> bool:
        """Whether whole numbers are known not to be negative."""
        if node.op != "call_function":
            return node is self.captured.position_ids or self._is_positive_constant(node)
        val, named = tensor_value(node), arguments(node)
        packet = getattr(node.target, "overloadpacket", None)
        if val is None or val.dtype != torch.int64:
            return False
        if packet is aten.arange:
            start, step = (self.number(named.get(key, default)) for key, default in (("start", 0), ("step", 1)))
            return start is not None and step is not None and min(start, step) >= 0 and max(start, step) < 2**31
        if packet in (aten.clamp, aten.clamp_min):
            least, most = self.number(named.get("min")), named.get("max")
            return least is not None and least >= 0 and (most is None or (self.number(most) or -1) >= 0)
        if packet is aten.remainder:
            return (self.number(named["other"]) or 0) > 0
        if packet in KEEPS_SIGN:
            return self.never_negative(named["self"])
        return self._is_positive_constant(node)

    def vanishes(self, node: Node, dim: int, beyond: int) -> bool:
        """Whether whole numbers, or truth values, are proven to be 0 behind the place along dim ``beyond``.

        A sum along ``dim`` is then one over the places up to that one, whatever the length.
        """
        val = tensor_value(node)
        if val is None or val.dtype.is_floating_point or val.dtype.is_complex:
            return False
        shape, length = shape_of(node), self.captured.length
        reader = EntryReader(self.captured, self.evaluator, Prover())
        summed = reader.fresh()
        at: dict[Any, Term] = {1: whole(0), self.captured.batch: SEQUENCE}
        if shape[dim] != length or shape[beyond] != length or any(size not in {length, *at} for size in shape):
            return False
        place = [at.get(size) or reader.fresh() for size in shape]
        place[dim], place[beyond] = summed, QUERY
        try:
            claim = equals(counted(reader.entry(node, tuple(place))), whole(0))
        except UnreadableError:
            return False
        return reader.prover.proves(claim, [less(QUERY, summed)]) and all(map(reader.prover.proves, reader.conditions))

    def _is_positive_constant(self, node: Node) -> bool:
        if self.evaluator.kinds[node] is not Dependence.CONSTANT:
            return False
        return bool((self.evaluator.evaluate(node, 1, 2) >= 0).all())

    def _followed(self, node: Node) -> Dims | ActsError:
        try:
            found = self._rule(node)
            shape = shape_of(node) if tensor_value(node) is not None else ()
            return frozenset(d for d in found if not shape or shape[d] != 1)
        except ActsError as acts:
            return acts
        except Exception:  # an overload that a rule does not know, whatever it lacks
            return ActsError(node, "is written in a way that is not known")

    def _rule(self, node: Node) -> Dims:
        if tensor_value(node) is None:  # numbers, and several results at once, are followed to where they are used
            return frozenset()
        if self.evaluator.kinds[node] is Dependence.CONSTANT:
            return frozenset(range(len(shape_of(node))))
        if node is self.captured.position_ids:
            return frozenset({1})
        named = arguments(node)
        packet = getattr(node.target, "overloadpacket", None)
        if packet in FILLED:
            return self._filled(node, named)
        rule = RULES.get(packet if packet is not None else node.target)
        if rule is not None:
            return rule(self, node, named)
        if is_elementwise(node):
            return self._elementwise(node, named)
        raise ActsError(node, "is an op of which nothing is known")

    def _filled(self, node: Node, named: dict[str, Any]) -> Dims:
        packet = getattr(node.target, "overloadpacket", None)
        if packet in EMPTY:
            raise ActsError(node, "leaves its entries open")
        if any(key in named and self.number(named[key]) is None for key in ("fill_value", "s")):
            raise ActsError(node, "takes it for a number")
        return frozenset()

    def _elementwise(self, node: Node, named: dict[str, Any]) -> Dims:
        varies: Dims = frozenset()
        for value in _leaves(named):
            if isinstance(value, Node) and tensor_value(value) is not None:
                varies |= self.aligned(value, node)
            elif _is_size(value) and self.number(value) is None:
                raise ActsError(node, "computes with it as a number")
        return varies


def _is_size(value: object) -> bool:
    return isinstance(value, Node | torch.SymInt | torch.SymFloat | torch.SymBool)


def _leaves(named: dict[str, Any]) -> Iterator[Any]:
    for value in named.values():
        yield from value if isinstance(value, list | tuple) else [value]


KEEPS_SIGN = {
    aten.unsqueeze, aten.squeeze, aten.expand, aten.reshape, aten.view, aten.permute, aten.transpose, aten.slice,
    aten.select, aten.clone, aten.alias, aten._to_copy, aten.detach,
}  # fmt: skip
