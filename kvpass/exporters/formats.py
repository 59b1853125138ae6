"""The formats of an export, one row each: the dialect of its graph, the contract of its inputs, and what writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Graph

from kvpass.errors import ConfigError
from kvpass.exporters.checks.contrib_checks import check_contrib_nodes, check_contrib_twin
from kvpass.exporters.checks.onnx_checks import check_onnx
from kvpass.exporters.checks.tensorrt_checks import check_tensorrt
from kvpass.exporters.dialects.coded_caches import INT4, INT8
from kvpass.exporters.dialects.contracts import Contract, Growing, Paged, Port, Static
from kvpass.exporters.dialects.contrib_paged import ONNX_CONTRIB_PAGED, PagedRows, no_paged_caches
from kvpass.exporters.dialects.contrib_rows import ONNX_CONTRIB, EvenRows
from kvpass.exporters.dialects.exported_step import ExportedStep, export_step, refusals
from kvpass.exporters.dialects.foreign_ops import modules_of, unknown_ops
from kvpass.exporters.dialects.native_ops import NATIVE
from kvpass.exporters.dialects.onnx_paged import ONNX_PAGED, Bodies
from kvpass.exporters.dialects.onnx_rows import ONNX_GROWING, ONNX_STATIC, OPSET
from kvpass.exporters.dialects.plain_ops import PLAIN
from kvpass.exporters.dialects.tensorrt_rows import ONNX_TENSORRT
from kvpass.exporters.examples import program_without_python
from kvpass.exporters.writers.contrib_files import split_twin
from kvpass.exporters.writers.genai_folder import cannot_hold, write_config, write_tokenizer
from kvpass.exporters.writers.onnx_file import TRANSLATED_OPSET, add_bodies, onnx_model, save
from kvpass.exporters.writers.tensorrt_engine import BATCH, write_engine
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
        checks: what an audit looks at before the file is run; each gives complaints about a folder and its manifest.
        players: the parts by which an audit runs the file, where the example needs a machine that may not be there.
        batch: rows of the largest batch, where the file is built for a range of them.
        cannot: what of a plan it cannot hold, as a phrase; None where it can.
        not_run: what of the files an audit does not run, as a sentence for the manifest; empty where it runs all.
    """

    name: str
    dialect: str
    caches: Caches
    gives_caches: bool
    write: Callable[[Source, Path], None]
    drivers: tuple[str, ...]
    needs: tuple[str, ...] = ()
    checks: tuple[Callable[[Path, Mapping[str, Any]], list[str]], ...] = ()
    players: tuple[str, ...] = ()
    batch: int | None = None
    cannot: Callable[[CachePlan], str | None] = lambda plan: None
    not_run: str = ""

    @property
    def is_static(self) -> bool:
        """Whether the caches have a fixed length."""
        return self.caches == "static"

    def contract(self, context: int) -> Contract:
        """The inputs."""
        return CONTRACTS[self.dialect](context)

    def refusals(self, module: PagedModule) -> list[Refusal]:
        """What of a rewritten model the format cannot express."""
        reasons, graph = [self.cannot(module.plan)], module.graph_module.graph
        if check_onnx in self.checks and computes_in(graph, torch.bfloat16):
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
    opset = TRANSLATED_OPSET if step.dialect in (ONNX_PAGED, ONNX_CONTRIB_PAGED) else OPSET
    model = onnx_model(export_step(step), step.ports, source.outputs, opset)
    add_bodies(model, step.last.shared.get("bodies", Bodies()))
    save(model, folder)


def write_contrib_paged(source: Source, folder: Path) -> None:
    """The step as an ONNX model for the CUDA provider, and its twin."""
    write_onnx(source, folder)
    split_twin(folder)


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
    return no_codes(plan) or cannot_hold(plan)


def no_codes(plan: CachePlan) -> str | None:
    """Caches in other numbers than those that every runtime computes in."""
    return _cache_beyond(plan, ("float32", "float16"))


def _cache_beyond(plan: CachePlan, formats: tuple[str, ...]) -> str | None:
    found = [form for spec in plan.caches for form in (spec.key_format, spec.value_format)]
    return next((f"a cache in {form}" for form in found if form not in formats), None)


def write_tensorrt(source: Source, folder: Path) -> None:
    """The ONNX model, and the engine that TensorRT builds of it."""
    write_onnx(source, folder)
    contract = source.step.contract
    assert isinstance(contract, Static)
    write_engine(folder, source.step.ports, contract.context)


TENSORRT_NOT_RUN = "model.engine needs a GPU and is not run: what is run is model.onnx, of which it was built"
CUDA_NOT_RUN = (
    "where onnxruntime has no CUDA provider, model.onnx is not run: its nodes of com.microsoft::PagedAttention are "
    "held to the schema of the installed onnxruntime, and what is run is twin.onnx, the same graph with bodies of "
    "standard ops in their place"
)
CONTRACTS: dict[str, Callable[[int], Contract]] = {
    NATIVE: lambda context: Paged(apart=False),
    PLAIN: lambda context: Paged(says_widest=True),
    ONNX_PAGED: lambda context: Paged(),
    ONNX_CONTRIB_PAGED: lambda context: PagedRows(),
    ONNX_STATIC: Static,
    ONNX_CONTRIB: EvenRows,
    ONNX_TENSORRT: Static,
    ONNX_GROWING: lambda context: Growing(),
}
ONNX_NEEDS = ("onnx", "onnxscript", "onnxruntime")
GENAI_NEEDS, TENSORRT_NEEDS = (*ONNX_NEEDS, "onnxruntime_genai"), (*ONNX_NEEDS, "tensorrt_rtx")
PT2_PARTS, AOTI_PARTS = ("pt2_program", "paged_decoder"), ("aoti_program", "paged_decoder")
STATIC_PARTS, PAGED_PARTS = ("onnx_program", "static_decoder"), ("onnx_program", "paged_decoder")
FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("pt2", NATIVE, "paged", False, write_pt2, PT2_PARTS),
        Format("aoti", PLAIN, "paged", False, write_aoti, AOTI_PARTS),
        Format("onnx", ONNX_STATIC, "static", True, write_onnx, STATIC_PARTS, ONNX_NEEDS, (check_onnx,),
               cannot=no_onnx_numbers),
        Format("onnx-paged", ONNX_PAGED, "paged", True, write_onnx, PAGED_PARTS, ONNX_NEEDS, (check_onnx,),
               cannot=no_onnx_numbers),
        Format("ort-contrib", ONNX_CONTRIB, "static", True, write_onnx, STATIC_PARTS, ONNX_NEEDS,
               (check_onnx, check_contrib_nodes), cannot=no_codes),
        Format("ort-contrib-paged", ONNX_CONTRIB_PAGED, "paged", True, write_contrib_paged,
               ("contrib_program", "paged_decoder"), ONNX_NEEDS, (check_onnx, check_contrib_nodes, check_contrib_twin),
               cannot=no_paged_caches, not_run=CUDA_NOT_RUN),
        Format("ort-genai", ONNX_GROWING, "growing", True, write_genai, ("genai_decoder",), GENAI_NEEDS, (check_onnx,),
               cannot=no_genai_caches),
        Format("tensorrt", ONNX_TENSORRT, "static", True, write_tensorrt, ("tensorrt_program", "static_decoder"),
               TENSORRT_NEEDS, (check_onnx, check_tensorrt), STATIC_PARTS, BATCH, no_codes, TENSORRT_NOT_RUN),
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
