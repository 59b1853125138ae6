"""The whole numbers that the code of a forward names: a length at one of them may be another case in Python alone."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

LEAVES = (str, bytes, Tensor, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, torch.dtype)
TORCH = os.path.dirname(str(torch.__file__)) + os.sep
DIGITS = 4  # of a number in a string


def numbers_of_code(forward: Callable[[Tensor], Any], ids: Tensor) -> set[int]:
    """Numbers that stand in the functions that a forward calls, and in what these name.

    Constants, and the numbers in short strings; the numbers that variables and attributes hold which the code names:
    arguments, globals, of enclosing functions, of ``self`` and of what ``self`` holds, such as a configuration. Code of
    torch does not count.

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
        found.update(_numbers([code.co_consts, *frame.f_locals.values(), *named]))
        if owner is not None:
            held = [
                value for value in getattr(owner, "__dict__", {}).values() if not isinstance(value, torch.nn.Module)
            ]
            found.update(_numbers(held))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        forward(ids)
    finally:
        sys.setprofile(before)
    return found


def _numbers(values: Iterable[Any], depth: int = 4) -> Iterator[int]:
    for value in values:
        if type(value) is int:
            yield value
        elif isinstance(value, str) and len(value) <= 2 * DIGITS:
            yield from map(int, "".join(c if c.isdecimal() else " " for c in value).split())
        elif isinstance(value, LEAVES) or depth == 0:
            continue
        elif isinstance(value, dict):
            yield from _numbers([*value.keys(), *value.values()], depth - 1)
        elif isinstance(value, tuple | list | set | frozenset):
            yield from _numbers(value, depth - 1)
        elif not isinstance(value, torch.nn.Module):
            yield from _numbers(getattr(value, "__dict__", {}).values(), depth - 1)
