"""Tokens per second with prompt lookup, of chains and of trees, and without: where text is copied and where it is not.

Three kinds of requests to the shipped model: passages of held-out text that have begun to be repeated, decoded greedily
(copied); prompts of held-out text, continued greedily (greedy) or by drawing at temperature 1 (drawn), where little
occurs twice. Runs of the three take turns, each over the same requests with the same seeds, and each begins with
nothing known of what drafting costs. Reading the prompts is not part of the times. Ratios are of medians; `same` is the
share of tokens before the first that differs, which is a tie of two tokens up to rounding.

    python benchmarks/speculative.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import kvpass
from kvpass.measure import CLOCKS, write_result
from kvpass.models.eval_pydecoder import read_held_out
from kvpass.models.pydecoder import CHECKPOINT, load
from kvpass.runtime.speculation import Drafter
from kvpass.terminal import output
from kvpass.types import Sampling

PASSAGE = 256  # tokens that are repeated, or of a prompt
BEGUN = 48  # tokens of the repetition that stand in the prompt
STRIDE = 2500  # tokens of held-out text from one prompt's start to the next one's
BATCHES = (1, 4)
DRAFTERS: dict[str, Callable[[], Drafter | None]] = {
    "plain": lambda: None,
    "chains": kvpass.PromptLookup,
    "trees": lambda: kvpass.PromptLookup(branches=3),
}


def make_prompts(text: list[int], kind: str, count: int) -> list[list[int]]:
    passages = [text[STRIDE * i : STRIDE * i + PASSAGE] for i in range(count)]
    return [passage + passage[:BEGUN] for passage in passages] if kind == "copied" else passages


def run(
    engine: kvpass.Engine, prompts: list[list[int]], new: int, drawn: bool, clock: Callable[[], float]
) -> tuple[float, list[list[int]]]:
    """Seconds from the first token of each prompt to the last of all, and the tokens."""
    samplings = [Sampling(temperature=float(drawn), seed=seed, ignore_eos=True) for seed in range(len(prompts))]
    outputs: list[list[int]] = [[] for _ in prompts]
    start = 0.0
    for index, token in engine.stream([list(prompt) for prompt in prompts], new, samplings):
        outputs[index].append(token)
        if sum(map(len, outputs)) == len(prompts):
            start = clock()
    return clock() - start, outputs


def same_tokens(left: list[list[int]], right: list[list[int]]) -> float:
    """Share of tokens before the first that differs."""
    same = 0
    for a, b in zip(left, right, strict=True):
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return same / sum(map(len, left))


def compare(
    engine: kvpass.Engine, prompts: list[list[int]], new: int, turns: int, drawn: bool, clock: str
) -> list[dict[str, Any]]:
    """A row for each drafter but none."""
    seconds: dict[str, list[float]] = {name: [] for name in DRAFTERS}
    outputs: dict[str, list[list[int]]] = {}
    drafted = dict.fromkeys(DRAFTERS, 0)
    accepted = dict.fromkeys(DRAFTERS, 0)
    trees = dict.fromkeys(DRAFTERS, 0)
    run(engine, prompts, new, drawn, CLOCKS[clock])  # reads the prompts, and warms everything up
    for _ in range(turns):
        for name, make in DRAFTERS.items():
            engine.speculate(make())
            before = engine.stats()
            spent, outputs[name] = run(engine, prompts, new, drawn, CLOCKS[clock])
            after = engine.stats()
            drafted[name] += after.drafted_tokens - before.drafted_tokens
            accepted[name] += after.accepted_tokens - before.accepted_tokens
            trees[name] += after.drafted_trees - before.drafted_trees
            seconds[name].append(spent)
    engine.speculate(None)
    plain, tokens = statistics.median(seconds["plain"]), len(prompts) * (new - 1)
    return [
        {
            "batch": len(prompts),
            "drafts": name,
            "new_tokens": new,
            "plain_tokens_per_second": round(tokens / plain, 2),
            "lookup_tokens_per_second": round(tokens / statistics.median(seconds[name]), 2),
            "times_plain": round(plain / statistics.median(seconds[name]), 3),
            "drafted_per_token": round(drafted[name] / turns / tokens, 3),
            "trees_per_token": round(trees[name] / turns / tokens, 3),
            "accepted_of_drafted": round(accepted[name] / max(1, drafted[name]), 3),
            "same": round(same_tokens(outputs["plain"], outputs[name]), 4),
        }
        for name in DRAFTERS
        if name != "plain"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=192, help="new tokens of each prompt (default 192)")
    parser.add_argument("--turns", type=int, default=5, help="runs of each (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="on a busy machine: processor, with one thread")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    engine = kvpass.compile(load(), kvpass.CacheConfig(memory="256MiB", max_length=1024))
    text = read_held_out(CHECKPOINT)[0].tolist()
    table = Table(title=f"prompt lookup, tokens per second of {options.clock} time, {options.threads} threads")
    columns = ("requests", "batch", "drafts", "plain", "prompt lookup", "times plain", "drafted", "right", "same")
    for name in columns:
        table.add_column(name, justify="right")
    rows = []
    started = time.monotonic()
    for kind in ("copied", "greedy", "drawn"):
        for batch in BATCHES:
            prompts = make_prompts(text, kind, batch)
            drawn = kind == "drawn"
            for row in compare(engine, prompts, options.new_tokens, options.turns, drawn, options.clock):
                rows.append({"requests": kind, **row})
                figures = ("times_plain", "drafted_per_token", "accepted_of_drafted", "same")
                speeds = (f"{row[f'{name}_tokens_per_second']:.1f}" for name in ("plain", "lookup"))
                table.add_row(kind, str(batch), row["drafts"], *speeds, *(f"{row[name]:.2f}" for name in figures))
    output().print(table)
    chosen = {name: getattr(options, name) for name in ("new_tokens", "turns", "threads", "clock")}
    chosen["seconds"] = round(time.monotonic() - started)
    output().print(f"written to {write_result(options.results, 'speculative', chosen, rows)}", soft_wrap=True)


if __name__ == "__main__":
    main()
