"""torch.export prints graphs of what it could not capture; the error says what matters of them."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TextIO

import torch

TORCH = os.path.join(os.path.dirname(torch.__file__), "")


class _WithoutTorch(io.TextIOBase):
    """A stream to which everybody writes but functions of torch."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, unless torch prints."""
        printing = sys._getframe(1).f_code.co_filename
        return len(text) if printing.startswith(TORCH) else self._stream.write(text)

    def flush(self) -> None:
        """Flush what is behind it."""
        self._stream.flush()

    def isatty(self) -> bool:
        """Whether what is behind it is a terminal."""
        return self._stream.isatty()


@contextmanager
def quiet_export() -> Iterator[None]:
    """Drop what torch itself prints on standard error, and its warning that its own trees are out of date."""
    with redirect_stderr(_WithoutTorch(sys.stderr)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        yield
