"""Tokens per second with prompt lookup and without, where text is copied and where nothing is to be copied.

Three kinds of requests to the shipped model: passages of held-out text that have begun to be repeated, decoded greedily
(copied); prompts of held-out text, continued greedily (greedy) or by drawing at temperature 1 (drawn), where little
occurs twice. Runs with and without take turns, each over the same requests with the same seeds, and each begins with
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

import torch
from rich.table import Table

import kvpass
from kvpass.measure import CLOCKS, write_result
from kvpass.models.eval_pydecoder import read_held_out
from kvpass.models.pydecoder import CHECKPOINT, load
from kvpass.terminal import output
from kvpass.types import Sampling

PASSAGE = 256  # tokens that are repeated, or of a prompt
BEGUN = 48  # tokens of the repetition that stand in the prompt
STRIDE = 2500  # tokens of held-out text from one prompt's start to the next one's
BATCHES = (1, 4)


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
) -> dict[str, float]:
    seconds: dict[bool, list[float]] = {False: [], True: []}
    outputs: dict[bool, list[list[int]]] = {}
    drafted = accepted = 0
    for turn in range(2 * turns + 1):
        lookup = turn % 2 == 1
        engine.speculate(kvpass.PromptLookup() if lookup else None)
        before = engine.stats()
        spent, outputs[lookup] = run(engine, prompts, new, drawn, CLOCKS[clock])
        after = engine.stats()
        drafted += after.drafted_tokens - before.drafted_tokens
        accepted += after.accepted_tokens - before.accepted_tokens
        if turn:  # the first reads the prompts, and warms everything up
            seconds[lookup].append(spent)
    plain, looked_up = (statistics.median(seconds[kind]) for kind in (False, True))
    tokens = len(prompts) * (new - 1)
    return {
        "batch": len(prompts),
        "new_tokens": new,
        "plain_tokens_per_second": round(tokens / plain, 2),
        "lookup_tokens_per_second": round(tokens / looked_up, 2),
        "times_plain": round(plain / looked_up, 3),
        "drafted_per_token": round(drafted / turns / tokens, 3),
        "accepted_of_drafted": round(accepted / max(1, drafted), 3),
        "same": round(same_tokens(outputs[False], outputs[True]), 4),
    }


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
    for name in ("requests", "batch", "plain", "prompt lookup", "times plain", "drafted per token", "right", "same"):
        table.add_column(name, justify="right")
    rows = []
    started = time.monotonic()
    for kind in ("copied", "greedy", "drawn"):
        for batch in BATCHES:
            prompts = make_prompts(text, kind, batch)
            row = compare(engine, prompts, options.new_tokens, options.turns, kind == "drawn", options.clock)
            rows.append({"requests": kind, **row})
            table.add_row(
                kind,
                str(batch),
                f"{row['plain_tokens_per_second']:.1f}",
                f"{row['lookup_tokens_per_second']:.1f}",
                *(f"{row[name]:.2f}" for name in ("times_plain", "drafted_per_token", "accepted_of_drafted", "same")),
            )
    output().print(table)
    chosen = {name: getattr(options, name) for name in ("new_tokens", "turns", "threads", "clock")}
    chosen["seconds"] = round(time.monotonic() - started)
    output().print(f"written to {write_result(options.results, 'speculative', chosen, rows)}", soft_wrap=True)


if __name__ == "__main__":
    main()
