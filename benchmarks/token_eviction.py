"""What forgetting tokens costs: how likely the shipped model finds its held-out text, by what is kept of the past.

Kept are the newest tokens beside the first ones (AttentionSinks), or fewer of them and those that have received the
most attention (HeavyHitters), as many tokens in all. Texts are read token by token through the engine: a grammar
allows only the token that comes next, and its log-probability by the model's own distribution is noted. What is kept
bounds the blocks of a text, as the figures show.

    python -m benchmarks.token_eviction
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from rich.table import Table

import kvpass
from kvpass.cli.terminal import output
from kvpass.loading import load_model
from kvpass.quality.eval_sets import EvalSizes, eval_sets
from kvpass.quality.measure import write_result

READ_BEFORE = 64  # tokens of a text that are given, the rest is scored
BLOCK_SIZE = 16
# What is kept of the past; all but the first keep as many tokens at most.
KEPT: dict[str, kvpass.AttentionSinks | kvpass.HeavyHitters | None] = {
    "everything": None,
    "16 sinks, 128 newest": kvpass.AttentionSinks(128, 16, every=32),
    "16 sinks, 64 heaviest, 64 newest": kvpass.HeavyHitters(64, 64, 16, every=32),
    "16 sinks, 32 heaviest, 96 newest": kvpass.HeavyHitters(96, 32, 16, every=32),
}


def force(text: list[int]) -> Any:
    """A grammar that permits one text only."""
    return lambda output: [text[READ_BEFORE + len(output)]]


def measure(model: Any, texts: list[list[int]], kept: str) -> dict[str, Any]:
    """Perplexity of the texts, and of their last quarters, where most was forgotten."""
    forgetting = KEPT[kept]
    config = kvpass.CacheConfig(memory="256MiB", block_size=BLOCK_SIZE, forgetting=forgetting, prefix_sharing=False)
    engine = kvpass.compile(model, config, verify=False)
    handles = [
        engine.submit(
            text[:READ_BEFORE],
            len(text) - READ_BEFORE,
            kvpass.Sampling(ignore_eos=True, logprobs=0, allowed_tokens=force(text)),
        )
        for text in texts
    ]
    for handle in handles:
        handle.result()
    scores = [[entry.logprob for entry in handle.logprobs] for handle in handles]
    late = [row[3 * len(row) // 4 :] for row in scores]
    return {
        "kept": kept,
        "perplexity": round(perplexity(scores), 4),
        "perplexity_of_last_quarter": round(perplexity(late), 4),
        "blocks_of_text": round(
            engine.stats().bytes_peak_used / engine.stats().bytes_reserved * engine.stats().blocks_total / len(texts), 1
        ),
    }


def perplexity(scores: list[list[float]]) -> float:
    flat = [score for row in scores for score in row]
    return math.exp(-sum(flat) / len(flat))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=2, help="texts (default 2)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each (default 512)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    options = parser.parse_args()
    loaded = load_model("pydecoder")
    sizes = EvalSizes(text_tokens=options.texts * options.tokens, window=options.tokens, new_tokens=1)
    samples = eval_sets(loaded, None, sizes).samples
    texts = samples[0].input_ids[: options.texts].tolist()
    rows = [measure(loaded.model, texts, kept) for kept in KEPT]
    table = Table(title=f"{len(texts)} texts of {options.tokens} tokens, blocks of {BLOCK_SIZE}")
    for name in ("kept", "perplexity", "of the last quarter", "blocks of a text at most"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = (f"{row['perplexity']:.3f}", f"{row['perplexity_of_last_quarter']:.3f}", f"{row['blocks_of_text']:.0f}")
        table.add_row(row["kept"], *cells)
    output().print(table)
    chosen = {"texts": len(texts), "tokens": options.tokens, "block_size": BLOCK_SIZE}
    output().print(f"written to {write_result(options.results, 'token_eviction', chosen, rows)}", soft_wrap=True)


if __name__ == "__main__":
    main()
