"""Do the passes keep pace with torch.export, and does their time grow as the depth does and no faster?

Compiles one decoder with 2, 8, 32 and 80 equal layers, and reads the time of each pass from the report. The model is
the one that comes with the repository, small and with random weights: sizes of weights cost the passes nothing.

Figures are processor time of one thread, so that what else the machine does counts for little. Equal layers have one
mask: it is read and proven once, however many there are, which is counted.

    python benchmarks/depth.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.table import Table

import kvpass
from kvpass.cli.terminal import output
from kvpass.fx_passes.masks import read_masks
from kvpass.models.pydecoder import PyDecoder, PyDecoderConfig
from kvpass.quality.measure import write_result

DEPTHS = (2, 8, 32, 80)
VALIDATION = ("verify", "compare-capture", "verify-formats", "verify-mass")
APART = ("export", *VALIDATION)  # what is no pass


def measure(depth: int) -> dict[str, Any]:
    """For a decoder of so many layers: seconds of torch.export, of each pass and of verification; masks proven."""
    torch.manual_seed(0)
    config = PyDecoderConfig(
        vocab_size=128, d_model=32, num_layers=depth, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48
    )
    model = PyDecoder(config).eval()
    clock = mock.patch("time.perf_counter", time.process_time)  # the clock of the report
    with clock, mock.patch.object(read_masks, "read_mask_meaning", wraps=read_masks.read_mask_meaning) as proofs:
        report = kvpass.compile(model, kvpass.CacheConfig(num_blocks=8)).report
    assert len(report.sites) == depth and report.verification is not None and report.verification.passed
    return {"seconds": dict(report.seconds), "masks": proofs.call_count, "calls": report.calls[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, help="layers (default 2 8 32 80)")
    parser.add_argument("--repeats", type=int, default=1, help="runs, of which medians are taken (default 1)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure(2)  # what is loaded or compiled once
    table = Table(title="processor seconds of one compile")
    for name in (
        "layers",
        "export",
        "passes",
        "times export",
        "passes per layer, ms",
        "slowest pass",
        "masks",
        "verify",
        "with it, times export",
    ):
        table.add_column(name, justify="right")
    rows = []
    for depth in options.depths:
        runs = [measure(depth) for _ in range(options.repeats)]
        times = [run["seconds"] for run in runs]
        seconds = {name: round(statistics.median(time[name] for time in times), 4) for name in times[0]}
        counted = {name: runs[0][name] for name in ("masks", "calls")}
        each = {name: value for name, value in seconds.items() if name not in APART}
        passes, export = sum(each.values()), seconds["export"]
        verify = sum(seconds.get(name, 0.0) for name in VALIDATION)
        ratio = round(passes / export, 3)
        rows.append(
            {
                "layers": depth,
                "passes": round(passes, 4),
                "times_export": ratio,
                "verify": round(verify, 4),
                **counted,
                "seconds": seconds,
            }
        )
        slowest = max(each, key=lambda name: each[name])
        cells = (f"{depth}", f"{export:.2f}", f"{passes:.2f}", f"{ratio:.2f}", f"{1000 * passes / depth:.1f}")
        found = f"{slowest} {each[slowest]:.2f}", str(counted["masks"])
        table.add_row(*cells, *found, f"{verify:.2f}", f"{(passes + verify) / export:.2f}")
    output().print(table)
    chosen = {"depths": list(options.depths), "repeats": options.repeats}
    output().print(f"written to {write_result(options.results, 'depth', chosen, rows)}", soft_wrap=True)


if __name__ == "__main__":
    main()
