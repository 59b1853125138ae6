"""Finds, chooses and opens the shared object that holds the native kernels.

``pip install`` builds one object per *level* of instruction sets, from the same sources (see ``setup.py``). The best
one that the processor supports is opened; ``KVPASS_CPU_ISA`` names another. With none built, torch serves.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Any

import torch

from kvpass.errors import ConfigError

LEVELS = ("base", "avx2", "avx512", "avx512_vnni")  # each includes those before it; the C++ side counts alike
FOLDER = Path(__file__).parent
ENTRY_POINTS = ("kvpass_attention", "kvpass_write", "kvpass_copy", "kvpass_gather", "kvpass_settle")
CALL_FIELDS = (45, 37, 9, 15, 14)  # eight bytes each, of the struct that each of them takes; see call.h


def object_path(level: str) -> Path:
    """Where the build puts the object of a level."""
    return FOLDER / f"libkvpass_cpu_{level}.so"


@functools.cache
def open_level(level: str) -> ctypes.CDLL:
    """The object of a level, with its functions declared.

    Raises:
        OSError: if it cannot be loaded, or was built from other sources than these.
    """
    library = ctypes.CDLL(str(object_path(level)))
    stale = OSError(
        f"{object_path(level).name} was built from other sources: run `pip install -e .` again, or in a checkout "
        "`python setup.py build_ext --inplace`"
    )
    for name in ENTRY_POINTS:
        if not hasattr(library, name):
            raise stale
        function = getattr(library, name)
        function.argtypes, function.restype = (ctypes.c_void_p,), ctypes.c_int64
    library.kvpass_call_bytes.argtypes, library.kvpass_call_bytes.restype = (ctypes.c_int64,), ctypes.c_int64
    library.kvpass_level.restype = ctypes.c_int64
    library.kvpass_share_threads.argtypes, library.kvpass_share_threads.restype = (ctypes.c_void_p,), None
    if any(library.kvpass_call_bytes(which) != 8 * fields for which, fields in enumerate(CALL_FIELDS)):
        raise stale
    library.kvpass_share_threads(find_parallel_region())
    return library


@functools.cache
def find_parallel_region() -> int | None:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch itself is linked to.

    The kernels start their threads through it, so that there is one pool of threads in the process. None where torch
    has another runtime; the kernels start threads of their own then.
    """
    try:
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError):
        return None


@functools.cache
def supported_levels() -> tuple[str, ...]:
    """Levels that were built and that this processor runs, the plainest first."""
    if not object_path("base").exists():
        return ()
    best = open_level("base").kvpass_level()
    return tuple(level for level in LEVELS[: best + 1] if object_path(level).exists())


@functools.cache
def current() -> Any:
    """The object to use, or None when there is none.

    Raises:
        ConfigError: if ``KVPASS_CPU_ISA`` names a level that was not built or does not run here.
    """
    levels = supported_levels()
    forced = os.environ.get("KVPASS_CPU_ISA")
    if forced:
        if forced not in levels:
            known = ", ".join(levels) or "none is built"
            raise ConfigError(f"KVPASS_CPU_ISA={forced} is not to be had here: choose one of {known}")
        return open_level(forced)
    return open_level(levels[-1]) if levels else None


def why_missing() -> str:
    """Why :func:`current` is None, and what to do."""
    if sys.platform == "win32":
        return "they are not built on Windows"
    return (
        "the native kernels were not built: run `pip install -e .` in a checkout, or install again with a C++ compiler"
    )
