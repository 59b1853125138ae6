"""The whole numbers that the code of a forward names: a length at one of them may be another case in Python alone."""

from __future__ import annotations

import math
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

TORCH = os.path.dirname(str(torch.__file__)) + os.sep
DIGITS = 4  # of a number in a string
MOST = 256  # numbers of an array or a list that are looked at
DEPTH = 4  # of collections in each other, and of attributes of attributes
FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)


def numbers_of_code(forward: Callable[[Tensor], Any], ids: Tensor) -> set[int]:
    """Numbers that stand in the functions that a forward calls, and in what these name.

    Constants, and the numbers in short strings; the numbers that variables and attributes hold which the code names:
    arguments, globals, of enclosing functions, of ``self`` and its class, of modules, and of what these hold, such as a
    configuration. Of a number with a fraction both neighbours. Code of torch does not count.

    Args:
        forward: is called once, with
        ids: token ids ``[B, S]``.
    """
    found: set[int] = set()
    seen: set[tuple[types.CodeType, int]] = set()

    def note(frame: types.FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or code.co_filename.startswith((TORCH, "<frozen")):
            return
        owner = frame.f_locals.get("self")
        if (code, id(owner)) in seen:
            return
        seen.add((code, id(owner)))
        named = [frame.f_globals[name] for name in code.co_names if name in frame.f_globals]
        reached = [*frame.f_locals.values(), *named]
        found.update(_numbers([code.co_consts, *reached]))
        found.update(_numbers(getattr(owner, "__dict__", {}).values()))
        found.update(_numbers(_attributes(reached, code.co_names)))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        forward(ids)
    finally:
        _profile_again(before)
    return found


def _profile_again(profiler: Any) -> None:
    """Have a profiler go on that was there before: a function, or one of C such as cProfile's, which is no function."""
    if profiler is None or callable(profiler):
        sys.setprofile(profiler)
    else:
        sys.setprofile(None)
        getattr(profiler, "enable", lambda: None)()


def _attributes(holders: Iterable[Any], names: tuple[str, ...], depth: int = DEPTH) -> Iterator[Any]:
    """What code reaches by the attributes that it names: of objects and their classes, and of what these hold."""
    for holder in holders:
        if holder is None or isinstance(holder, (Tensor, str, bytes, int, float, dict, list, tuple, *FUNCTIONS)):
            continue
        if isinstance(holder, types.ModuleType) and holder.__name__.partition(".")[0] == "torch":
            continue
        for name in names:
            try:
                value = getattr(holder, name)
            except Exception:  # a property may raise anything
                continue
            yield value
            if depth:
                yield from _attributes([value], names, depth - 1)


def _numbers(values: Iterable[Any], depth: int = DEPTH) -> Iterator[int]:
    for value in values:
        if type(value) is int:
            yield value
        elif isinstance(value, float | np.number):
            yield from (math.floor(value), math.ceil(value)) if math.isfinite(value) else ()
        elif isinstance(value, str):
            if len(value) <= 2 * DIGITS:
                yield from map(int, "".join(c if c.isdecimal() else " " for c in value).split())
        elif depth == 0 or isinstance(value, (bytes, Tensor, type, torch.nn.Module, types.ModuleType, *FUNCTIONS)):
            continue
        elif isinstance(value, np.ndarray):
            yield from _numbers(value.flatten()[:MOST].tolist(), depth - 1)
        elif isinstance(value, dict):
            yield from _numbers([*value.keys(), *value.values()][: 2 * MOST], depth - 1)
        elif isinstance(value, tuple | list | set | frozenset):
            yield from _numbers([*value][:MOST], depth - 1)
        else:
            yield from _numbers(getattr(value, "__dict__", {}).values(), depth - 1)
