"""Tokens per second of kvpass, of the same model without a cache, and of a contiguous cache written by hand.

All three decode the same prompts greedily, taking turns of a few steps each, each on one thread or on all, as suits it
better. Figures are medians over all steps, ratios are of medians. The time to read the prompts is not part of them; it
is in the JSON.

    python benchmarks/no_cache.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.table import Table

import kvpass
from kvpass.cli.terminal import output
from kvpass.models.eval_pydecoder import read_held_out
from kvpass.models.pydecoder import CHECKPOINT, PyDecoder, load
from kvpass.quality.contiguous_peer import ContiguousDecoder
from kvpass.quality.measure import (
    CLOCKS,
    Contender,
    EngineDecoder,
    UncachedDecoder,
    count_agreeing,
    time_side_by_side,
    write_result,
)

LENGTHS = (64, 256, 512, 1024, 2048)
BATCHES = (1, 8)
UNCACHED_STEPS = 1  # of a turn
STRIDE = 2500  # tokens of held-out text from one prompt's start to the next one's


def compare(
    model: PyDecoder, engine: kvpass.Engine, prompts: list[list[int]], steps: int, turns: int, clock: str
) -> dict[str, float]:
    contenders = (
        Contender("kvpass", EngineDecoder(engine, 1 + turns * steps), steps),
        Contender("contiguous", ContiguousDecoder(model, len(prompts), len(prompts[0]) + 1 + turns * steps), steps),
        Contender("no_cache", UncachedDecoder(model), UNCACHED_STEPS),
    )
    timings = time_side_by_side(contenders, prompts, turns, clock=CLOCKS[clock])
    row: dict[str, float] = {"batch": len(prompts), "length": len(prompts[0])}
    for name, timing in timings.items():
        row[f"{name}_tokens_per_second"] = round(timing.tokens_per_second, 2)
        row[f"{name}_threads"] = timing.threads
        row[f"{name}_start_seconds"] = round(timing.start_seconds, 4)
    ours = timings["kvpass"]
    row["times_no_cache"] = round(ours.tokens_per_second / timings["no_cache"].tokens_per_second, 3)
    row["times_contiguous"] = round(ours.tokens_per_second / timings["contiguous"].tokens_per_second, 3)
    for name in ("contiguous", "no_cache"):
        agreeing, compared = count_agreeing(ours.tokens, timings[name].tokens)
        row[f"same_tokens_as_{name}"] = round(agreeing / compared, 4)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="decode steps of a turn, with a cache (default 8)")
    parser.add_argument("--turns", type=int, default=8, help="turns of each (default 8)")
    parser.add_argument("--longest", type=int, default=max(LENGTHS), help="longest context (default 2048)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="most threads of torch (default all)"
    )
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="on a busy machine: processor, with one thread")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load()
    longest = options.longest + 1 + options.turns * options.steps
    one_step = max(BATCHES) * longest  # see EngineDecoder
    config = kvpass.CacheConfig(memory="256MiB", max_length=longest, max_batch_tokens=one_step)
    engine = kvpass.compile(model, config)
    text = read_held_out(CHECKPOINT)[0].tolist()
    table = Table(title=f"decoding, tokens per second of {options.clock} time, at most {options.threads} threads")
    for name in ("batch", "context", "kvpass", "contiguous", "no cache", "times contiguous", "times no cache"):
        table.add_column(name, justify="right")
    rows = []
    for batch in BATCHES:
        for length in (length for length in LENGTHS if length <= options.longest):
            prompts = [text[STRIDE * i : STRIDE * i + length] for i in range(batch)]
            row = compare(model, engine, prompts, options.steps, options.turns, options.clock)
            rows.append(row)
            speeds = [f"{row[f'{name}_tokens_per_second']:.1f}" for name in ("kvpass", "contiguous", "no_cache")]
            ratios = [f"{row['times_contiguous']:.2f}", f"{row['times_no_cache']:.1f}"]
            table.add_row(str(batch), str(length), *speeds, *ratios)
    output().print(table)
    chosen = {name: getattr(options, name) for name in ("steps", "turns", "clock")}
    chosen["uncached_steps"] = UNCACHED_STEPS
    output().print(f"written to {write_result(options.results, 'no_cache', chosen, rows)}", soft_wrap=True)


if __name__ == "__main__":
    main()
