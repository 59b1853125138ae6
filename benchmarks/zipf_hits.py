"""How many hits of an unbounded cache does a bounded one keep, on conversations whose popularity follows Zipf's law?

A simulated model: the real block pool and prefix tree, and nothing computed. Each request is a turn of a conversation:
the whole conversation so far, then new tokens of the user and of the answer; some ask for the last turn once more, with
another answer. Conversations begin with one of a few system prompts and are over after some turns; which one goes on is
drawn by Zipf's law from those that are open. Hits are tokens that need not be computed. A capacity of 1.0 is the most
blocks that all open conversations take together: what is enough for a cache that knew which conversations are over. An
unbounded cache keeps those that are over as well.

    python benchmarks/zipf_hits.py
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.table import Table

from kvpass.measure import write_result
from kvpass.runtime.block_pool import BlockPool
from kvpass.runtime.eviction import POLICIES
from kvpass.runtime.prefix_cache import PrefixCache
from kvpass.runtime.prefix_nodes import TokenArray
from kvpass.terminal import output

BLOCK_SIZE = 16
SYSTEM_PROMPTS = 8
SYSTEM_TOKENS = 256
OPEN_CONVERSATIONS = 500
ZIPF_EXPONENT = 1.0
MAX_TURNS = 12
VOCABULARY = 50_000
ASKED_AGAIN = 0.15
CAPACITIES = (2.0, 1.0, 0.5, 0.25)


def draw_trace(requests: int, seed: int) -> Iterator[tuple[TokenArray, int]]:
    """The tokens of each request, prompt and answer, and the blocks that all open conversations take."""
    draw = random.Random(seed)
    numbers = np.random.default_rng(seed)
    weights = [1 / (rank + 1) ** ZIPF_EXPONENT for rank in range(OPEN_CONVERSATIONS)]
    systems = [numbers.integers(0, VOCABULARY, SYSTEM_TOKENS, dtype=np.int32) for _ in range(SYSTEM_PROMPTS)]
    conversations = [(systems[0], systems[0])] * OPEN_CONVERSATIONS
    turns = [0] * OPEN_CONVERSATIONS
    shared = SYSTEM_TOKENS // BLOCK_SIZE
    live = shared * SYSTEM_PROMPTS
    for index in draw.choices(range(OPEN_CONVERSATIONS), weights, k=requests):
        before, after = conversations[index]
        live -= len(after) // BLOCK_SIZE - shared
        if turns[index] == 0:
            turns[index] = draw.randint(1, MAX_TURNS)
            before = after = draw.choice(systems)
        again = draw.random() < ASKED_AGAIN
        before = before if again else after
        after = np.concatenate((before, numbers.integers(0, VOCABULARY, draw.randint(20, 200), dtype=np.int32)))
        conversations[index] = before, after
        turns[index] -= not again
        live += len(after) // BLOCK_SIZE - shared
        yield after, live


def replay(trace: list[TokenArray], num_blocks: int, policy: str) -> dict[str, int]:
    """Serve the trace one request after the other; the pool must hold the longest of them."""
    pool = BlockPool(num_blocks, BLOCK_SIZE)
    cache = PrefixCache(pool, policy=POLICIES[policy]())
    hits = asked = 0
    for tokens in trace:
        full = len(tokens) // BLOCK_SIZE
        match = cache.match(tokens, len(tokens))
        (blocks,) = cache.acquire(match)
        branch = match.branch
        hits += len(blocks)
        asked += full
        for block in pool.allocate(full - len(blocks)):
            start = len(blocks) * BLOCK_SIZE
            branch = cache.insert(branch, tokens[start : start + BLOCK_SIZE], [block])
            blocks.append(block)
        pool.release(blocks)
    pool.check_integrity([])
    cache.check_integrity()
    return {"hit_tokens": hits * BLOCK_SIZE, "asked_tokens": asked * BLOCK_SIZE, "blocks": pool.num_cached}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000, help="requests of the trace (default 100000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the trace (default 0)")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES), help="default: all")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    options = parser.parse_args()
    requests, seed = options.requests, options.seed
    trace, live = map(list, zip(*draw_trace(requests, seed), strict=True))
    enough = max(live)
    unbounded = replay(trace, sum(len(tokens) // BLOCK_SIZE for tokens in trace), "lru")
    rate = unbounded["hit_tokens"] / unbounded["asked_tokens"]
    table = Table(
        title=f"{requests} requests; {rate:.1%} of their tokens are hits of an unbounded cache, which ends with "
        f"{unbounded['blocks']} blocks; open conversations take up to {enough}"
    )
    for name in ("capacity", "blocks", *options.policies):
        table.add_column(name, justify="right")
    rows: list[dict[str, object]] = []
    for capacity in CAPACITIES:
        blocks = int(enough * capacity)
        kept = {name: replay(trace, blocks, name)["hit_tokens"] / unbounded["hit_tokens"] for name in options.policies}
        table.add_row(f"{capacity:.0%}", str(blocks), *(f"{share:.2%}" for share in kept.values()))
        rows.append({"capacity": capacity, "blocks": blocks, **{name: round(share, 5) for name, share in kept.items()}})
    output().print(table)
    chosen = {"requests": requests, "seed": seed, "hit_rate": round(rate, 5), "unbounded_blocks": unbounded["blocks"]}
    output().print(f"written to {write_result(options.results, 'zipf_hits', chosen, rows)}", soft_wrap=True)


if __name__ == "__main__":
    main()
