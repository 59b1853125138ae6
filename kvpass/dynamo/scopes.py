"""Scopes in which a model that ``torch.compile(backend="kvpass")`` has compiled keeps a cache.

Two meanings, no third: within :func:`~kvpass.cached` the model is given whole sequences, as without a cache, and what
is known of them by their content is not computed again; within :func:`~kvpass.incremental` what it is given goes on
with sequences that the scope keeps. A scope belongs to the thread that enters it.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import Unsupported
from torch.fx.experimental import _config as shape_config

from kvpass.dynamo.calls import CallForm, LeftAlone, ModelCall
from kvpass.dynamo.doorway import Doorway, NotTraced, doorway_of
from kvpass.dynamo.graph_engines import SHORT, GraphEngine
from kvpass.dynamo.graph_model import Input
from kvpass.dynamo.graph_site import GraphSite, answered_by
from kvpass.dynamo.under_way import EXPLAIN, CallUnderWay, Reading, StaticShape
from kvpass.engine.engine import Engine
from kvpass.engine.row_session import Row, RowSession, longest_row
from kvpass.errors import InputError, KvpassError, RefusedError
from kvpass.fx_passes.capture.alone import alone
from kvpass.runtime.schedule.stats import EngineStats

NOUNS = {Input.BATCH: "sequences", Input.LENGTH: "tokens"}
ATTEMPTS = 3  # shapes that Dynamo is shown until it makes a graph for all


@dataclass(frozen=True)
class ScopeStats:
    """What a scope has done.

    Attributes:
        calls: of the model.
        left_alone: those of them that were computed as outside of the scope.
        graphs: graphs of Dynamo's that answered the others.
        recompiles: those of them that Dynamo made after the first had answered.
        engine: figures of the engine behind them; None before there is one.
    """

    calls: int
    left_alone: int
    graphs: int
    recompiles: int
    engine: EngineStats | None


# Nothing is known of their fused forms, to which they do not turn with gradients on; these are not computed. Other
# models are traced without, where functions that have gradients of their own are what they compute.
FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


_trace_options = dynamo_config._make_closure_patcher(
    capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True, skip_nnmodule_hook_guards=False
)
_shape_options = shape_config._make_closure_patcher(use_duck_shape=False)  # type: ignore[attr-defined]


@contextmanager
def traced_whole() -> Iterator[None]:
    """Have Dynamo make one graph that holds for every shape, and look whether hooks were added since.

    Sizes and numbers that follow from data, such as the tokens of an expert, do not break it then, and a batch that is
    as large as it is long is not taken for a square.
    """
    undo = [options() for options in (_trace_options, _shape_options)]
    try:
        yield
    finally:
        for one in undo:
            one()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


class Scope(ABC):
    """What both scopes have in common; a context manager.

    Args:
        compiled: what ``torch.compile(model, backend="kvpass")`` returns.

    Raises:
        InputError: if it is something else.
    """

    def __init__(self, compiled: Any) -> None:
        self._doorway: Doorway = doorway_of(compiled)
        self._model: nn.Module = self._doorway.model
        self._fuses = any(isinstance(module, FUSED) for module in self._model.modules())
        self._form = CallForm.of(self._model)
        self._thread: int | None = None
        self._is_over = False
        self._sessions: dict[Engine, RowSession] = {}
        self._tried: set[GraphEngine] = set()
        self._sites: dict[GraphSite, None] = {}
        self._alone: dict[tuple[Any, ...], LeftAlone | RefusedError] = {}
        self._calls = self._left_alone = 0

    def __enter__(self) -> Self:
        if self._thread is not None:
            raise InputError("a scope can be entered once: make a new one")
        self._check_mode()
        self._doorway.enter(self)
        self._thread = threading.get_ident()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is None or self._is_over:
            return
        self._is_over = True
        self._doorway.leave(self._thread)  # which may be another's, that a generator was left to
        with ExitStack() as stack:
            for session in self._sessions.values():
                stack.callback(session.close)

    def stats(self) -> ScopeStats:
        """Figures so far; of the engine those of all that use it.

        Raises:
            InputError: in another thread than the scope's.
        """
        self._check_thread()
        engine = next(reversed(self._sessions), None)
        graphs, figures = len(self._sites), None if engine is None else engine.stats()
        return ScopeStats(self._calls, self._left_alone, graphs, max(0, graphs - 1), figures)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns for a call in the scope."""
        self._check_mode()
        self._calls += 1
        try:
            call = self._form.read(args, kwargs)
            if call.form in self._alone:
                raise self._alone[call.form]
            if torch.is_autocast_enabled(call.ids.device.type):
                raise LeftAlone("autocast is on, and keys and values would be of another dtype", lasting=False)
            try:
                return self._answered(call)
            except (LeftAlone, RefusedError) as reason:
                if isinstance(reason, RefusedError) or reason.lasting:
                    self._alone[call.form] = reason
                raise
        except (LeftAlone, RefusedError) as reason:
            self._leave_alone(reason)
        self._left_alone += 1
        with answered_by(None):
            return self._doorway.inner(*args, **kwargs)

    @abstractmethod
    def _compute(self, found: GraphEngine, call: ModelCall, reading: Reading) -> Tensor:
        """The logits of a call, in the shape that its graph gives them in."""

    @abstractmethod
    def _leave_alone(self, reason: LeftAlone | RefusedError) -> None:
        """Say why a call is computed as outside of the scope, or raise where it must not be."""

    def _answered(self, call: ModelCall) -> Any:
        """The model's outputs, with logits from the cache in them.

        Raises:
            LeftAlone: if the call is none that a cache can be kept for.
            RefusedError: if no rewrite could be proven.
        """
        under_way = CallUnderWay(self._doorway, call, self._compute, self._note)
        for attempt in range(ATTEMPTS):
            args, kwargs = under_way.show(attempt)
            try:
                # One thread at a time: what captures a model changes torch for all of them.
                with alone(), answered_by(under_way), torch.set_grad_enabled(self._fuses), traced_whole():
                    outputs = self._doorway.whole(self._model, args, kwargs)
            except StaticShape as static:
                if static.size in under_way.altered:
                    continue
                raise LeftAlone(f"its forward asks for the very number of its {NOUNS[static.size]}") from static
            except (KvpassError, LeftAlone):
                raise
            except Unsupported as error:
                reason = f"its forward becomes several graphs, as {EXPLAIN} shows: {_first_line(error)}"
                raise LeftAlone(reason) from error
            except NotTraced as error:
                raise LeftAlone(str(error), lasting=False) from error
            except Exception as error:
                if under_way.is_asked:
                    raise
                # Whatever the model itself raises, it raises outside as well.
                reason = f"torch.compile cannot trace its forward: {_first_line(error)}"
                raise LeftAlone(reason, lasting=False) from error
            if not under_way.is_answered:
                raise LeftAlone("torch.compile makes no graph of its forward", lasting=False)
            return under_way.own(outputs)
        raise LeftAlone("its forward asks for the very number of its sequences or tokens")

    def _session(self, engine: Engine) -> RowSession:
        found = self._sessions.get(engine)
        if found is None:
            for session in self._sessions.values():  # of weights that are gone, or of another form of the call
                session.close()
            found = self._sessions[engine] = RowSession(engine, longest_row(engine))
        return found

    def _try_short(self, found: GraphEngine, call: ModelCall, session: RowSession, row: Row) -> None:
        """Once in each scope, before a single row or token is served, of which Dynamo is shown two."""
        tokens = range(found.engine.plan.vocab_size)
        if 1 in call.ids.shape and found not in self._tried and all(token in tokens for token in row[:SHORT]):
            found.try_short(self._model, call, session, row)
            self._tried.add(found)

    def _note(self, site: GraphSite) -> None:
        self._sites[site] = None

    def _check_mode(self) -> None:
        if self._model.training:
            raise InputError("the model is in training mode: call model.eval() before it is used in a scope of kvpass")

    def _check_thread(self) -> None:
        if self._thread is not None and self._thread != threading.get_ident():
            raise InputError("this scope belongs to another thread: enter one in each thread, they share the cache")

    def _check_inside(self) -> None:
        self._check_thread()
        if self._thread is None or self._is_over:
            raise InputError("this scope is not entered: write `with kvpass.incremental(model) as cache:`")
