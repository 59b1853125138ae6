"""One graph of Dynamo's: outside of scopes what the inner compiler makes of it, within it what that answers."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any, Protocol

from torch.fx import Graph, GraphModule

from kvpass.dynamo.options import BackendOptions, parse_options


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
    """

    code: CodeType | None
    is_whole: bool


class GraphSite:
    """A graph that Dynamo has traced, with tensors of the model and of the call as its inputs.

    Attributes:
        graph: torch-level, as Dynamo made it.
        placeholders: its inputs; ``meta["example_value"]`` has their sizes, a symbol where one may change.
        options: of the compile.
        frame: where it comes from.
        text: the same for equal graphs.
    """

    def __init__(self, graph: GraphModule, example_inputs: list[Any], options: BackendOptions, frame: Frame) -> None:
        self.options = options
        self.frame = frame
        copied = Graph()
        copied.output(copied.graph_copy(graph.graph, {}))
        self.graph = GraphModule(graph, copied)
        self.placeholders = [node for node in copied.nodes if node.op == "placeholder"]
        for node in self.placeholders:
            node.meta.pop("grapharg", None)  # of no use but to Dynamo, whose example it holds
        self.text = hashlib.sha256(self.graph.code.encode()).hexdigest()
        self._inner: Callable[..., Any] = options.compile_inner(graph, example_inputs)

    def __call__(self, *args: Any) -> Any:
        """The graph's outputs."""
        call = _ASKED.call
        return self._inner(*args) if call is None else call.answer(self, args)


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
    return GraphSite(graph, example_inputs, parse_options(options), _frame())


def _frame() -> Frame:
    """The function that Dynamo is tracing."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        traced = InstructionTranslator.current_tx()
        reason = traced.output.compile_subgraph_reason
        return Frame(traced.f_code, reason is not None and not reason.graph_break)
    except AttributeError:  # another version of torch, which keeps it elsewhere, or no tracing at all
        return Frame(None, False)
