"""A million random operations on the scheduler, with every invariant checked after each.

Games of 400 operations on machines of random sizes: submit (also several samples, or beams), step, propose, fork,
finish, cancel (also during a step), pin, evict, swap out and in (and lose what was swapped), deadlines, steps that
fail, logits that break. The imaginary model reads every slot back through the block tables, so a block of two owners
that one writes, or a wrong copy, gives wrong tokens at once. In three games of ten sequences have recurrent states,
from which their tokens follow. Any failure ends the run with the seed of its game.

With ``--tiers`` freed blocks are wiped, evicted ones go to host memory and disk and back, prefixes are saved, and the
process ends now and then: another one finds its files as they were at that moment. Prefixes that are found are compared
with a search by force. Every fifth game is played over caches in k4v2.

    python -m benchmarks.runtime_operations --operations 1000000
    python -m benchmarks.runtime_operations --operations 100000 --tiers
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from kvpass.cli.terminal import output
from kvpass.quality.measure import write_result
from tests.runtime.machine import Machine
from tests.runtime.operations import play
from tests.runtime.settling_machine import play_settling
from tests.runtime.tiered_machine import TieredMachine, play_tiers

GAME = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=1_000_000, help="operations (default 1,000,000)")
    parser.add_argument("--seed", type=int, default=1_000, help="seed of the first game (default 1000)")
    parser.add_argument("--tiers", action="store_true", help="with host memory, disk, wiping and ends of the process")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    options = parser.parse_args()
    games = -(-options.operations // GAME)
    totals: dict[str, int] = {}
    start = time.perf_counter()
    for game in range(games):
        try:
            if options.tiers:
                with tempfile.TemporaryDirectory() as folder:
                    play_game = play_settling if game % 5 == 4 else play_tiers
                    machine: Machine = play_game(options.seed + game, GAME, Path(folder))
            else:
                machine = play(options.seed + game, GAME)
        except BaseException:
            output().print(f"the game of seed {options.seed + game} failed", style="bold red")
            raise
        counts = machine.scheduler.counts
        tiers = vars(machine.tiers.counts).items() if isinstance(machine, TieredMachine) else ()
        copied = (("copied_blocks", machine.num_copied), ("copied_states", machine.num_states_copied))
        for key, count in (*vars(counts).items(), *tiers, *copied):
            totals[key] = totals.get(key, 0) + count
        if game % 250 == 249:
            done = (game + 1) * GAME
            output().print(f"{done} operations, {time.perf_counter() - start:.0f} s", soft_wrap=True)
    name = "runtime_operations_tiers" if options.tiers else "runtime_operations"
    chosen = {"operations": games * GAME, "games": games, "seed": options.seed}
    row = {"failures": 0, **{key: count for key, count in totals.items() if not key.endswith("slots")}}
    output().print(f"written to {write_result(options.results, name, chosen, [row])}", soft_wrap=True)


if __name__ == "__main__":
    main()
