"""Where a scope stands in the way of a compiled model's calls."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from functools import partial
from types import CodeType, FunctionType
from typing import Any, Protocol

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.fx import GraphModule

from kvpass.dynamo.graph_site import GraphSite, kvpass, traced_frame
from kvpass.dynamo.options import BackendOptions, parse_options
from kvpass.errors import InputError, KvpassWarning, RefusedError
from kvpass.report import RewriteReport
from kvpass.types import Refusal

LOGGER = logging.getLogger("kvpass")

HOW = 'torch.compile(model, backend="kvpass")'


class Entered(Protocol):
    """A scope."""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns for a call in the scope."""


class NotTraced(Exception):
    """The model would have run instead of being traced."""


class Doorway:
    """Takes the calls of one compiled model, as long as somebody is in a scope of it.

    Attributes:
        model: the user's own, which was compiled.
        inner: what Dynamo has put in the place of its forward.
        whole: traces the model for scopes, hooks and all, apart from what Dynamo keeps of it for other calls.
        code: of the function that ``whole`` traces.
        options: of the compile.
    """

    def __init__(self, compiled: nn.Module, attribute: str, model: nn.Module, options: BackendOptions) -> None:
        self.model = model
        self.options = options
        self.inner: Callable[..., Any] = getattr(compiled, attribute)
        function = FunctionType(_call.__code__.replace(co_name=f"call_{id(self)}"), globals())
        self.code: CodeType = function.__code__
        self.whole: Callable[..., Any] = torch.compile(function, backend=partial(_site, options), fullgraph=True)
        self._reported: set[str] = set()
        self._holder = compiled
        self._attribute = attribute
        self._scopes: dict[int, Entered] = {}
        self.__wrapped__ = self.inner  # for who asks for the signature
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: object) -> None:
        """A copy of the model has none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def is_of(self, compiled: nn.Module) -> bool:
        """Whether it stands before this very module."""
        return self._holder is compiled

    def enter(self, scope: Entered) -> None:
        """Have the calls of this thread go to a scope.

        Raises:
            InputError: if it is in one already.
        """
        with self._lock:
            if threading.get_ident() in self._scopes:
                raise InputError("this thread is in a scope of this model already: leave it before it enters another")
            if not self._scopes:
                self.inner = self.__wrapped__ = getattr(self._holder, self._attribute)
                setattr(self._holder, self._attribute, self)
            self._scopes[threading.get_ident()] = scope

    def leave(self, thread: int) -> None:
        """Have the calls of a thread go where they went before."""
        with self._lock:
            del self._scopes[thread]
            if not self._scopes:
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
        scope = self._scopes.get(threading.get_ident())
        return self.inner(*args, **kwargs) if scope is None else scope.run(args, kwargs)


def as_refused(reason: Exception) -> RefusedError:
    """A reason to leave a model alone, as an error."""
    refusals = (Refusal(str(reason), pass_name="torch.compile"),)
    return RefusedError(f"kvpass keeps no cache for this model: {reason}", RewriteReport(refusals=refusals))


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not torch.compiler.is_compiling():
        raise NotTraced("torch.compile makes no graph of its forward")
    return model._call_impl(*args, **kwargs)  # not what model.compile() has put in the place of it


def _site(options: BackendOptions, graph: GraphModule, example_inputs: list[Any]) -> GraphSite:
    return GraphSite(graph, None, options, traced_frame())


PLACE = "_kvpass_doorway"  # attribute of a compiled module, so that it goes with it
_LOCK = threading.Lock()


def doorway_of(compiled: Any) -> Doorway:
    """The doorway of a model that ``torch.compile`` or ``model.compile`` has compiled.

    Raises:
        InputError: if it was not compiled, or by another backend.
    """
    if not isinstance(compiled, nn.Module):
        kind = type(compiled).__name__
        raise InputError(f"a scope needs a compiled model, not a {kind}: give it what {HOW} returns")
    with _LOCK:
        found = compiled.__dict__.get(PLACE)
        if isinstance(found, Doorway) and found.is_of(compiled):
            return found
        if isinstance(compiled, OptimizedModule):
            attribute, model, context = "forward", compiled._orig_mod, compiled.dynamo_ctx
        else:
            attribute, model, context = "_compiled_call_impl", compiled, None
            call = getattr(compiled, attribute, None)
            if call is None:
                raise InputError(f"this model was not compiled: a scope needs what {HOW} returns")
            cells = (cell.cell_contents for cell in getattr(call, "__closure__", None) or ())
            context = next((one for one in cells if hasattr(one, "callback")), None)
        backend: Any = getattr(context, "callback", None)
        while hasattr(backend, "_torchdynamo_orig_backend"):
            backend = backend._torchdynamo_orig_backend
        if getattr(backend, "compiler_fn", backend) is not kvpass:
            raise InputError(f"this model was compiled by another backend: a scope needs {HOW}")
        options = parse_options(getattr(backend, "kwargs", {}).get("options"))
        made = Doorway(compiled, attribute, model, options)
        compiled.__dict__[PLACE] = made
        return made
