"""What an engine can be written out as."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from kvpass.engine.fingerprint import fingerprint
from kvpass.engine.step_module import StepModule
from kvpass.engine.weights_watch import WeightsWatch
from kvpass.errors import InputError
from kvpass.exporters.export_module import ExportResult, export_module
from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.report import RewriteReport


class Exports:
    """The part of an engine that writes its rewritten model to files."""

    module: StepModule
    report: RewriteReport
    tokenizer: Any
    _eos_token_ids: tuple[int, ...]
    _weights: WeightsWatch

    def export(
        self,
        path: str | os.PathLike[str],
        format: str = "pt2",
        *,
        context: int | None = None,
        audit: bool = True,
        begin: Callable[[str], None] = lambda stage: None,
    ) -> ExportResult:
        """Write one step of the rewritten model as a file, with a manifest and an example, in a new folder.

        Args:
            path: the folder, which must not exist; it gets its name once all of it is right.
            format: ``"pt2"``, ``"aoti"``, ``"onnx"``, ``"onnx-paged"``, ``"ort-contrib"``, ``"ort-contrib-paged"``,
                ``"ort-genai"`` or ``"tensorrt"``: see docs/export.md.
            context: of formats with static caches, tokens of a sequence; by default 2048, or what the model is proven
                for.
            audit: run the file in a fresh process, and hold it to the rewritten model.
            begin: called with the name of each stage as it begins.

        Raises:
            ConfigError: if there is no such format, or the context cannot be used.
            InputError: if the folder cannot be written, the model is not on the CPU, or something that the format needs
                is not installed.
            RefusedError: if the format cannot express the model; names those that can.
            WeightsChangedError: if a weight was changed whose value decided something.
            VerificationError: if the file does not give what the rewritten model gives; nothing is left of it.
        """
        module = self.module
        if not isinstance(module, PagedModule):
            raise InputError(f"a {type(module).__name__} cannot be exported: only what kvpass.compile rewrote")
        self._weights.check()  # what follows from weights that were changed is brought up to date, or it is an error
        if module.device.type != "cpu":
            raise InputError(f"the model is on {module.device}: compile it on the CPU to export it")
        return export_module(
            module,
            self.report,
            lambda: fingerprint(module, module.plan),
            path,
            format,
            context,
            self._eos_token_ids,
            self.tokenizer,
            audit,
            begin,
        )
