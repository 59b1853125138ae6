"""The commands ``kvpass export`` and ``kvpass audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kvpass.cli.terminal import line, mebibytes, output, stages
from kvpass.config import CACHE_DTYPES


def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to be made.")],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            help="pt2, aoti, onnx, onnx-paged, ort-contrib, ort-contrib-paged, ort-genai or tensorrt.",
        ),
    ] = "pt2",
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="As for inspect; by default the shipped one.")
    ] = "pydecoder",
    dtype: Annotated[str, typer.Option(help=f"Format of keys and values: {', '.join(CACHE_DTYPES)}.")] = "auto",
    context: Annotated[int | None, typer.Option(help="Tokens of a sequence, where caches are static.")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens per block, a power of two.")] = 32,
    audit: Annotated[bool, typer.Option(help="Run the file, and hold it to the rewritten model.")] = True,
) -> None:
    """Write a rewritten model as a file with a cache inside, a manifest and an example, and audit it."""
    from kvpass import CacheConfig, compile
    from kvpass.loading import load_model

    with stages() as stage:
        stage("compile")
        engine = compile(load_model(model).model, CacheConfig(dtype=dtype, block_size=block_size, num_blocks=1))
        result = engine.export(out, format, context=context, audit=audit, begin=stage)
    table = Table("file", "size", title=f"{model} as {result.format}", title_justify="left")
    for name, size in result.files.items():
        table.add_row(name, mebibytes(size))
    output().print(table)
    line(output(), f"written to {result.folder}; try: python {result.folder / 'run.py'} 1,2,3")
    line(output(), f"audited: {result.audit}" if result.audit else "not audited: kvpass audit does that")


def audit(folder: Annotated[Path, typer.Argument(help="A folder that kvpass export has written.")]) -> None:
    """Audit an exported folder: its files, its inputs and outputs, its numbers."""
    from kvpass import audit

    line(output(), f"right: {audit(folder)}")
