"""How many hits of an unbounded cache does a bounded one keep, on conversations whose popularity follows Zipf's law?

A simulated model: the real block pool and prefix tree, and nothing computed. Each request is a turn of a conversation:
the whole conversation so far, then new tokens of the user and of the answer; some ask for the last turn once more, with
another answer. Conversations begin with one of a few system prompts and are over after some turns; which one goes on is
drawn by Zipf's law from those that are open. Hits are tokens that need not be computed.

What capacity suffices depends on who is asked. For a cache that knows nothing of the future it *suffices* if it holds
all blocks that were used within the longest pause after which a conversation goes on: nothing that comes back was then
used before all else that is kept, and least recently used first keeps every hit by definition. For one that knew which
conversations are over, *open* would do, which is less: the most blocks that all open conversations take together. An
unbounded cache keeps everything.

    python benchmarks/zipf_hits.py
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from kvpass.cli.terminal import output
from kvpass.quality.measure import write_result
from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.prefix.eviction import POLICIES
from kvpass.runtime.prefix.prefix_cache import PrefixCache
from kvpass.runtime.prefix.prefix_nodes import TokenArray

BLOCK_SIZE = 16
SYSTEM_PROMPTS = 8
SYSTEM_TOKENS = 256
OPEN_CONVERSATIONS = 500
ZIPF_EXPONENT = 1.0
MAX_TURNS = 12
VOCABULARY = 50_000
ASKED_AGAIN = 0.15
# Names of capacities, what each is a share of, and how large a share.
CAPACITIES = (
    ("suffices", "suffices", 1.0),
    ("half of it", "suffices", 0.5),
    ("a quarter", "suffices", 0.25),
    ("twice open", "open", 2.0),
    ("open", "open", 1.0),
    ("half of open", "open", 0.5),
)


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


def replay(
    trace: list[TokenArray], num_blocks: int, policy: str, used: list[NDArray[np.int64]] | None = None
) -> dict[str, int]:
    """Serve the trace one request after the other; the pool must hold the longest of them.

    The blocks of each request are appended to ``used``, where it is given.
    """
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
        if used is not None:
            used.append(np.array(blocks))
    pool.check_integrity([])
    cache.check_integrity()
    return {"hit_tokens": hits * BLOCK_SIZE, "asked_tokens": asked * BLOCK_SIZE, "blocks": pool.num_cached}


def count_sufficient(used: list[NDArray[np.int64]]) -> tuple[int, int]:
    """Blocks that suffice, and requests of the longest pause; ``used`` is of a cache that evicts nothing."""
    num_blocks = max(int(blocks.max()) for blocks in used) + 1
    latest, longest = np.full(num_blocks, -1), 0
    for now, blocks in enumerate(used):
        before = latest[blocks]
        longest = max(longest, int(np.max(now - before, initial=0, where=before >= 0)))
        latest[blocks] = now
    # Of each request the blocks that were used last by it, as it is now; and their sum over the longest pause.
    owned, within, most = np.zeros(len(used), dtype=np.int64), 0, 0
    latest[:] = -1
    for now, blocks in enumerate(used):
        if now > longest:
            within -= int(owned[now - longest - 1])
        before = latest[blocks]
        kept = before[before >= max(0, now - longest)]
        np.subtract.at(owned, kept, 1)
        owned[now] = len(blocks)
        within += len(blocks) - len(kept)
        most = max(most, within)
        latest[blocks] = now
    return most, longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000, help="requests of the trace (default 100000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the trace (default 0)")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=["lru"], help="default: lru")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    options = parser.parse_args()
    requests, seed = options.requests, options.seed
    trace, live = map(list, zip(*draw_trace(requests, seed), strict=True))
    used: list[NDArray[np.int64]] = []
    unbounded = replay(trace, sum(len(tokens) // BLOCK_SIZE for tokens in trace), "lru", used)
    enough, pause = count_sufficient(used)
    del used
    rate = unbounded["hit_tokens"] / unbounded["asked_tokens"]
    table = Table(
        title=f"{requests} requests; {rate:.1%} of their tokens are hits of an unbounded cache, which ends with "
        f"{unbounded['blocks']} blocks; conversations pause for up to {pause} requests"
    )
    for name in ("capacity", "blocks", *options.policies):
        table.add_column(name, justify="right")
    rows: list[dict[str, object]] = []
    for capacity, whole, share in CAPACITIES:
        blocks = int({"suffices": enough, "open": max(live)}[whole] * share)
        kept = {name: replay(trace, blocks, name)["hit_tokens"] / unbounded["hit_tokens"] for name in options.policies}
        table.add_row(capacity, str(blocks), *(f"{hits:.2%}" for hits in kept.values()))
        rows.append({"capacity": capacity, "blocks": blocks, **{name: round(hits, 5) for name, hits in kept.items()}})
    output().print(table)
    chosen = {
        "requests": requests,
        "seed": seed,
        "hit_rate": round(rate, 5),
        "unbounded_blocks": unbounded["blocks"],
        "longest_pause": pause,
    }
    output().print(f"written to {write_result(options.results, 'zipf_hits', chosen, rows)}", soft_wrap=True)


if __name__ == "__main__":
    main()
