"""The formats of an export, one row each: the dialect of its graph, the contract of its inputs, and what writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Graph

import kvpass.exporters.dialects.foreign_ops
import kvpass.exporters.dialects.native_ops
import kvpass.exporters.dialects.onnx_paged
import kvpass.exporters.dialects.onnx_rows
import kvpass.exporters.dialects.plain_ops  # noqa: F401 - the rows of the table
from kvpass.errors import ConfigError
from kvpass.exporters.dialects.coded_caches import INT4, INT8
from kvpass.exporters.dialects.contracts import Contract, Growing, Paged, Port, Static
from kvpass.exporters.dialects.exported_step import ExportedStep, export_step, refusals
from kvpass.exporters.dialects.foreign_ops import modules_of, unknown_ops
from kvpass.exporters.dialects.native_ops import NATIVE
from kvpass.exporters.dialects.onnx_paged import ONNX_PAGED, Bodies
from kvpass.exporters.dialects.onnx_rows import ONNX_GROWING, ONNX_STATIC, OPSET
from kvpass.exporters.dialects.plain_ops import PLAIN
from kvpass.exporters.examples import program_without_python
from kvpass.exporters.writers.genai_folder import cannot_hold, write_config, write_tokenizer
from kvpass.exporters.writers.onnx_file import TRANSLATED_OPSET, add_bodies, onnx_model, save
from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.types import CachePlan, Refusal

PT2_FILE, CPP_FILE = "model.pt2", "run.cpp"


@dataclass(frozen=True)
class Source:
    """What a format writes.

    Attributes:
        step: the step in the format's dialect.
        outputs: what it gives.
        eos_token_ids: tokens that end a text.
        tokenizer: of the model, or None.
    """

    step: ExportedStep
    outputs: tuple[Port, ...]
    eos_token_ids: tuple[int, ...] = ()
    tokenizer: Any = None


Caches = Literal["paged", "static", "growing"]


@dataclass(frozen=True)
class Format:
    """One way to write a step.

    Attributes:
        name: as it is asked for.
        dialect: how ops of kvpass are said.
        caches: pools of blocks, rows of a fixed length, or rows that grow.
        gives_caches: whether caches are handed back, and not written in place.
        write: writes the files of a step into a folder.
        drivers: the parts of the example.
        needs: modules that have to be installed.
        cannot: what of a plan it cannot hold, as a phrase; None where it can.
    """

    name: str
    dialect: str
    caches: Caches
    gives_caches: bool
    write: Callable[[Source, Path], None]
    drivers: tuple[str, ...]
    needs: tuple[str, ...] = ()
    cannot: Callable[[CachePlan], str | None] = lambda plan: None

    @property
    def is_onnx(self) -> bool:
        """Whether the file is an ONNX model."""
        return "onnx" in self.needs

    @property
    def is_static(self) -> bool:
        """Whether the caches have a fixed length."""
        return self.caches == "static"

    def contract(self, context: int) -> Contract:
        """The inputs."""
        if self.caches == "paged":
            return Paged(says_widest=self.dialect == PLAIN, apart=self.dialect != NATIVE)
        return Static(context) if self.is_static else Growing()

    def refusals(self, module: PagedModule) -> list[Refusal]:
        """What of a rewritten model the format cannot express."""
        reasons, graph = [self.cannot(module.plan)], module.graph_module.graph
        if self.is_onnx and computes_in(graph, torch.bfloat16):
            reasons.append("a model that computes in bfloat16")
        if self.dialect == NATIVE:
            reasons += [f"the op {name}, which is registered by no module" for name in unknown_ops(graph)]
        found = [Refusal(reason, pass_name="export") for reason in reasons if reason]
        return found + refusals(module, self.dialect)

    def imports(self, module: PagedModule) -> tuple[str, ...]:
        """Modules that have to be imported where the file is run."""
        return modules_of(module.graph_module.graph) if self.dialect == NATIVE else ()


def computes_in(graph: Graph, dtype: torch.dtype) -> bool:
    """Whether a node of a graph has numbers of a dtype; its caches, which are inputs, do not count."""
    values = (node.meta.get("val") for node in graph.nodes if node.op == "call_function")
    return any(isinstance(value, Tensor) and value.dtype is dtype for value in values)


def write_pt2(source: Source, folder: Path) -> None:
    """``torch.export.save`` of the step."""
    torch.export.save(export_step(source.step), folder / PT2_FILE)


def write_aoti(source: Source, folder: Path) -> None:
    """The step as a package that AOTInductor has compiled."""
    step = source.step
    torch._inductor.aoti_compile_and_package(export_step(step), package_path=str(folder / PT2_FILE))
    (folder / CPP_FILE).write_text(program_without_python(step.plan, step.ports), encoding="utf-8")


def write_onnx(source: Source, folder: Path) -> None:
    """The step as an ONNX model with its weights beside it."""
    step = source.step
    opset = TRANSLATED_OPSET if step.dialect == ONNX_PAGED else OPSET
    model = onnx_model(export_step(step), step.ports, source.outputs, opset)
    add_bodies(model, step.last.shared.get("bodies", Bodies()))
    save(model, folder)


def write_genai(source: Source, folder: Path) -> None:
    """The folder that ONNX Runtime GenAI loads."""
    write_onnx(source, folder)
    write_config(folder, source.step.plan, source.eos_token_ids)
    write_tokenizer(folder, source.tokenizer)


def no_onnx_numbers(plan: CachePlan) -> str | None:
    """Caches in numbers for which ONNX Runtime has no kernels on a CPU: it can neither gather nor scatter fp8.

    bfloat16 it can store and cast, which is all that a cache asks for.
    """
    return _cache_beyond(plan, ("float32", "float16", "bfloat16", INT8, INT4))


def no_genai_caches(plan: CachePlan) -> str | None:
    """Caches that GenAI cannot hand on: it knows two tensors of a layer, and no scales."""
    return _cache_beyond(plan, ("float32", "float16")) or cannot_hold(plan)


def _cache_beyond(plan: CachePlan, formats: tuple[str, ...]) -> str | None:
    found = [form for spec in plan.caches for form in (spec.key_format, spec.value_format)]
    return next((f"a cache in {form}" for form in found if form not in formats), None)


ONNX_NEEDS = ("onnx", "onnxscript", "onnxruntime")
FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("pt2", NATIVE, "paged", False, write_pt2, ("pt2_program", "paged_decoder")),
        Format("aoti", PLAIN, "paged", False, write_aoti, ("aoti_program", "paged_decoder")),
        Format("onnx", ONNX_STATIC, "static", True, write_onnx, ("onnx_program", "static_decoder"), ONNX_NEEDS,
               no_onnx_numbers),
        Format("onnx-paged", ONNX_PAGED, "paged", True, write_onnx, ("onnx_program", "paged_decoder"), ONNX_NEEDS,
               no_onnx_numbers),
        Format("ort-genai", ONNX_GROWING, "growing", True, write_genai, ("genai_decoder",),
               (*ONNX_NEEDS, "onnxruntime_genai"), no_genai_caches),
    )
}  # fmt: skip


def find_format(name: str) -> Format:
    """The row called ``name``.

    Raises:
        ConfigError: if there is none.
    """
    if name not in FORMATS:
        raise ConfigError(f"there is no format {name!r}: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]
