"""The loop without a cache that everybody writes first, unchanged but for `with kvpass.cached(model)`.

    logits = model(ids)[:, -1]
    ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)

Tokens per second of the loop on the shipped model by itself, of the same loop on the model that
`torch.compile(backend="kvpass")` has compiled, in a scope, and of `engine.generate`; greedy, one sequence, taking turns
of a few steps each, each on one thread or on all, as suits it better. Medians over all steps.

    python benchmarks/torch_compile.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kvpass
from kvpass.cli.terminal import output
from kvpass.models.eval_pydecoder import read_held_out
from kvpass.models.pydecoder import CHECKPOINT, load
from kvpass.quality.measure import Contender, EngineDecoder, count_agreeing, time_side_by_side, write_result

CONTEXT, NEW = 1024, 256
TARGETS = {"times_no_cache": 20.0, "of_engine": 0.9}


class Loop:
    """The loop, step by step."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.ids = torch.zeros(0, 0, dtype=torch.int64)

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """As :meth:`kvpass.quality.measure.Decoder.start`."""
        self.ids = torch.tensor([list(prompt) for prompt in prompts])
        return self._next()

    def step(self, tokens: Sequence[int]) -> list[int]:
        """As :meth:`kvpass.quality.measure.Decoder.step`."""
        self.ids = torch.cat((self.ids, torch.tensor(tokens)[:, None]), 1)
        return self._next()

    def _next(self) -> list[int]:
        with torch.no_grad():
            logits: Tensor = self.model(self.ids)[:, -1]
        tokens: list[int] = logits.argmax(-1).tolist()
        return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=8, help="turns of each (default 8)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    options = parser.parse_args()
    steps = NEW // options.turns
    model = load()
    sizes: dict[str, Any] = {"memory": "64MiB", "max_length": CONTEXT + NEW + 1}
    engine = kvpass.compile(model, kvpass.CacheConfig(**sizes))
    compiled = torch.compile(model, backend="kvpass", options=sizes | {"on_refusal": "error"})
    prompt = read_held_out(CHECKPOINT)[0][:CONTEXT].tolist()
    with kvpass.cached(compiled) as cache:
        contenders = (
            Contender("cached", Loop(compiled), steps),
            Contender("engine", EngineDecoder(engine, 1 + NEW), steps),
            Contender("no_cache", Loop(model), 1),
        )
        timings = time_side_by_side(contenders, [prompt], options.turns)
        stats = cache.stats()
    row: dict[str, Any] = {"context": CONTEXT, "new_tokens": options.turns * steps}
    for name, timing in timings.items():
        row[f"{name}_tokens_per_second"] = round(timing.tokens_per_second, 2)
        row[f"{name}_threads"] = timing.threads
    row["times_no_cache"] = round(row["cached_tokens_per_second"] / row["no_cache_tokens_per_second"], 2)
    row["of_engine"] = round(row["cached_tokens_per_second"] / row["engine_tokens_per_second"], 3)
    for name in ("engine", "no_cache"):
        agreeing, compared = count_agreeing(timings["cached"].tokens, timings[name].tokens)
        row[f"same_tokens_as_{name}"] = round(agreeing / compared, 4)
    row |= {"recompiles": stats.recompiles, "left_alone": stats.left_alone, "targets": TARGETS}
    for name, value in row.items():
        output().print(f"{name}: {value}")
    write_result(options.results, "torch_compile", {"turns": options.turns}, [row])


if __name__ == "__main__":
    main()
