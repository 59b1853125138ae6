"""Families and plain decoders x formats of an export: right, or refused by name. Writes the table of `docs/export.md`.

    python -m benchmarks.export_matrix [--only TEXT] [--formats pt2,onnx]

Each model is compiled and verified once; each cell is one `engine.export`: the file is audited in a fresh
process over prefill, chunks, decode, ragged batches and a prefix that two sequences share. What is already in the
results for this version of the exporters is kept, so that a run can be broken off.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kvpass
from kvpass.exporters.formats import FORMATS
from kvpass.loading import load_model
from kvpass.models import zoo
from kvpass.quality.measure import write_result
from tests.decoders.catalogue import DECODERS

ROOT = Path(__file__).resolve().parents[1]
NAME = "export_matrix"
PAGE = ROOT / "docs" / "export.md"
BEGIN, END = "<!-- matrix -->\n", "<!-- end of matrix -->\n"

FAMILIES = ("gpt2", "llama", "mistral", "gemma2", "deepseek_v3", "qwen3_moe")
PLAIN = (
    "einsum, tril of ones", "latent by einsum, low-rank queries", "sinks as gates", "chunks of eight",
)  # fmt: skip
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "shipped": (lambda: load_model("pydecoder").model, {}),
    **{name: (lambda name=name: zoo.tiny(name)[0], {}) for name in FAMILIES},
    **{name: (partial(DECODERS[name], 6), {}) for name in PLAIN},
    "shipped, int8 cache": (lambda: load_model("pydecoder").model, {"dtype": "int8"}),
}


def cell(engine: kvpass.Engine, format: str) -> dict[str, Any]:
    """What comes of one model in one format."""
    began = time.perf_counter()
    context = 256 if FORMATS[format].is_static else None
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = engine.export(Path(folder) / "out", format, context=context)
            assert found.audit is not None
            row = {"status": "right", "error": found.audit.error, "bytes": sum(found.files.values())}
        except kvpass.VerificationError as error:
            row = {"status": "wrong", "why": str(error)}
        except kvpass.RefusedError as error:
            row = {"status": "refused", "why": str(error)}
        except Exception as error:
            traceback.print_exc()
            row = {"status": "crashed", "why": f"{type(error).__name__}: {error}"}
    return {**row, "seconds": round(time.perf_counter() - began, 1)}


def table(content: dict[str, Any]) -> str:
    """The part of the page between its marks, of the content of `export_matrix.json`."""
    machine, options, columns = content["machine"], content["options"], list(FORMATS)
    lines = [
        f"{machine['processor']}, torch {machine['torch']}, onnxruntime {options['onnxruntime']}, transformers "
        f"{options['transformers']}, {content['date']}, commit {options['revision']}; "
        "`python -m benchmarks.export_matrix`.",
        "",
        "| model | " + " | ".join(columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    cells = {(row["model"], row["format"]): row for row in content["results"]}
    for name in dict.fromkeys(row["model"] for row in content["results"]):
        lines.append(f"| {name} | " + " | ".join(_shown(cells.get((name, column))) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def _shown(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not run"
    return f"right ({found['error']:.0e})" if found["status"] == "right" else f"**{found['status']}**: {found['why']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose name holds this")
    parser.add_argument("--formats", default=",".join(FORMATS), help="with commas between them")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    file = given.results / f"{NAME}.json"
    rows = json.loads(file.read_text())["results"] if file.exists() else []
    cells = {(row["model"], row["format"]): row for row in rows}
    options = {name: version(name) for name in ("onnx", "onnxruntime", "transformers")}
    command = ["git", "rev-parse", "--short", "HEAD"]
    options["revision"] = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    for name, (make, config) in MODELS.items():
        wanted = [
            format
            for format in given.formats.split(",")
            if given.only in name and cells.get((name, format), {}).get("status") not in ("right", "refused")
        ]
        if not wanted:
            continue
        with kvpass.compile(make(), kvpass.CacheConfig(block_size=16, num_blocks=1, **config)) as engine:
            for format in wanted:
                cells[name, format] = {"model": name, "format": format, **cell(engine, format)}
                print(*cells[name, format].values(), flush=True)
                write_result(given.results, NAME, options, list(cells.values()))
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(before + BEGIN + table(json.loads(file.read_text())) + END + after, encoding="utf-8")
    sys.exit(any(row["status"] in ("wrong", "crashed") for row in cells.values()))


if __name__ == "__main__":
    main()
