"""Where a scope stands in the way of a compiled model's calls."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend
from torch.fx import GraphModule

from kvpass.dynamo.graph_site import GraphSite, kvpass, traced_frame
from kvpass.dynamo.options import BackendOptions, parse_options
from kvpass.errors import InputError, KvpassWarning, RefusedError
from kvpass.report import RewriteReport
from kvpass.types import Refusal

LOGGER = logging.getLogger("kvpass")

HOW = 'torch.compile(model, backend="kvpass")'


class Answering(Protocol):
    """A scope."""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns for a call in the scope."""


class Doorway:
    """Takes the calls of one compiled model, as long as somebody is in a scope of it.

    Attributes:
        model: the user's own, which was compiled.
        inner: what Dynamo has put in the place of its forward.
        whole: traces the model for scopes, hooks and all, apart from what Dynamo keeps of it for other calls.
        code: of the function that ``whole`` traces.
        options: of the compile, as far as they are known.
    """

    def __init__(self, compiled: nn.Module, attribute: str, model: nn.Module, options: BackendOptions) -> None:
        self.model = model
        self.options = options
        self.inner: Callable[..., Any] = getattr(compiled, attribute)
        function = FunctionType(_call.__code__.replace(co_name=f"call_{id(self)}"), globals())
        self.code: CodeType = function.__code__
        self.whole: Callable[..., Any] = torch.compile(function, backend=self._site)
        self._reported: set[str] = set()
        self._holder = compiled
        self._attribute = attribute
        self._here = threading.local()
        self._inside = 0
        self.__wrapped__ = self.inner  # for who asks for the signature
        self._lock = threading.Lock()

    def _site(self, graph: GraphModule, example_inputs: list[Any]) -> GraphSite:
        return GraphSite(graph, None, self.options, traced_frame())

    def enter(self, scope: Answering) -> None:
        """Have the calls of this thread go to a scope.

        Raises:
            InputError: if it is in one already.
        """
        if getattr(self._here, "scope", None) is not None:
            raise InputError("this thread is in a scope of this model already: leave it before it enters another")
        with self._lock:
            if self._inside == 0:
                self.inner = self.__wrapped__ = getattr(self._holder, self._attribute)
                setattr(self._holder, self._attribute, self)
            self._inside += 1
        self._here.scope = scope

    def leave(self) -> None:
        """Have them go where they went before."""
        self._here.scope = None
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                setattr(self._holder, self._attribute, self.inner)

    def leave_alone(self, reason: Exception) -> None:
        """Say once why calls are computed as outside of a scope.

        Raises:
            RefusedError: where that was asked for instead.
        """
        if self.options.on_refusal == "error":
            if isinstance(reason, RefusedError):
                raise reason
            raise as_refused(reason) from reason
        if str(reason) not in self._reported:
            self._reported.add(str(reason))
            LOGGER.info("left alone: %s", reason)
            warnings.warn(f"kvpass keeps no cache for this model: {reason}", KvpassWarning, stacklevel=2)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the model."""
        scope: Answering | None = getattr(self._here, "scope", None)
        return self.inner(*args, **kwargs) if scope is None else scope.run(args, kwargs)


def as_refused(reason: Exception) -> RefusedError:
    """A reason to leave a model alone, as an error."""
    refusals = (Refusal(str(reason), pass_name="torch.compile"),)
    return RefusedError(f"kvpass keeps no cache for this model: {reason}", RewriteReport(refusals=refusals))


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model._call_impl(*args, **kwargs)  # not what model.compile() has put in the place of it


_DOORWAYS: WeakKeyDictionary[nn.Module, Doorway] = WeakKeyDictionary()
_LOCK = threading.Lock()


def doorway_of(compiled: Any) -> Doorway:
    """The doorway of a model that ``torch.compile`` or ``model.compile`` has compiled.

    Raises:
        InputError: if it was not compiled, or by another backend.
    """
    if not isinstance(compiled, nn.Module):
        kind = type(compiled).__name__
        raise InputError(f"a scope needs a compiled model, not a {kind}: give it what {HOW} returns")
    if isinstance(compiled, OptimizedModule):
        attribute, model = "forward", compiled._orig_mod
        callback: Any = compiled.dynamo_ctx.callback
        backend = innermost_backend(callback)
        if getattr(backend, "compiler_fn", backend) is not kvpass:
            raise InputError(f"this model was compiled by another backend: a scope needs {HOW}")
        options = parse_options(getattr(backend, "kwargs", {}).get("options"))
    else:
        attribute, model, options = "_compiled_call_impl", compiled, parse_options(None)
        if getattr(compiled, attribute, None) is None:
            raise InputError(f"this model was not compiled: a scope needs what {HOW} returns")
    with _LOCK:
        found = _DOORWAYS.get(compiled)
        if found is None:
            found = _DOORWAYS[compiled] = Doorway(compiled, attribute, model, options)
        return found
