"""What the calls of the native kernels have in common: their memory, and the fields that describe tensors.

A call is packed into the plain C struct of ``call.h`` and handed over in one piece. The memory behind every pointer is
owned by a tensor that the caller holds on to until the call returns. What a tensor must look like is checked before,
what its numbers say (lengths, block ids) by the kernels before they touch anything.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading

import torch
from torch import Tensor

from kvpass.errors import InputError
from kvpass.kernels.formats.cache_formats import FORMATS, format_of

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of tensors; the numbers are those of call.h
CODES = {name: code for code, name in enumerate(FORMATS)}
CODES_BY_DTYPE = {row.dtype: CODES[name] for name, row in FORMATS.items() if not row.coded}

ATTENTION = struct.Struct("=23q2d20q")
WRITE = struct.Struct("=29qd7q")
COPY = struct.Struct("=9q")
GATHER = struct.Struct("=15q")
SETTLE = struct.Struct("=14q")

CacheFields = tuple[int, int, int, int]  # pointer, format, numbers in a row, pointer to the end


class CallMemory(threading.local):
    """One call's struct, per thread: torch releases the interpreter while a kernel runs."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(ATTENTION.size)
        self.address = ctypes.addressof(self.buffer)


MEMORY = CallMemory()


def cache_fields(cache: Tensor, name: str | None) -> CacheFields:
    """Pointer, format, row width and end of a cache tensor."""
    start = cache.data_ptr()
    return start, *_find_format(cache.dtype, name, cache.shape[3]), start + cache.numel() * cache.element_size()


@functools.cache
def _find_format(dtype: torch.dtype, name: str | None, stored: int) -> tuple[int, int]:
    form = format_of(torch.empty(0, dtype=dtype), name)
    return CODES[form.name], form.row_width(stored)


def as_numbers(tensor: Tensor | None) -> Tensor | None:
    """The tensor in float32 and contiguous."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def require_int64(op: str, **tensors: Tensor) -> None:
    """Complain unless all of these tensors are int64."""
    for name, tensor in tensors.items():
        if tensor.dtype is not torch.int64:
            raise InputError(f"kvpass::{op}: {name} is {tensor.dtype}: it must be torch.int64")
