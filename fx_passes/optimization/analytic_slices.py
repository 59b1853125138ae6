"""The part of a paged graph between one node and another, as a function that can be evaluated on any numbers."""

from __future__ import annotations

import enum
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.fx_passes.evaluate import Policy, evaluate
from kvpass.fx_passes.graph import (
    CapturedGraph,
    Role,
    arguments,
    aten,
    expression,
    is_call,
    role_of,
    shape_of,
    tensor_value,
)
from kvpass.fx_passes.op_facts.table import ops_that

ANALYTIC = ops_that("analytic")


class Origin(enum.IntEnum):
    """What a node depends on; an op on several depends on the last of them."""

    SIZES = 0
    CONSTANTS = 1
    POSITIONS = 2
    TOKENS = 3


def origins_of(captured: CapturedGraph) -> dict[Node, Origin]:
    """The origin of every node of a paged step. Whatever is handed in but positions counts as tokens."""
    found: dict[Node, Origin] = {}
    for node in captured.graph.nodes:
        if node.op == "get_attr":
            found[node] = Origin.CONSTANTS
        elif node.op == "placeholder":
            found[node] = Origin.POSITIONS if role_of(node) is Role.POSITIONS else Origin.TOKENS
        elif isinstance(node.meta.get("val"), (torch.SymInt, int)):
            found[node] = Origin.SIZES
        else:
            found[node] = max((found[n] for n in node.all_input_nodes), default=Origin.CONSTANTS)
    return found


@dataclass(frozen=True, eq=False)
class Segment:
    """A function of one node that depends on tokens, of constants and of positions.

    Attributes:
        captured: the graph.
        source: the node that it is a function of.
        result: the node that it gives.
        body: the nodes in between, in order, ``result`` the last.
        inputs: nodes it reads besides, that depend on constants or positions alone.
    """

    captured: CapturedGraph
    source: Node
    result: Node
    body: tuple[Node, ...]
    inputs: tuple[Node, ...]

    def sizes(self, node: Node, tokens: int) -> list[int]:
        """Shape of a node in a step of so many tokens."""
        return [self._number(size, tokens) for size in shape_of(node)]

    def _number(self, value: Any, tokens: int) -> int:
        return int(expression(value).subs({self.captured.batch: 1, self.captured.length: tokens}))

    def evaluate(self, given: Mapping[Node, Tensor], tokens: int) -> Tensor:
        """The result in float64, or complex128, for values of ``source`` and ``inputs``."""
        values: dict[Node, Any] = dict(given)
        widened = Policy(
            lambda node: self._number(node, tokens), changed=lambda name, v: _widest(v) if name == "dtype" else v
        )
        evaluate(self.body, values, widened)
        result = values[self.result]
        assert isinstance(result, Tensor)
        return result

    def key(self) -> tuple[object, ...]:
        """What is computed, with nodes by their place: equal for the layers of a model."""
        places = {n: i for i, n in enumerate((self.source, *self.inputs, *self.body))}
        shapes = tuple(str(shape_of(n)) for n in (self.source, *self.inputs))

        def written(value: Any) -> str:
            numbered = torch.fx.node.map_arg(value, lambda n: f"n{places[n]}" if n in places else str(expression(n)))
            return repr(numbered)

        return shapes, tuple((str(n.target), written(n.args), written(dict(n.kwargs))) for n in self.body)


def segments_before(captured: CapturedGraph, origins: Mapping[Node, Origin], result: Node) -> list[Segment]:
    """Segments that end at ``result``, for every node that it is a function of; the longest first."""
    reached, stack = {result}, [result]
    while stack:
        node = stack.pop()
        if not _is_analytic(node):
            continue
        for operand in node.all_input_nodes:
            if origins[operand] is Origin.TOKENS and operand not in reached:
                reached.add(operand)
                stack.append(operand)
    sources = sorted(reached - {result})  # nodes compare by their place in the graph
    found = [_segment(captured, origins, source, result) for source in sources if tensor_value(source) is not None]
    return [segment for segment in found if segment is not None]


def _segment(captured: CapturedGraph, origins: Mapping[Node, Origin], source: Node, result: Node) -> Segment | None:
    """The segment between two nodes; None if tokens come in by another way."""
    body: set[Node] = set()
    inputs: set[Node] = set()
    stack = [result]
    while stack:
        node = stack.pop()
        if node is source or node in body or node in inputs or origins[node] is Origin.SIZES:
            continue
        if origins[node] is not Origin.TOKENS:
            inputs.add(node)
        elif _is_analytic(node) and node > source:
            body.add(node)
            stack.extend(node.all_input_nodes)
        else:
            return None
    return Segment(captured, source, result, tuple(sorted(body)), tuple(sorted(inputs)))


def _is_analytic(node: Node) -> bool:
    if node.target is operator.getitem:
        return True
    if is_call(node, aten.rms_norm):
        return arguments(node)["eps"] is not None  # else it is that of the dtype
    if not is_call(node, *ANALYTIC):
        return False
    dtype = node.kwargs.get("dtype")
    return dtype is None or (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex))


def _widest(dtype: Any) -> Any:
    if dtype is None:
        return None
    return torch.complex128 if dtype.is_complex else torch.float64


def numbers_of(body: Sequence[Node]) -> list[float]:
    """Numbers with a fraction that ops compute with, each once."""
    found: dict[float, None] = {}
    for node in body:
        for value in (*node.args, *node.kwargs.values()):
            if isinstance(value, float):
                found[value] = None
    return list(found)
