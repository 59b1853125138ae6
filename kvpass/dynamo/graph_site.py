"""One graph of Dynamo's: outside of scopes what the inner compiler makes of it, within it what that answers."""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any, Protocol

import sympy
import torch
from torch import Tensor
from torch._dynamo.aot_compile_types import SerializableCallable
from torch.fx import Graph, GraphModule, Node

from kvpass.dynamo.effects import changes_python_state
from kvpass.dynamo.options import BackendOptions, parse_options
from kvpass.errors import ConfigError

OWN_MODULES = ("", "torch", "_operator", "builtins", "math")


class Answering(Protocol):
    """A call of a model under way in a scope, which its graphs ask for their outputs."""

    def answer(self, site: GraphSite, args: Sequence[Any]) -> tuple[Any, ...]:
        """The outputs of a graph that is run on ``args``."""


@dataclass
class _Asked(threading.local):
    call: Answering | None = None


_ASKED = _Asked()


@contextmanager
def answered_by(call: Answering | None) -> Iterator[None]:
    """Have every graph that this thread runs in the block ask ``call``; None has them compute as outside of scopes."""
    before, _ASKED.call = _ASKED.call, call
    try:
        yield
    finally:
        _ASKED.call = before


@dataclass(frozen=True)
class Frame:
    """The Python function that a graph was made of.

    Attributes:
        code: of the function.
        is_whole: whether the graph is all of it.
        changes_state: whether it changes Python objects that outlive it.
        shape_guards: what Dynamo took for granted of sizes, in its symbols.
    """

    code: CodeType | None
    is_whole: bool
    changes_state: bool = False
    shape_guards: tuple[sympy.Expr, ...] = ()


class GraphSite(SerializableCallable):
    """A graph that Dynamo has traced, with tensors of the model and of the call as its inputs.

    Attributes:
        graph: torch-level, as Dynamo made it.
        placeholders: its inputs; ``meta["example_value"]`` has their sizes, a symbol where one may change.
        options: of the compile.
        frame: where it comes from.
        text: the same for equal graphs.
        readings: what its inputs and outputs are, by what those are that come from the call.
    """

    def __init__(
        self, graph: GraphModule, example_inputs: list[Any] | None, options: BackendOptions, frame: Frame
    ) -> None:
        self.options = options
        self.frame = frame
        copied = Graph()
        copied.output(copied.graph_copy(graph.graph, {}))
        self.graph = GraphModule(graph, copied)
        self.placeholders = [node for node in copied.nodes if node.op == "placeholder"]
        for node in self.placeholders:
            node.meta.pop("grapharg", None)  # of no use but to Dynamo, whose example it holds
        self.text = _text_of(self.graph)
        self.readings: dict[tuple[tuple[int, Any], ...], Any] = {}
        self._inner: Callable[..., Any] | None = None
        if example_inputs is not None:
            self._inner = options.compile_inner(graph, example_inputs)

    def __call__(self, *args: Any) -> Any:
        """The graph's outputs."""
        call = _ASKED.call
        if call is not None:
            return call.answer(self, args)
        return self.graph(*args) if self._inner is None else self._inner(*args)

    @classmethod
    def serialize_compile_artifacts(cls, fn: GraphSite) -> bytes:
        """What torch's ahead-of-time compile saves of a graph: itself, and how it was to be compiled.

        Raises:
            ConfigError: if the inner compiler is a function, which no file can hold.
        """
        if not isinstance(fn.options.inner, str):
            raise ConfigError("inner is a function, which cannot be saved: name a backend of torch's, or 'eager'")
        return pickle.dumps((GraphModule(fn.graph, fn.graph.graph), fn.options))

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> GraphSite:
        """The graph again; an inner compiler other than ``"eager"`` compiles it when it is first called."""
        graph, options = pickle.loads(data)
        site = cls(graph, None, options, Frame(None, False))
        if options.inner != "eager":
            site._inner = torch.compile(graph, backend=options.inner)
        return site


def _text_of(graph: GraphModule) -> str:
    """The same for graphs that compute the same, their constants and the graphs within them included."""
    digest = hashlib.sha256()
    for node in graph.graph.nodes:
        if is_foreign(node):
            digest.update(f"{id(node.target)}".encode())  # the graph holds it, so that no other gets its number
    for name, module in graph.named_modules():
        digest.update(f"{name}:{module.code if isinstance(module, GraphModule) else module!r}".encode())
        for key, value in sorted(vars(module).items()):
            if isinstance(value, Tensor):
                digest.update(f"{key}:{value.dtype}:{value.shape}:{value.tolist()}".encode())
    return digest.hexdigest()


def is_foreign(node: Node) -> bool:
    """Whether a node calls a function that is neither torch's nor Python's, which another may share its name with."""
    module = getattr(node.target, "__module__", None) or ""
    return node.op == "call_function" and module.partition(".")[0] not in OWN_MODULES


def kvpass(
    graph: GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> GraphSite:
    """The backend: ``torch.compile(model, backend="kvpass", options={...})``.

    Args:
        graph: as Dynamo gives it.
        example_inputs: likewise.
        options: see :func:`kvpass.dynamo.options.parse_options`.
        mode: of torch.compile; means nothing here.

    Raises:
        ConfigError: if an option cannot be used.
    """
    return GraphSite(graph, example_inputs, parse_options(options), traced_frame())


def traced_frame() -> Frame:
    """The function that Dynamo is tracing."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        traced = InstructionTranslator.current_tx()
        reason = traced.output.compile_subgraph_reason
        shapes = traced.output.shape_env
        guards = tuple(shapes.replace(guard.expr) for guard in shapes.guards)
        is_whole = reason is not None and not reason.graph_break
        return Frame(traced.f_code, is_whole, changes_python_state(traced), guards)
    except AttributeError:  # another version of torch, which keeps it elsewhere, or no tracing at all
        return Frame(None, False)
