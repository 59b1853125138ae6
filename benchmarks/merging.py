"""When is one matrix product of several projections faster than one for each?

For shapes of projections that read one input (queries, keys and values; the halves of a gated feed-forward), in
float32: microseconds of the products by themselves and of the common one with its split, by number of tokens. Weights
of many layers are read in turn, so that none is found in a cache of the processor. For two halves the gate is timed
too, which reads halves of rows when they come from one product.

    python benchmarks/merging.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from kvpass.cli.terminal import output
from kvpass.fx_passes.optimization.merge_projections import LARGE_ON_CPU
from kvpass.quality.measure import write_result

SHAPES: dict[str, tuple[int, tuple[int, ...]]] = {  # width of the input, widths of the results
    "GQA, 256": (256, (512, 128, 128)),
    "GQA, 512": (512, (512, 128, 128)),
    "GQA, 1024": (1024, (1024, 256, 256)),
    "MHA, 512": (512, (512, 512, 512)),
    "MHA, 768": (768, (768, 768, 768)),
    "gate and up, 256": (256, (512, 512)),
    "gate and up, 768": (768, (2048, 2048)),
}
TOKENS = (1, 8, 64)
WEIGHTS = 16_000_000  # numbers that are read in turn


def best(functions: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Shortest seconds of each, run in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for kept, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            function()
            kept.append(time.perf_counter() - start)
    return [min(kept[1:]) for kept in times]


def measure(width: int, parts: tuple[int, ...], tokens: int, repeats: int) -> dict[str, float]:
    """Microseconds of one layer, apart and merged."""
    layers = max(1, WEIGHTS // (width * sum(parts)))
    whole = [torch.randn(sum(parts), width) for _ in range(layers)]
    pieces = [weight.split(list(parts)) for weight in whole]
    x = torch.randn(1, tokens, width)

    def finish(results: tuple[Tensor, ...]) -> Any:
        return F.silu(results[0]) * results[1] if len(parts) == 2 else results

    def apart() -> None:
        for weights in pieces:
            finish(tuple(F.linear(x, weight) for weight in weights))

    def merged() -> None:
        for weight in whole:
            finish(F.linear(x, weight).split_with_sizes(list(parts), -1))

    apart_seconds, merged_seconds = (1e6 * seconds / layers for seconds in best([apart, merged], repeats))
    return {"apart_us": round(apart_seconds, 1), "merged_us": round(merged_seconds, 1)}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="runs, of which the shortest counts (default 15)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = Table(title="merged / apart, times; below 1 the common product is faster")
    for name in ("projections", "merged on a CPU", *(f"{tokens} tokens" for tokens in TOKENS)):
        table.add_column(name, justify="right")
    rows = []
    for name, (width, parts) in SHAPES.items():
        joined = sum(width * part >= LARGE_ON_CPU for part in parts) < 2
        cells = []
        for tokens in TOKENS:
            found = measure(width, parts, tokens, options.repeats)
            cells.append(f"{found['merged_us'] / found['apart_us']:.2f}")
            rows.append({"projections": name, "in": width, "out": parts, "tokens": tokens, "merges": joined, **found})
        table.add_row(name, "yes" if joined else "no", *cells)
    output().print(table)
    output().print(f"written to {write_result(options.results, 'merging', {'repeats': options.repeats}, rows)}")


if __name__ == "__main__":
    main()
