"""Whether a forward turns a length into text, which a capture does not see as what it is."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import sympy
import torch

from kvpass.errors import CaptureError

# Whoever turns a length into text there tells somebody of it, and decides nothing.
OTHERS = tuple(os.path.join(os.path.dirname(inspect.getfile(of)), "") for of in (torch, sympy, logging, CaptureError))


@contextmanager
def lengths_that_are_no_text() -> Iterator[None]:
    """Refuse a forward that asks for the text of a batch size or a length while it is captured.

    During the capture the text is the name of a symbol, and else a number: what the forward makes of it is another
    function then, and nothing in the graph tells.

    Raises:
        CaptureError: naming the line, once the block is left.
    """
    lines: list[str] = []
    original = torch.SymInt.__repr__

    def noted(size: torch.SymInt) -> Any:
        code = sys._getframe(1).f_code
        if not code.co_filename.startswith(OTHERS):
            lines.append(f"{os.path.basename(code.co_filename)}, line {sys._getframe(1).f_lineno}")
        return original(size)  # type: ignore[no-untyped-call]

    with patch.object(torch.SymInt, "__repr__", noted):
        yield
    if lines:
        raise CaptureError(
            f"the forward turns the batch size or the length into text ({lines[0]}), and may go by what it reads "
            "there: the graph would not tell. Compare the number itself, or leave the text out of the forward"
        )
