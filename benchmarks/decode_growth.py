"""Does a token cost more the more tokens there are, by more than the attention over them?

Generates with kvpass and, around lengths from 64 to 4096, times steps of the engine and between them attention by
itself: the op ``kvpass::paged_attention`` with the shapes of that step, once for each layer. Had kvpass a cost of its
own that grows with the length, the steps would grow by more than attention does.

Figures are processor time of one thread, so that what else the machine does counts for little.

    python benchmarks/decode_growth.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from rich.table import Table

import kvpass
from kvpass.cli.terminal import output
from kvpass.engine.engine import Engine
from kvpass.models.pydecoder import PyDecoder, PyDecoderConfig, load
from kvpass.quality.measure import TO_THE_END, write_result
from kvpass.types import dtype_name

LENGTHS = (64, 128, 256, 512, 1024, 2048, 3072, 4096)
PROMPT = 16  # tokens, so that all the others are generated
AROUND = 30  # steps on each side of a length that count for it


def build_engine(random: bool, batch: int, longest: int) -> Engine:
    if random:
        torch.manual_seed(0)
        model = PyDecoder(PyDecoderConfig(d_model=512, num_layers=8, num_heads=8, num_kv_heads=4, d_ff=1536)).eval()
    else:
        model = load()
    blocks = batch * -(-(longest + 1) // 32)
    config = kvpass.CacheConfig(num_blocks=blocks, max_length=longest + 1, prefix_sharing=False)
    return kvpass.compile(model, config, verify=False)


class Attention:
    """The attention of one decode step of all layers over the engine's own caches, and nothing else."""

    def __init__(self, engine: Engine, batch: int) -> None:
        self.caches, self.size = engine.caches, engine.plan.block_size
        self.tables = torch.arange(len(self.caches[0][0])).view(batch, -1)
        heads, width = engine.report.sites[0].query_heads, engine.plan.caches[0].key_dim
        self.queries = [torch.randn(batch, heads, width) for _ in self.caches]
        self.scale = engine.report.sites[0].scale
        self.query_start = torch.arange(batch + 1)

    def seconds(self, length: int) -> float:
        """Processor time of the attention of a step at this length."""
        # Fresh tensors, as in every step of the engine: the layers share one layout, different steps do not.
        tables = self.tables[:, : -(-length // self.size)].contiguous()
        lengths = torch.full((len(tables),), length)
        with torch.inference_mode():
            began = time.process_time()
            for query, (keys, values) in zip(self.queries, self.caches, strict=True):
                torch.ops.kvpass.paged_attention(query, keys, values, tables, lengths, self.query_start, self.scale)
            return time.process_time() - began


def measure(engine: Engine, attention: Attention, batch: int, lengths: tuple[int, ...]) -> dict[int, list[float]]:
    """Median seconds of a step, and of attention alone, around each length.

    Of every three steps the first is timed, and after the second attention is: right after a step, so that it finds in
    the processor's caches what attention within a step finds. The third step finds them disturbed by that.
    """
    prompts = [[(7 * row + column) % 251 + 1 for column in range(PROMPT)] for row in range(batch)]
    tokens = engine.stream(prompts, max(lengths) + AROUND - PROMPT, TO_THE_END)
    steps: dict[int, list[float]] = {length: [] for length in lengths}
    alone: dict[int, list[float]] = {length: [] for length in lengths}
    for length in range(PROMPT, max(lengths) + AROUND):
        began = time.process_time()
        for _ in range(batch):
            next(tokens)
        seconds = time.process_time() - began
        near = [each for each in lengths if abs(length - each) <= AROUND]
        for each in near if length % 3 == 0 else []:
            steps[each].append(seconds)
        for each in near if length % 3 == 1 else []:
            alone[each].append(attention.seconds(length))
    return {length: [statistics.median(steps[length]), statistics.median(alone[length])] for length in lengths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="sequences at once (default 1)")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which medians are taken (default 3)")
    parser.add_argument("--longest", type=int, default=max(LENGTHS), help="longest length (default 4096)")
    parser.add_argument("--random", action="store_true", help="a larger model of random weights, not the shipped one")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lengths = tuple(length for length in LENGTHS if length <= options.longest)
    engine = build_engine(options.random, options.batch, max(lengths) + AROUND)
    attention = Attention(engine, options.batch)
    runs = [measure(engine, attention, options.batch, lengths) for _ in range(options.repeats)]
    table = Table(title=f"one decode step, {options.batch} sequences, {dtype_name(engine.caches[0][0].dtype)}")
    for name in ("length", "step, ms", "attention, ms", "step grew by", "attention grew by", "step less attention"):
        table.add_column(name, justify="right")
    rows = []
    for length in lengths:
        step, alone = (1000 * statistics.median(run[length][column] for run in runs) for column in (0, 1))
        first = rows[0] if rows else {"step_ms": step, "attention_ms": alone}
        rows.append({"length": length, "step_ms": round(step, 4), "attention_ms": round(alone, 4)})
        grew, attention_grew = step - first["step_ms"], alone - first["attention_ms"]
        columns = (f"{length}", f"{step:.3f}", f"{alone:.3f}", f"{grew:.3f}", f"{attention_grew:.3f}")
        table.add_row(*columns, f"{step - alone:.3f}")
    output().print(table)
    name = "decode_growth_random" if options.random else "decode_growth"
    chosen = {"batch": options.batch, "repeats": options.repeats, "random": options.random}
    output().print(f"written to {write_result(options.results, name, chosen, rows)}", soft_wrap=True)


if __name__ == "__main__":
    main()
