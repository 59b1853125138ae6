"""The formats of an export, one row each: the dialect of its graph, the contract of its inputs, and what writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import kvpass.exporters.native_ops
import kvpass.exporters.onnx_paged
import kvpass.exporters.onnx_static
import kvpass.exporters.plain_ops  # noqa: F401 - the rows of the table
from kvpass.errors import ConfigError
from kvpass.exporters.contracts import Contract, Paged, Port, Static
from kvpass.exporters.exported_step import ExportedStep, export_step
from kvpass.exporters.native_ops import NATIVE
from kvpass.exporters.onnx_file import TRANSLATED_OPSET, add_bodies, onnx_model, save
from kvpass.exporters.onnx_paged import ONNX_PAGED, Bodies
from kvpass.exporters.onnx_static import ONNX_STATIC, OPSET
from kvpass.exporters.plain_ops import PLAIN

PT2_FILE = "model.pt2"


@dataclass(frozen=True)
class Format:
    """One way to write a step.

    Attributes:
        name: as it is asked for.
        holds: what is written, in a few words.
        dialect: how ops of kvpass are said.
        is_static: whether the caches are rows of a fixed length, and not pools of blocks.
        gives_caches: whether caches are handed back, and not written in place.
        write: writes the files of a step, with the outputs that it has, into a folder.
        program: the part of the example that runs the file.
        needs: modules that have to be installed.
    """

    name: str
    holds: str
    dialect: str
    is_static: bool
    gives_caches: bool
    write: Callable[[ExportedStep, tuple[Port, ...], Path], None]
    program: str
    needs: tuple[str, ...] = ()

    @property
    def is_onnx(self) -> bool:
        """Whether the file is an ONNX model."""
        return "onnx" in self.needs

    @property
    def decoder(self) -> str:
        """The part of the example that owns the caches."""
        return "static_decoder" if self.is_static else "paged_decoder"

    def contract(self, context: int) -> Contract:
        """The inputs."""
        return Static(context) if self.is_static else Paged(says_widest=self.dialect == PLAIN)


def write_pt2(step: ExportedStep, outputs: tuple[Port, ...], folder: Path) -> None:
    """``torch.export.save`` of the step."""
    torch.export.save(export_step(step), folder / PT2_FILE)


def write_aoti(step: ExportedStep, outputs: tuple[Port, ...], folder: Path) -> None:
    """The step as a package that AOTInductor has compiled."""
    torch._inductor.aoti_compile_and_package(export_step(step), package_path=str(folder / PT2_FILE))


def write_onnx(step: ExportedStep, outputs: tuple[Port, ...], folder: Path) -> None:
    """The step as an ONNX model with its weights beside it."""
    opset = OPSET if step.dialect == ONNX_STATIC else TRANSLATED_OPSET
    model = onnx_model(export_step(step), step.ports, outputs, opset)
    add_bodies(model, step.last.shared.get("bodies", Bodies()))
    save(model, folder)


ONNX_NEEDS = ("onnx", "onnxscript", "onnxruntime")
FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("pt2", "a program of torch.export that calls the kernels of kvpass", NATIVE, False, False, write_pt2,
               "pt2_program"),
        Format("aoti", "a package of AOTInductor that runs without kvpass", PLAIN, False, False, write_aoti,
               "aoti_program"),
        Format("onnx", "ONNX of standard ops over static caches", ONNX_STATIC, True, True, write_onnx, "onnx_program",
               ONNX_NEEDS),
        Format("onnx-paged", "ONNX with block tables: nodes of ai.kvpass with bodies of standard ops", ONNX_PAGED,
               False, True, write_onnx, "onnx_program", ONNX_NEEDS),
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
