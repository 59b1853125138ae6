"""The second start of a model, with what `torch.compiler.save_cache_artifacts()` took along, beside the first.

Each start is a process of its own: from `torch.compile(model, backend="kvpass")` to the first token of a loop in
`kvpass.cached`, for a decoder of as many layers as asked (that of models/pydecoder.py, random weights). First and
second starts take turns; imports and making the model are not part of the time, loading the artifacts is.

    python benchmarks/saved_start.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import kvpass
from kvpass.cli.terminal import output
from kvpass.models.pydecoder import PyDecoder, PyDecoderConfig
from kvpass.quality.measure import write_result

TARGET = 5.0  # times


def start(layers: int, artifacts: Path) -> dict[str, Any]:
    """One start in this process; saves what it made where nothing is saved yet."""
    torch.manual_seed(0)
    model = PyDecoder(PyDecoderConfig(num_layers=layers)).eval()
    ids = torch.arange(40)[None]
    is_first = not artifacts.exists()
    began = time.perf_counter()
    if not is_first:
        torch.compiler.load_cache_artifacts(artifacts.read_bytes())
    compiled = torch.compile(model, backend="kvpass", options={"memory": "64MiB", "on_refusal": "error"})
    with torch.no_grad(), kvpass.cached(compiled):
        token = int(compiled(ids)[0, -1].argmax())
    seconds = time.perf_counter() - began
    if is_first:
        saved = torch.compiler.save_cache_artifacts()
        assert saved is not None
        artifacts.write_bytes(saved[0])
    return {"seconds": seconds, "token": token, "bytes": artifacts.stat().st_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="of the decoder (default 12)")
    parser.add_argument("--rounds", type=int, default=3, help="of a first and a second start (default 3)")
    parser.add_argument("--start", type=Path, help="one start in this process, with the artifacts of this file")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    options = parser.parse_args()
    if options.start is not None:
        print(json.dumps(start(options.layers, options.start)))
        return
    found: dict[str, list[dict[str, Any]]] = {"first": [], "second": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--layers", str(options.layers), "--start", f"{folder}/artifacts"]
            for which in found.values():
                printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                which.append(json.loads(printed.splitlines()[-1]))
    seconds = {name: median(one["seconds"] for one in which) for name, which in found.items()}
    tokens = {one["token"] for which in found.values() for one in which}
    row = {
        "layers": options.layers,
        "rounds": options.rounds,
        "first_seconds": round(seconds["first"], 2),
        "second_seconds": round(seconds["second"], 2),
        "times": round(seconds["first"] / seconds["second"], 2),
        "target": TARGET,
        "same_token": len(tokens) == 1,
        "bytes": found["first"][0]["bytes"],
    }
    for name, value in row.items():
        output().print(f"{name}: {value}")
    write_result(options.results, "saved_start", {"layers": options.layers, "rounds": options.rounds}, [row])


if __name__ == "__main__":
    main()
