"""Tokens per second with prompt lookup, of chains and of trees, and without: where text is copied and where it is not.

Three kinds of requests to the shipped model: passages of held-out text that have begun to be repeated, decoded greedily
(copied); prompts of held-out text, continued greedily (greedy) or by drawing at temperature 1 (drawn), where little
occurs twice. Two engines of one model, one that drafts and one that does not, serve the same requests with the same
seeds, some tokens of the one and some of the other in turn: what slows the machine down for a while slows both. Each
turn begins with nothing known of what drafting costs, and reading the prompts is not part of the times. `times plain`
is the median over the turns of the ratio of both times, with its quartiles; `same` is the share of tokens before the
first that differs, which is a tie of two tokens up to rounding.

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
from kvpass.cli.terminal import output
from kvpass.models.eval_pydecoder import read_held_out
from kvpass.models.pydecoder import CHECKPOINT, load
from kvpass.quality.measure import CLOCKS, write_result
from kvpass.runtime.speculation.speculation import Drafter
from kvpass.types import Sampling

PASSAGE = 256  # tokens that are repeated, or of a prompt
BEGUN = 48  # tokens of the repetition that stand in the prompt
STRIDE = 2500  # tokens of held-out text from one prompt's start to the next one's
BATCHES = (1, 4)
TOKENS_A_TURN = 4  # tokens that one engine gives before the other goes on
DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "chains": kvpass.PromptLookup,
    "trees": lambda: kvpass.PromptLookup(branches=3),
}


def make_prompts(text: list[int], kind: str, count: int) -> list[list[int]]:
    passages = [text[STRIDE * i : STRIDE * i + PASSAGE] for i in range(count)]
    return [passage + passage[:BEGUN] for passage in passages] if kind == "copied" else passages


class Timed:
    """One engine's way through some requests; the clock runs from when each prompt has its first token.

    Attributes:
        seconds: time of its steps so far.
        outputs: the tokens of each prompt so far.
    """

    def __init__(
        self, engine: kvpass.Engine, prompts: list[list[int]], new: int, drawn: bool, clock: Callable[[], float]
    ) -> None:
        samplings = [Sampling(temperature=float(drawn), seed=seed, ignore_eos=True) for seed in range(len(prompts))]
        self._stream = engine.stream([list(prompt) for prompt in prompts], new, samplings)
        self._clock = clock
        self._left = len(prompts) * new
        self.seconds = 0.0
        self.outputs: list[list[int]] = [[] for _ in prompts]
        while not all(self.outputs):
            self._take()

    def step(self) -> bool:
        """Take the next few tokens; False when none are left."""
        start = self._clock()
        for _ in range(min(self._left, TOKENS_A_TURN)):
            self._take()
        self.seconds += self._clock() - start
        return self._left > 0

    def _take(self) -> None:
        index, token = next(self._stream)
        self.outputs[index].append(token)
        self._left -= 1


def same_tokens(left: list[list[int]], right: list[list[int]]) -> float:
    """Share of tokens before the first that differs."""
    same = 0
    for a, b in zip(left, right, strict=True):
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return same / sum(map(len, left))


def compare(
    plain: kvpass.Engine,
    engine: kvpass.Engine,
    prompts: list[list[int]],
    drawn: bool,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A row for each drafter; ``engine`` is the one that drafts."""
    rows = []
    tokens = len(prompts) * (options.new_tokens - 1)
    for name, make in DRAFTERS.items():
        plains: list[float] = []
        ratios: list[float] = []
        engine.speculate(make())  # the graphs that it needs are derived and checked here
        # The first turn reads the prompts and warms everything up.
        for turn in range(options.turns + 1):
            engine.speculate(make())
            before = engine.stats()
            order = (plain, engine) if turn % 2 else (engine, plain)
            both = {each: Timed(each, prompts, options.new_tokens, drawn, CLOCKS[options.clock]) for each in order}
            while any([both[each].step() for each in order]):
                pass
            after = engine.stats()
            if turn:
                plains.append(both[plain].seconds)
                ratios.append(both[plain].seconds / both[engine].seconds)
        engine.speculate(None)
        drafted = after.drafted_tokens - before.drafted_tokens
        quartiles = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "batch": len(prompts),
                "drafts": name,
                "plain_tokens_per_second": round(tokens / statistics.median(plains), 1),
                "times_plain": round(statistics.median(ratios), 3),
                "quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
                "drafted_per_token": round(drafted / tokens, 3),
                "trees_per_token": round((after.drafted_trees - before.drafted_trees) / tokens, 3),
                "accepted_of_drafted": round((after.accepted_tokens - before.accepted_tokens) / max(1, drafted), 3),
                "same": round(same_tokens(both[plain].outputs, both[engine].outputs), 4),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=192, help="new tokens of each prompt (default 192)")
    parser.add_argument("--turns", type=int, default=9, help="turns of each (default 9)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="on a busy machine: processor, with one thread")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = kvpass.CacheConfig(memory="256MiB", max_length=1024)
    plain, engine = kvpass.compile(load(), config), kvpass.compile(load(), config)
    text = read_held_out(CHECKPOINT)[0].tolist()
    table = Table(title=f"prompt lookup, tokens per second of {options.clock} time, {options.threads} threads")
    columns = ("requests", "batch", "drafts", "plain", "times plain", "quartiles", "drafted", "right", "same")
    for name in columns:
        table.add_column(name, justify="right")
    rows = []
    started = time.monotonic()
    for kind in ("copied", "greedy", "drawn"):
        for batch in BATCHES:
            prompts = make_prompts(text, kind, batch)
            for row in compare(plain, engine, prompts, kind == "drawn", options):
                rows.append({"requests": kind, "new_tokens": options.new_tokens, **row})
                quartiles = " to ".join(f"{ratio:.2f}" for ratio in row["quartiles"])
                shares = (f"{row[name]:.2f}" for name in ("drafted_per_token", "accepted_of_drafted", "same"))
                speeds = (f"{row['plain_tokens_per_second']:.1f}", f"{row['times_plain']:.2f}")
                table.add_row(kind, str(batch), row["drafts"], *speeds, quartiles, *shares)
    output().print(table)
    chosen = {name: getattr(options, name) for name in ("new_tokens", "turns", "threads", "clock")}
    chosen["seconds"] = round(time.monotonic() - started)
    output().print(f"written to {write_result(options.results, 'speculative', chosen, rows)}", soft_wrap=True)


if __name__ == "__main__":
    main()
