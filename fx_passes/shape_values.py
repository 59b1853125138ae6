"""What a node depends on, and the values of those that depend on shapes alone.

Masks, biases and positions are computed from sizes, ``arange`` and constants. They can be evaluated at any batch size
and length without running the model: that is how kvpass learns what they mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from kvpass.fx_passes.evaluate import Policy, evaluate_node
from kvpass.fx_passes.graph import (
    CapturedGraph,
    Role,
    arguments,
    aten,
    expression,
    is_call,
    module_path,
    read_attribute,
    record_values,
    role_of,
    tensor_value,
)
from kvpass.fx_passes.op_facts.facts import OpKind
from kvpass.fx_passes.op_facts.table import FACTS, facts_of


class Dependence(Enum):
    """What the values of a node depend on."""

    CONSTANT = 0  # parameters, buffers and literals
    SHAPE = 1  # batch size and length as well
    DATA = 2  # the tokens, or random numbers


NEW = {aten.new_ones, aten.new_zeros, aten.new_full, aten.new_empty, aten.new_empty_strided}
LIKES = {aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like}


KNOWN = ("aten", "prims", "kvpass")  # namespaces of ops that are functions of their operands
# What is known of an input without its values; all others are data.
OF_INPUTS: dict[Role | None, Dependence] = {
    Role.POSITIONS: Dependence.SHAPE,
    Role.MASK_OF_ONES: Dependence.SHAPE,
    Role.SIZE: Dependence.SHAPE,
    Role.PARAMETER: Dependence.CONSTANT,
}


class CannotEvaluate(Exception):
    """A node's value depends on more than shapes."""


def reads_shape_only(node: Node) -> bool:
    """Whether the op takes nothing from its tensor input but shape, dtype and device."""
    facts = facts_of(node.target)
    return facts is not None and facts.fresh


def is_random(node: Node) -> bool:
    """Whether the op draws random numbers."""
    if is_call(node, aten.scaled_dot_product_attention) and not arguments(node)["dropout_p"]:
        return False
    facts = facts_of(node.target)
    return (facts is not None and facts.random) or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def is_elementwise(node: Node) -> bool:
    """Whether each entry follows from the entries of the operands at its place; of ops of torch itself only."""
    facts = FACTS.get(node.target.overloadpacket) if isinstance(node.target, OpOverload) else None
    return facts is not None and facts.kind is OpKind.POINTWISE


def is_unknown(node: Node) -> bool:
    """Whether an op is neither torch's nor declared: it may remember its calls, and be no function of its operands."""
    target = node.target
    return isinstance(target, OpOverload) and target.namespace not in KNOWN and facts_of(target) is None


def classify(captured: CapturedGraph) -> dict[Node, Dependence]:
    """What every node of the graph depends on. Position ids count as shapes: they are 0, 1, 2, ..."""
    kinds: dict[Node, Dependence] = {}
    for node in captured.graph.nodes:
        if node.op == "get_attr":
            kind = Dependence.CONSTANT
        elif node.op == "placeholder":
            kind = OF_INPUTS.get(role_of(node), Dependence.DATA)
        elif node.op == "output" or is_random(node) or is_unknown(node):
            kind = Dependence.DATA
        elif reads_shape_only(node):
            kind = Dependence.SHAPE
        else:
            kind = max((kinds[n] for n in node.all_input_nodes), key=lambda k: k.value, default=Dependence.CONSTANT)
        kinds[node] = kind
    return kinds


def shape_evaluator(captured: CapturedGraph) -> ShapeEvaluator:
    """The evaluator of a graph; an analysis."""
    return ShapeEvaluator(captured, captured.analysis(classify))


class ShapeEvaluator:
    """Evaluates shape-only nodes at a batch size and length of choice.

    Every tensor that is read on the way is noted in the ledger of the graph, but where :meth:`deciding` says that its
    values decide nothing.
    """

    def __init__(self, captured: CapturedGraph, kinds: dict[Node, Dependence]) -> None:
        self.captured = captured
        self.kinds = kinds
        self.order = {node: i for i, node in enumerate(captured.graph.nodes)}
        self._decides: str | None = "a constant"

    @contextmanager
    def deciding(self, what: str | None) -> Iterator[None]:
        """Say what the values that are read meanwhile decide; None where nothing, or what is recorded later does."""
        before, self._decides = self._decides, what
        try:
            yield
        finally:
            self._decides = before

    def record(self, node: Node, what: str) -> None:
        """Note in the ledger that all that a shape-only node is computed from decided something."""
        self._record(node, self.needed(node), what)

    def _record(self, node: Node, needed: set[Node], what: str) -> None:
        path = module_path(node, self.captured)
        record_values(self.captured, needed, f"{what} of {path}" if path else what)

    def evaluate(self, node: Node, batch: int, length: int) -> Tensor:
        """Value of a shape-only tensor node.

        Raises:
            CannotEvaluate: if it depends on the tokens or on random numbers.
            Exception: whatever its ops raise, for example where a table is too short for ``length``.
        """
        return self.evaluate_all([node], batch, length)[node]

    def evaluate_all(self, nodes: list[Node], batch: int, length: int) -> dict[Node, Tensor]:
        """Values of several shape-only tensor nodes, their common part computed once."""
        needed: set[Node] = set()
        for node in nodes:
            own = self.needed(node)
            needed |= own
            if self._decides is not None:
                self._record(node, own, self._decides)
        ordered = sorted(needed, key=self.order.__getitem__)
        uses = {n: sum(m in needed for m in n.users) + (n in nodes) for n in ordered}
        env: dict[Node, Any] = {}
        with torch.no_grad():
            for node in ordered:
                env[node] = self._run(node, env, batch, length)
                for used in node.all_input_nodes:
                    if used in uses:
                        uses[used] -= 1
                        if not uses[used]:
                            env.pop(used, None)
        return {node: env[node] for node in nodes}

    def needed(self, node: Node) -> set[Node]:
        """The nodes whose values a shape-only node is computed from, itself included."""
        found: set[Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            if current in found:
                continue
            if self.kinds[current] is Dependence.DATA:
                raise CannotEvaluate(f"{current} depends on the tokens or on random numbers")
            found.add(current)
            if not reads_shape_only(current):
                stack.extend(current.all_input_nodes)
            else:
                stack.extend(n for n in current.all_input_nodes if tensor_value(n) is None)
        return found

    def _run(self, node: Node, env: dict[Node, Any], batch: int, length: int) -> Any:
        if node.op == "get_attr":
            return read_attribute(self.captured.module, str(node.target))
        if node is self.captured.position_ids:
            device = node.meta["val"].device
            return torch.arange(length, device=device).expand(batch, length)
        val = node.meta.get("val")
        if isinstance(val, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self.number(val, batch, length)
        return evaluate_node(node, env, Policy(lambda n: self._stand_in(n, batch, length)))

    def _stand_in(self, node: Node, batch: int, length: int) -> Tensor:
        """An empty tensor of the shape, dtype and device of a node whose values do not matter."""
        val = tensor_value(node)
        if val is None:
            raise CannotEvaluate(f"{node} is no tensor")
        shape = [self.number(s, batch, length) for s in val.shape]
        return torch.empty(shape, dtype=val.dtype, device=val.device)

    def number(self, value: Any, batch: int, length: int) -> Any:
        """A symbolic number at a batch size and length."""
        result = expression(value).subs({self.captured.batch: batch, self.captured.length: length})
        truth = isinstance(result, sympy.logic.boolalg.BooleanAtom)
        if not truth and not result.is_number:
            raise CannotEvaluate(f"the size {value} depends on the tokens")
        if truth:
            return bool(result)
        return float(result) if isinstance(value, torch.SymFloat) else int(result)
