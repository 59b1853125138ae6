"""``kvpass.export`` and ``kvpass.audit``: from a decoder without a cache to a file that has one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from kvpass.compiler import compile
from kvpass.config import CacheConfig
from kvpass.exporters.audit import AuditResult
from kvpass.exporters.audit import audit as audit_folder
from kvpass.exporters.export_module import ExportResult


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str = "pt2",
    *,
    config: CacheConfig | None = None,
    context: int | None = None,
    example_inputs: Any = None,
    verify: bool = True,
    audit: bool = True,
) -> ExportResult:
    """Rewrite a decoder and write one step of it as a file, with a manifest and an example, in a new folder.

    Args:
        model: as for :func:`kvpass.compile`, on the CPU.
        path: as for :meth:`kvpass.Engine.export`; this and the next, ``context`` and ``audit`` likewise.
        format: what to write.
        config: formats and block size of the cache; its size is of no consequence.
        context: tokens of a sequence in formats with static caches.
        example_inputs: as for :func:`kvpass.compile`.
        verify: likewise.
        audit: whether the file is run and held to the rewritten model.

    Raises:
        InputError: as :func:`kvpass.compile` and :meth:`kvpass.Engine.export`; RefusedError, VerificationError and
            ConfigError likewise.
    """
    engine = compile(model, config or CacheConfig(num_blocks=1), example_inputs=example_inputs, verify=verify)
    with engine:
        return engine.export(path, format, context=context, audit=audit)


def audit(path: str | os.PathLike[str]) -> AuditResult:
    """Audit a folder that was exported, here or on another machine: its files, its inputs and outputs, its numbers.

    Raises:
        InputError: if it is no export of this version of kvpass, a file is missing, cut short or changed, or its
            runtime is not installed.
        VerificationError: if it does not give what the rewritten model gave.
    """
    return audit_folder(Path(path).expanduser())
