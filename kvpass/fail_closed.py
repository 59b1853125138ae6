"""What breaks behind the passes breaks closed: the model is left alone, and the user gets one error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvpass.errors import ConfigError, InputError, RefusedError
from kvpass.report import RewriteReport
from kvpass.types import Refusal

# What the caller can mend is told as it is; so is what was refused or found to differ, and want of memory.
KEPT = (ConfigError, InputError, RefusedError, MemoryError, torch.OutOfMemoryError)


@contextmanager
def fail_closed(stage: str, seconds: dict[str, float] | None = None) -> Iterator[None]:
    """Turn an exception of a stage that is none of :data:`KEPT` into a refusal by it.

    Args:
        stage: kebab-case name of the stage.
        seconds: time of each step so far, for the report.
    """
    try:
        yield
    except KEPT:
        raise
    except Exception as error:
        reason = f"the pass failed, which is a defect of kvpass worth a report: {type(error).__name__}: {error}"
        report = RewriteReport(refusals=(Refusal(reason, pass_name=stage),), seconds=dict(seconds or {}))
        message = f"kvpass cannot prove a rewrite of this model, and leaves it alone:\n- {report.refusals[0]}"
        raise RefusedError(message, report) from error
