"""What does a cached block cost to look up, to register, to release and to evict, as the prefix tree grows?

The tree is filled with prefixes of one length that share their first blocks in a few families, up to 1,000,000 blocks.
At each size prefixes that are there are looked up, and as many new ones are registered while the pool is full, so that
each of their blocks evicts one. Times are of the processor, per block, the median of several rounds.

    python benchmarks/prefix_tree.py
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.table import Table

from kvpass.cli.terminal import output
from kvpass.quality.measure import write_result
from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.prefix.eviction import POLICIES
from kvpass.runtime.prefix.prefix_cache import PrefixCache
from kvpass.runtime.prefix.prefix_nodes import TokenArray

BLOCK_SIZE = 16
PREFIX_BLOCKS = 64
FAMILIES = 16
SHARED_BLOCKS = 8
SIZES = (1_000, 10_000, 100_000, 1_000_000)
ROUNDS = 9
PREFIXES_PER_ROUND = 20


def make_prefix(number: int) -> TokenArray:
    """The tokens of a prefix: first those of its family, then its own."""
    family, own = np.random.default_rng(number % FAMILIES), np.random.default_rng(FAMILIES + number)
    shared = family.integers(0, 50_000, SHARED_BLOCKS * BLOCK_SIZE, dtype=np.int32)
    return np.concatenate((shared, own.integers(0, 50_000, (PREFIX_BLOCKS - SHARED_BLOCKS) * BLOCK_SIZE, np.int32)))


class Tree:
    """A prefix tree over a pool of a given size, with prefixes numbered as they come."""

    def __init__(self, num_blocks: int, policy: str) -> None:
        self.pool = BlockPool(num_blocks, BLOCK_SIZE)
        self.cache = PrefixCache(self.pool, policy=POLICIES[policy]())
        self.count = 0

    def fill(self) -> None:
        """Register prefixes until the pool is full."""
        while self.pool.num_free >= PREFIX_BLOCKS:
            self.pool.release(self.register(make_prefix(self.count)))
            self.count += 1

    def register(self, tokens: TokenArray) -> list[int]:
        match = self.cache.match(tokens, len(tokens))
        (blocks,) = self.cache.acquire(match)
        branch = match.branch
        for block in self.pool.allocate(PREFIX_BLOCKS - len(blocks)):
            start = len(blocks) * BLOCK_SIZE
            branch = self.cache.insert(branch, tokens[start : start + BLOCK_SIZE], [block])
            blocks.append(block)
        return blocks


def seconds(function: Callable[[], object]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def measure(size: int, policy: str) -> dict[str, float]:
    tree = Tree(size, policy)
    tree.fill()
    draw = np.random.default_rng(0)
    times: dict[str, list[float]] = {"lookup": [], "take over": [], "release": [], "register and evict": []}
    # The collector walks the whole tree from time to time, whatever is being done: not what is asked here.
    gc.collect()
    gc.disable()
    for _ in range(ROUNDS):
        newest = tree.count - 1 - draw.integers(0, max(1, tree.count // 4), PREFIXES_PER_ROUND)
        known = [make_prefix(int(number)) for number in newest]
        matches = [tree.cache.match(tokens, len(tokens)) for tokens in known]
        found = sum(len(match.path) for match in matches)
        times["lookup"].append(seconds(lambda: [tree.cache.match(t, len(t)) for t in known]) / found)  # noqa: B023
        held: list[list[int]] = []
        times["take over"].append(
            seconds(lambda: held.extend(tree.cache.acquire(m)[0] for m in matches)) / found  # noqa: B023
        )
        times["release"].append(seconds(lambda: [tree.pool.release(blocks) for blocks in held]) / found)  # noqa: B023
        new = [make_prefix(tree.count + index) for index in range(PREFIXES_PER_ROUND if size >= 4096 else 5)]
        tree.count += len(new)
        blocks: list[list[int]] = []
        spent = seconds(lambda: blocks.extend(map(tree.register, new)))  # noqa: B023
        times["register and evict"].append(spent / (len(new) * (PREFIX_BLOCKS - SHARED_BLOCKS)))
        for each in blocks:
            tree.pool.release(each)
    gc.enable()
    tree.pool.check_integrity([])
    tree.cache.check_integrity()
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", choices=list(POLICIES), default="lru", help="what is evicted first (default lru)")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=list(SIZES), help="blocks of the pool, one run for each"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    options = parser.parse_args()
    table = Table(title=f"microseconds per block, prefixes of {PREFIX_BLOCKS} blocks, eviction by {options.policy}")
    rows = []
    for size in options.sizes:
        found = measure(size, options.policy)
        if not rows:
            for name in ("blocks in the tree", *found):
                table.add_column(name, justify="right")
        table.add_row(f"{size:,}", *(f"{value:.2f}" for value in found.values()))
        rows.append({"blocks": size, **{name: round(value, 3) for name, value in found.items()}})
    output().print(table)
    chosen = {"policy": options.policy, "block_size": BLOCK_SIZE, "prefix_blocks": PREFIX_BLOCKS}
    output().print(f"written to {write_result(options.results, 'prefix_tree', chosen, rows)}", soft_wrap=True)


if __name__ == "__main__":
    main()
