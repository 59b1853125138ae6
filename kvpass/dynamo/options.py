"""``torch.compile(..., options={...})``: what a user may say to the backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch.fx import GraphModule

from kvpass.config import CacheConfig
from kvpass.errors import ConfigError

Inner = Callable[[GraphModule, list[Any]], Callable[..., Any]]
OnRefusal = Literal["warn", "error"]
NAMES = ("inner", "on_refusal")


@dataclass(frozen=True)
class BackendOptions:
    """What the options of ``torch.compile`` come to.

    Attributes:
        cache: formats and size of the cache, for the scopes.
        inner: compiles each graph for calls outside of any scope, and the steps within: ``"eager"`` runs it as it is,
            any other name is one of torch's backends, such as ``"inductor"``; or a backend, which has no say in steps.
        on_refusal: what a scope does with a model that it cannot keep a cache for: ``"warn"`` says why, once, and has
            it compute whole sequences; ``"error"`` raises.
    """

    cache: CacheConfig
    inner: str | Inner = "eager"
    on_refusal: OnRefusal = "warn"

    @cached_property
    def cache_key(self) -> str:
        """The same for configurations that make the same cache."""
        return repr(self.cache)

    def compile_inner(self, graph: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """A graph of Dynamo's as the inner compiler makes it run."""
        if self.inner == "eager":
            return graph
        compiler = torch._dynamo.lookup_backend(self.inner) if isinstance(self.inner, str) else self.inner
        compiled: Callable[..., Any] = compiler(graph, example_inputs)
        return compiled


def parse_options(options: Mapping[str, Any] | None) -> BackendOptions:
    """What ``torch.compile`` was given.

    Args:
        options: those of :class:`BackendOptions`, and any of :class:`kvpass.CacheConfig`.

    Raises:
        ConfigError: if there is no such option, or its value cannot be used.
    """
    given = dict(options or {})
    known = [field.name for field in fields(CacheConfig)]
    unknown = [name for name in given if name not in known and name not in NAMES]
    if unknown:
        raise ConfigError(f"option {unknown[0]!r} is unknown: kvpass has {', '.join((*NAMES, *known))}")
    inner, on_refusal = given.pop("inner", "eager"), given.pop("on_refusal", "warn")
    if on_refusal not in get_args(OnRefusal):
        raise ConfigError(f"on_refusal={on_refusal!r} is unknown: choose 'warn' or 'error'")
    if not callable(inner) and inner != "eager":
        known_inner = torch._dynamo.list_backends(exclude_tags=())
        if inner not in known_inner or inner == "kvpass":
            raise ConfigError(f"inner={inner!r} is no compiler of torch's: choose 'eager', 'inductor', or a backend")
    return BackendOptions(CacheConfig(**given), inner, on_refusal)
