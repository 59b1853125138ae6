"""Who computes an op: the table of backends, and the choice of one for each call.

A backend is a module. Its functions have the names and signatures of the ops that it has kernels for, and besides

- ``available() -> bool``: whether it can run here at all (was built, can be loaded);
- ``unsupported(op, **arguments) -> str | None``: why it cannot serve a call, or None. It is given the arguments that
  the caller gave; those left out have their defaults. The reason is one phrase that does not depend on sizes;
- optionally ``why_unavailable() -> str``: what ``available`` found missing.

The first row that serves the device and the call is taken; the torch reference is the last and serves everything. What
keeps a row from serving is said once per process, as a :class:`~kvpass.errors.KvpassWarning`.

``KVPASS_BACKEND=name`` forces a row, on whatever device; a call that it has a kernel for and cannot serve is an error
then. ``KVPASS_DEBUG=1`` checks before each call that no index leads out of a tensor.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from kvpass.errors import ConfigError, InputError, KvpassWarning
from kvpass.kernels.call_checks import check_memory
from kvpass.kernels.index_checks import check_indices


@dataclass(frozen=True)
class Backend:
    """A row of the table.

    Attributes:
        name: as written in ``KVPASS_BACKEND``.
        module: import path of the module.
        devices: types of the devices that it serves; empty for all.
    """

    name: str
    module: str
    devices: tuple[str, ...] = ()


BACKENDS: tuple[Backend, ...] = (
    Backend("cpu", "kvpass.kernels.cpu.backend", ("cpu",)),
    Backend("triton", "kvpass.kernels.triton_kernels.launch.backend", ("cuda",)),
    Backend("reference", "kvpass.kernels.reference.backend"),
)


CALLS_KEPT = 256  # different calls of an op whose check and choice are remembered


@functools.cache
def find(backend: Backend) -> tuple[ModuleType | None, str]:
    """The module of a row, or None and the reason why it cannot run here."""
    try:
        module = importlib.import_module(backend.module)
        if module.available():
            return module, ""
        return None, module.why_unavailable() if hasattr(module, "why_unavailable") else "it is not available"
    except (ImportError, OSError) as error:
        return None, f"loading it failed: {error}"


def load(backend: Backend) -> ModuleType | None:
    """The module of a row, or None, with a warning, when it cannot run here."""
    module, why = find(backend)
    if module is None:
        say_once(f"kvpass kernels: the backend {backend.name} does not serve, slower ones take its place ({why})")
    return module


@functools.cache
def say_once(message: str) -> None:
    """Warn, once per process."""
    warnings.warn(message, KvpassWarning, stacklevel=2)


def choose(op: str, device: str, arguments: dict[str, Any]) -> Callable[..., Any]:
    """The function that computes one call of ``kvpass::op``.

    Args:
        op: name of the op.
        device: type of the device of its tensors.
        arguments: those that the caller gave, by name.

    Raises:
        InputError: if the backend that the environment forces cannot serve the call.
        ConfigError: if the environment forces a backend that does not exist.
    """
    forced = os.environ.get("KVPASS_BACKEND")
    if forced:
        return _forced(forced, op, arguments)
    for backend in BACKENDS:
        if backend.devices and device not in backend.devices:
            continue
        module = load(backend)
        kernel: Callable[..., Any] | None = getattr(module, op, None)
        if module is None or kernel is None:
            continue
        why = module.unsupported(op, **arguments)
        if why is None:
            return kernel
        say_once(f"kvpass::{op}: the backend {backend.name} does not serve this call, a slower one does ({why})")
    raise InputError(f"kvpass::{op} has no backend for the device {device}")


def has_kernel(op: str, device: str) -> bool:
    """Whether a backend other than the torch reference has a kernel for ``kvpass::op`` on a type of device.

    It may still leave a single call to the reference, for its dtypes or formats.
    """
    forced = os.environ.get("KVPASS_BACKEND")
    rows = [b for b in BACKENDS[:-1] if (b.name == forced if forced else not b.devices or device in b.devices)]
    return any(hasattr(load(backend), op) for backend in rows)


def _forced(name: str, op: str, arguments: dict[str, Any]) -> Callable[..., Any]:
    found = [backend for backend in BACKENDS if backend.name == name]
    if not found:
        known = ", ".join(backend.name for backend in BACKENDS)
        raise ConfigError(f"KVPASS_BACKEND={name} does not exist: choose one of {known}")
    module, why_not = find(found[0])
    if module is None:
        raise InputError(f"KVPASS_BACKEND={name} cannot run on this machine, unset it: {why_not}")
    kernel: Callable[..., Any] | None = getattr(module, op, None)
    if kernel is None:
        fallback: Callable[..., Any] = getattr(importlib.import_module(BACKENDS[-1].module), op)
        return fallback
    why = module.unsupported(op, **arguments)
    if why is not None:
        raise InputError(f"kvpass::{op} cannot be served by KVPASS_BACKEND={name}: {why}")
    return kernel


def implementation_of(op: str, names: tuple[str, ...], check: Callable[..., object]) -> Callable[..., Any]:
    """What runs when ``kvpass::op`` is called: the chosen backend, without gradients and autocast.

    Neither the check nor the choice looks at what tensors hold, so what they found is kept for calls whose arguments
    have the same shapes, strides, dtypes and devices: it would cost more than a kernel that decodes a short sequence.

    Errors name the op. Dtypes, devices and strides are checked with the shapes.

    Args:
        op: name of the op.
        names: its arguments in order.
        check: its shape function, which complains of arguments that do not fit each other. Kernels that work on bare
            memory rely on it.
    """
    chosen: dict[Hashable, Callable[..., Any]] = {}

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return run(*args, **kwargs)
        first = args[0] if args else kwargs[names[0]]
        tensor = first if isinstance(first, torch.Tensor) else next(iter(first), None)
        device = "cpu" if tensor is None else tensor.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return run(*args, **kwargs)
        debug = os.environ.get("KVPASS_DEBUG", "") not in ("", "0")
        named = tuple(kwargs)
        call = (os.environ.get("KVPASS_BACKEND"), named, *map(_describe, args), *map(_describe, kwargs.values()))
        kernel = None if debug else chosen.get(call)
        try:
            if kernel is None:
                arguments = dict(zip(names, args, strict=False)) | kwargs
                _check(op, check, args, kwargs)
                check_memory(arguments)
                if debug:
                    check_indices(op, arguments)
                kernel = choose(op, device, arguments)
                if len(chosen) >= CALLS_KEPT:
                    chosen.clear()
                chosen[call] = kernel
            return kernel(*args, **kwargs)
        except (InputError, ConfigError) as error:
            raise _naming(op, error) from None

    return run


def _check(op: str, check: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        check(*args, **kwargs)
    except RuntimeError as error:
        raise InputError(f"kvpass::{op} has arguments that do not fit each other: {error}") from None


def _naming(op: str, error: InputError | ConfigError) -> InputError | ConfigError:
    """The error with the name of the op in front, which what all ops share does not know."""
    return error if str(error).startswith("kvpass::") else type(error)(f"kvpass::{op}: {error}")


def _describe(argument: Any) -> Hashable:
    """What a check may depend on."""
    if isinstance(argument, torch.Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device
    return tuple(map(_describe, argument)) if isinstance(argument, (list, tuple)) else argument
