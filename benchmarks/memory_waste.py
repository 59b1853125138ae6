"""How much of the allocated cache holds nothing, for sequences of ragged lengths.

The engine's own pool, scheduler and figures, under a module that computes nothing: where tokens lie does not depend on
what they are. Sequences have lengths drawn around a mean, of which the first tenth to nine tenths is the prompt and the
rest is generated, and no two share a prefix. Waste is slots of used blocks that hold no token over all slots of used
blocks, summed over all steps.

    python benchmarks/memory_waste.py
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

import kvpass
from kvpass.cli.terminal import mebibytes, output
from kvpass.quality.measure import TO_THE_END, write_result
from kvpass.report import RewriteReport
from kvpass.runtime.schedule.stats import EngineStats
from kvpass.types import CachePlan, CacheSpec, StepInputs

BLOCK_SIZES = (16, 32, 64)
VOCABULARY = 16
# 4 layers with 2 KV heads of 64 dims in float32, as the shipped model has.
BYTES_PER_TOKEN = 4 * 2 * 2 * 64 * 4


class Nothing:
    """Gives the same logits whatever the step is."""

    device = torch.device("cpu")

    def __call__(self, step: StepInputs, caches: object) -> Tensor:
        return torch.zeros(len(step.logits_index), VOCABULARY)


def draw_requests(count: int, mean: int, seed: int) -> list[tuple[list[int], int]]:
    """Prompts, and how many tokens to add to each; lengths are log-normal with a mean of exactly ``mean``."""
    draw = random.Random(seed)
    raw = [draw.lognormvariate(0.0, 0.6) for _ in range(count)]
    lengths = [max(2, round(mean * length * count / sum(raw))) for length in raw]
    lengths[0] += mean * count - sum(lengths)
    requests = []
    for length in lengths:
        prompt = min(length - 1, max(1, round(length * draw.uniform(0.1, 0.9))))
        requests.append(([draw.randrange(VOCABULARY) for _ in range(prompt)], length - prompt))
    return requests


def run(block_size: int, requests: list[tuple[list[int], int]], num_blocks: int) -> EngineStats:
    spec = CacheSpec("cache", 1, 1, 1, "float32", "float32")
    plan = CachePlan((spec,), block_size, VOCABULARY)
    config = kvpass.CacheConfig(block_size=block_size, num_blocks=num_blocks, prefix_sharing=False, max_sequences=64)
    engine = kvpass.Engine(Nothing(), plan, config, RewriteReport())
    # One stream for each request, read in turn: they end at different lengths.
    streams = [engine.stream([prompt], new, TO_THE_END) for prompt, new in requests]
    while streams:
        streams = [stream for stream in streams if next(stream, None) is not None]
    engine.check_integrity()
    return engine.stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64, help="sequences (default 64)")
    parser.add_argument("--mean", type=int, default=1000, help="mean length in tokens (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the lengths (default 0)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    options = parser.parse_args()
    requests = draw_requests(options.sequences, options.mean, options.seed)
    lengths = [len(prompt) + new for prompt, new in requests]
    table = Table(
        title=f"{len(lengths)} sequences of {min(lengths)} to {max(lengths)} tokens, {options.mean} on average"
    )
    for name in ("block size", "waste", "used at most", "one tensor of the longest length for each"):
        table.add_column(name, justify="right")
    rows = []
    for size in BLOCK_SIZES:
        stats = run(size, requests, sum(-(-length // size) for length in lengths))
        peak = stats.bytes_peak_used // 8 * BYTES_PER_TOKEN
        reserved = max(lengths) * len(lengths) * BYTES_PER_TOKEN
        table.add_row(str(size), f"{stats.waste:.2%}", mebibytes(peak), mebibytes(reserved))
        rows.append({"block_size": size, "waste": round(stats.waste, 5), "preemptions": stats.preemptions})
    output().print(table)
    chosen = {"sequences": options.sequences, "mean": options.mean, "seed": options.seed, "longest": max(lengths)}
    output().print(f"written to {write_result(options.results, 'memory_waste', chosen, rows)}", soft_wrap=True)


if __name__ == "__main__":
    main()
