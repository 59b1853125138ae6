"""The graph that the passes share, and the few things that every pass asks of it.

A :class:`CapturedGraph` is an ATen graph of one whole forward: placeholders are the model's inputs, parameters and
buffers are ``get_attr`` nodes, and every node carries a fake tensor in ``meta["val"]`` whose shape is written in the
two symbols of the capture, batch and length.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, TypeVar

import sympy
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from kvpass.fx_passes.op_facts.table import facts_of
from kvpass.fx_passes.value_ledger import ValueLedger
from kvpass.types import Refusal

aten = torch.ops.aten
T = TypeVar("T")
FULL = 2**63 - 1  # how ATen writes "to the end" in a slice
HORIZON = 2**22  # proofs speak of sequences of up to this many tokens, 4 Mi
DEFAULT_TABLE_LENGTH = 2048  # positions that a table covers where nobody says how many


ROLE = "kvpass_role"  # key in a placeholder's meta


class Role(Enum):
    """What a graph's input is: passes go by it, and never by an input's name or place."""

    TOKENS = "token ids, int64 [batch, length]"
    POSITIONS = "the position of each token, int64 [batch, length], or [T] in a step"
    MASK_OF_ONES = "a padding mask [batch, length] of sequences that have no padding"
    PER_TOKEN_DATA = "anything else that each token brings along [batch, length, ...]"
    PARAMETER = "a parameter or buffer of the model"
    SIZE = "a number of the shape of another input"
    STEP = "what a step says of its tokens: slots, block tables, lengths"
    CACHE = "a tensor of a cache"


def role_of(node: Node) -> Role | None:
    """The role of a placeholder; None for any other node."""
    found = node.meta.get(ROLE) if node.op == "placeholder" else None
    return found if isinstance(found, Role) else None


class LogitsRows(Enum):
    """What a model returns for token ids ``[B, S]``."""

    EVERY = "[batch, length, vocabulary]"
    MERGED = "[batch * length, vocabulary]"
    LAST = "[batch, 1, vocabulary] or [batch, vocabulary], of the last token"


@dataclass
class CapturedGraph:
    """One captured forward.

    Attributes:
        module: the graph and the tensors it reads; the tensors are the model's own, not copies.
        batch: symbol of the batch size in every node's shape.
        length: symbol of the number of tokens in every node's shape.
        inputs: the placeholders that have a role of their own: token ids, and positions where the model demands them.
        max_length: longest sequence that the capture allows, where the model limits it.
        path_prefix: module path of the adapter around the user's model, left out of reports.
        export_seconds: time that torch.export took.
        forbidden_tokens: ids that no sequence may contain: what was proven holds without them.
        rows: which rows of logits the model returns; the graph returns all of them.
        declared: ops that are taken for what their owner declared them to be.
        ledger: the tensors whose values decided something.
    """

    module: GraphModule
    batch: sympy.Symbol
    length: sympy.Symbol
    inputs: dict[Role, Node]
    max_length: int | None = None
    path_prefix: str = ""
    size_nodes: dict[str, Node] = field(default_factory=dict)
    export_seconds: float = 0.0
    forbidden_tokens: frozenset[int] = frozenset()
    rows: LogitsRows = LogitsRows.EVERY
    declared: tuple[str, ...] = ()
    ledger: ValueLedger = field(default_factory=ValueLedger)
    analyses: dict[Callable[[CapturedGraph], Any], Any] = field(default_factory=dict, repr=False)

    @property
    def captured(self) -> CapturedGraph:
        """Itself: passes take a graph, or a state that holds one."""
        return self

    @property
    def input_ids(self) -> Node:
        """The placeholder of the token ids."""
        return self.inputs[Role.TOKENS]

    @property
    def position_ids(self) -> Node | None:
        """The placeholder of the positions, where the model demands them."""
        return self.inputs.get(Role.POSITIONS)

    def analysis(self, of: Callable[[CapturedGraph], T]) -> T:
        """What ``of`` finds of the graph: computed once, and kept until the graph changes."""
        if of not in self.analyses:
            found = of(self)
            self.analyses[of] = found
        known: T = self.analyses[of]
        return known

    @property
    def graph(self) -> Graph:
        return self.module.graph

    @property
    def output(self) -> Node:
        """The node of the logits."""
        (result,) = next(n for n in reversed(self.graph.nodes) if n.op == "output").args
        node = result[0] if isinstance(result, (tuple, list)) else result
        assert isinstance(node, Node)
        return node

    @property
    def fake_mode(self) -> FakeTensorMode:
        val = self.input_ids.meta["val"]
        assert isinstance(val, FakeTensor)
        return val.fake_mode

    def size(self, which: str) -> Node:
        """Node of the batch size (``"batch"``) or the length (``"length"``), at the top of the graph."""
        if which not in self.size_nodes:
            anchor = next(n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr"))
            with self.graph.inserting_before(anchor):
                dim = 0 if which == "batch" else 1
                self.size_nodes[which] = emit(self, aten.sym_size.int, self.input_ids, dim)
        return self.size_nodes[which]

    def copy(self) -> CapturedGraph:
        """A graph of its own over the same tensors; to be made before any pass has run."""
        graph = Graph()
        renamed: dict[Node, Node] = {}
        for node in self.graph.nodes:
            renamed[node] = graph.node_copy(node, lambda n: renamed[n])
        inputs = {role: renamed[node] for role, node in self.inputs.items()}
        module, ledger = GraphModule(self.module, graph), self.ledger.copy()
        return replace(self, module=module, inputs=inputs, size_nodes={}, analyses={}, ledger=ledger)

    def tidy(self) -> None:
        """Drop dead nodes and recompile; the graph is checked to be well formed."""
        self.graph.eliminate_dead_code()
        self.analyses.clear()
        self.size_nodes = {k: n for k, n in self.size_nodes.items() if not n._erased}
        self.graph.lint()
        self.module.recompile()


@dataclass(frozen=True)
class PassResult:
    """What a pass did: whether it changed the graph, and what it could not prove."""

    rewritten: int = 0
    refusals: tuple[Refusal, ...] = ()


def emit(captured: CapturedGraph, target: Any, *args: Any, like: Node | None = None, **kwargs: Any) -> Node:
    """Insert a call at the graph's insertion point and give it its fake value; origin is taken from ``like``."""
    captured.analyses.clear()
    node = captured.graph.call_function(target, args, kwargs)
    values, named = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    with captured.fake_mode, torch.no_grad():
        node.meta["val"] = target(*values, **named)
    if like is not None:
        node.meta.update({k: like.meta[k] for k in ("nn_module_stack", "stack_trace") if k in like.meta})
    return node


def hold(captured: CapturedGraph, name: str, value: torch.Tensor | None = None) -> Node:
    """A node, at the insertion point, that reads a tensor of the rewrite's own: the one of that name, or a new one."""
    if value is not None:
        if isinstance(value, nn.Parameter):
            captured.module.register_parameter(name, value)
        else:
            captured.module.register_buffer(name, value, persistent=False)
    captured.analyses.clear()
    node = captured.graph.get_attr(name)
    node.meta["val"] = captured.fake_mode.from_tensor(read_attribute(captured.module, name), static_shapes=True)
    return node


def copy_graph(graph: Graph, module: nn.Module, known: dict[Node, Node] | None = None) -> GraphModule:
    """The same graph over the same tensors; ``known`` receives the copy of each node."""
    copied = Graph()
    copied.output(copied.graph_copy(graph, {} if known is None else known))
    return GraphModule(module, copied)


def is_call(node: object, *targets: Any) -> bool:
    """Whether ``node`` calls one of ``targets``, given as overloads or as overload packets."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)
    return any(node.target is t or (packet is not None and packet is t) for t in targets)


def arguments(node: Node) -> dict[str, Any]:
    """Arguments of an ATen call by the names of its schema, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    named: dict[str, Any] = {}
    for i, argument in enumerate(schema.arguments):
        if i < len(node.args) and not argument.kwarg_only:
            named[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            named[argument.name] = node.kwargs[argument.name]
        else:
            named[argument.name] = argument.default_value
    return named


def tensor_value(node: Node) -> torch.Tensor | None:
    """The node's fake tensor, or None when it is no single tensor."""
    val = node.meta.get("val")
    return val if isinstance(val, torch.Tensor) else None


def expression(value: Any) -> sympy.Expr:
    """A size (int, SymInt, or node of one) as an expression in the capture's symbols."""
    if isinstance(value, Node):
        value = value.meta["val"]
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.expr
    return sympy.sympify(value)


def shape_of(node: Node) -> tuple[sympy.Expr, ...]:
    """Shape of a tensor node in the capture's symbols."""
    val = tensor_value(node)
    assert val is not None, f"{node} is no tensor"
    return tuple(expression(s) for s in val.shape)


def is_symbolic_scalar(value: object) -> bool:
    """Whether an argument is a node that holds a number which depends on the input's shape."""
    return isinstance(value, Node) and isinstance(value.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def numbers_in(nodes: set[Node], captured: CapturedGraph) -> set[int]:
    """Whole numbers that ``nodes`` compute with, and the sizes and one-entry tensors that they read.

    Dims, shapes and fill values are left out: no index is compared with them.
    """
    found: set[int] = set()
    for node in nodes:
        if node.op == "get_attr":
            tensor = read_attribute(captured.module, str(node.target))
            found.update(int(s) for s in tensor.shape)
            if tensor.numel() == 1 and not tensor.dtype.is_complex:
                found.update(_whole(tensor.item()))
        facts = facts_of(node.target)
        if facts is not None and facts.arranges:
            continue
        for value in _leaves((node.args, dict(node.kwargs))):
            found.update(_whole(value))
    return {n for n in found if 1 < n < FULL}


def read_attribute(module: torch.nn.Module, path: str) -> torch.Tensor:
    """The tensor that a ``get_attr`` node names."""
    value = operator.attrgetter(path)(module)
    assert isinstance(value, torch.Tensor)
    return value


def record_values(captured: CapturedGraph, nodes: Iterable[Node], decided: str) -> None:
    """Note in the ledger that the values of those of ``nodes`` that read a tensor decided something."""
    for node in nodes:
        if node.op == "get_attr" and tensor_value(node) is not None:
            name = str(node.target)
            captured.ledger.record(name, read_attribute(captured.module, name), decided)


def constants_of(node: Node) -> set[Node]:
    """The nodes that a constant is computed from, itself included."""
    found, stack = {node}, [node]
    while stack:
        for used in stack.pop().all_input_nodes:
            if used not in found:
                found.add(used)
                stack.append(used)
    return found


def reads_parameter(captured: CapturedGraph, node: Node) -> bool:
    """Whether a constant is computed from parameters, which may be changed later."""
    stack = [node]
    while stack:
        current = stack.pop()
        if current.op == "get_attr" and isinstance(read_attribute(captured.module, str(current.target)), nn.Parameter):
            return True
        stack.extend(current.all_input_nodes)
    return False


def module_path(node: Node, captured: CapturedGraph) -> str:
    """Dotted path of the module whose forward made the node."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    prefix = captured.path_prefix
    if prefix and (path == prefix or path.startswith(prefix + ".")):
        path = path[len(prefix) :].lstrip(".")
    return path


def describe(node: Node) -> str:
    """``softmax_2 [aten.softmax.int]``."""
    return f"{node.name} [{node.target}]" if node.op == "call_function" else node.name


def refuse(captured: CapturedGraph, node: Node, reason: str, pass_name: str) -> Refusal:
    """A refusal that says where it stands: node, module path, and line of the user's code."""
    trace = str(node.meta.get("stack_trace") or "").strip().splitlines()
    lines = [line.strip() for line in trace if line.lstrip().startswith("File ")]
    source = ""
    if lines:
        parts = lines[-1].split(", ")
        source = ":".join((parts[0].removeprefix('File "').rstrip('"'), parts[1].removeprefix("line ")))
    return Refusal(reason, describe(node), module_path(node, captured), pass_name, source)


def _whole(value: object) -> set[int]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return set()
    if isinstance(value, float) and value <= -1e3:  # what hides a key, not a size
        return set()
    return {abs(int(value))} if value == value and abs(value) < FULL and float(value).is_integer() else set()


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value
