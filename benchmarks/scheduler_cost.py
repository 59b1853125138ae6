"""What the scheduler costs a step in Python, and how it grows with the number of running sequences.

Sequences that share the first half of their prompts decode, with nothing computed: a step is chosen, laid out as
tensors and committed, block tables and prefix tree included, while as many requests again wait. Prompts of 1000 tokens,
blocks of 16. Times are the thread's own, so that other work on the machine counts little: medians of single steps, and
of means over sixteen steps, in one of which every sequence asks for a block and registers one.

    python benchmarks/scheduler_cost.py
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

from rich.table import Table

from kvpass.cli.terminal import output
from kvpass.quality.measure import write_result
from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.prefix.prefix_cache import PrefixCache
from kvpass.runtime.schedule.batch import BatchBuilder
from kvpass.runtime.schedule.scheduler import Scheduler
from kvpass.runtime.sequences.sequence import Sequence
from kvpass.types import Sampling

RUNNING = (16, 64, 256)
PROMPT, BLOCK = 1000, 16
PARTS = ("schedule", "tensors", "commit")


def fill(running: int, groups: int) -> Scheduler:
    """A scheduler whose sequences have all come to decode, and as many that wait for blocks."""
    windows = (None, *[512] * (groups - 1))
    pool = BlockPool(running * groups * (PROMPT // BLOCK + 14), BLOCK)
    scheduler = Scheduler(pool, PrefixCache(pool, windows), running * PROMPT, running, windows)
    for number in range(running):
        prompt = [1] * (PROMPT // 2) + [number + 2] * (PROMPT // 2)
        scheduler.add(Sequence(prompt, 10_000, Sampling(), number))
    while len(scheduler.decoding) < running:
        step = scheduler.schedule()
        scheduler.commit(step, [[0]] * len(step.sampled))
    for number in range(running):
        scheduler.add(Sequence([number + 2] * PROMPT, 16, Sampling(), number))
    return scheduler


def measure(running: int, groups: int, steps: int) -> dict[str, float]:
    """Milliseconds of each part of a step and of the whole, by median, and the median of means over sixteen steps."""
    scheduler, batches = fill(running, groups), BatchBuilder(BLOCK)
    times: dict[str, list[float]] = {part: [] for part in PARTS}
    for _ in range(steps):
        marks = [time.thread_time()]
        step = scheduler.schedule()
        marks.append(time.thread_time())
        batches.build(step)
        marks.append(time.thread_time())
        scheduler.commit(step, [[0]] * len(step.sampled))
        marks.append(time.thread_time())
        assert len(step.sampled) == running
        for part, first, last in zip(PARTS, marks, marks[1:], strict=False):
            times[part].append((last - first) * 1e3)
    whole = [sum(parts) for parts in zip(*times.values(), strict=True)]
    found = {part: round(median(values), 4) for part, values in times.items()}
    periods = [sum(whole[i : i + BLOCK]) / BLOCK for i in range(0, len(whole), BLOCK)]
    return {**found, "step": round(median(whole), 4), "mean of 16 steps": round(median(periods), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=192, help="steps timed (default 192)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    options = parser.parse_args()
    table = Table(title="milliseconds of Python per step")
    rows = []
    for groups in (1, 2):
        for running in RUNNING:
            found = {"running": running, "groups": groups, **measure(running, groups, options.steps)}
            rows.append(found)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    output().print(table)
    chosen = {"prompt": PROMPT, "block_size": BLOCK, "steps": options.steps}
    output().print(f"written to {write_result(options.results, 'scheduler_cost', chosen, rows)}", soft_wrap=True)


if __name__ == "__main__":
    main()
