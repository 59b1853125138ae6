"""A million random operations on the scheduler, with every invariant checked after each.

Games of 400 operations on machines of random sizes: submit, step, propose, fork, finish, cancel (also during a step),
pin, evict, swap out and in (and lose what was swapped), deadlines, steps that fail, logits that break. The imaginary
model reads every slot back through the block tables, so a block of two owners that one writes, or a wrong copy, gives
wrong tokens at once. Any failure ends the run with the seed of its game.

    python -m benchmarks.runtime_operations --operations 1000000
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from kvpass.measure import write_result
from kvpass.terminal import output
from tests.runtime.operations import play

GAME = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=1_000_000, help="operations (default 1,000,000)")
    parser.add_argument("--seed", type=int, default=1_000, help="seed of the first game (default 1000)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    options = parser.parse_args()
    games = -(-options.operations // GAME)
    totals: dict[str, int] = {}
    start = time.perf_counter()
    for game in range(games):
        try:
            machine = play(options.seed + game, GAME)
        except BaseException:
            output().print(f"the game of seed {options.seed + game} failed", style="bold red")
            raise
        counts = machine.scheduler.counts
        for name, count in (*vars(counts).items(), ("copied_blocks", machine.num_copied)):
            totals[name] = totals.get(name, 0) + count
        if game % 250 == 249:
            done = (game + 1) * GAME
            output().print(f"{done} operations, {time.perf_counter() - start:.0f} s", soft_wrap=True)
    chosen = {"operations": games * GAME, "games": games, "seed": options.seed}
    row = {"failures": 0, **{name: count for name, count in totals.items() if not name.endswith("slots")}}
    output().print(f"written to {write_result(options.results, 'runtime_operations', chosen, [row])}", soft_wrap=True)


if __name__ == "__main__":
    main()
