"""Ten thousand requests at once on a pool that fits eight: do all come to an end, in fair order, in bounded memory?

One tenant queues nine requests of ten before all others; ten more tenants share the rest. The real scheduler, pool and
prefix tree, with nothing computed. Fair: a tenant's requests end in the order in which they came, and when the small
tenants are done the large one has had about as much work done as each of them. The share is counted in requests that
had ended by then. Memory is what Python holds at most beside the queued requests.

    python benchmarks/overload.py
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from itertools import pairwise
from pathlib import Path

from kvpass.cli.terminal import output
from kvpass.quality.measure import write_result
from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.prefix.prefix_cache import PrefixCache
from kvpass.runtime.schedule.scheduler import Scheduler
from kvpass.runtime.sequences.sequence import Sequence, SequenceState
from kvpass.types import Sampling

PROMPT, NEW, BLOCK = 40, 8, 16
FITS, SMALL_TENANTS = 8, 10
LARGE = "large"


def make_requests(count: int) -> list[Sequence]:
    """The requests in the order of their arrival, all different from the first block on."""
    requests = []
    for number in range(count):
        request = Sequence([number % 50_000 + 1] * PROMPT, NEW, Sampling(), number)
        small = number - count * 9 // 10
        request.tenant = LARGE if small < 0 else f"small {small % SMALL_TENANTS}"
        requests.append(request)
    return requests


def serve(requests: list[Sequence]) -> tuple[list[Sequence], Scheduler]:
    """Queue everything, and step until all have ended; gives the requests in the order of their end."""
    pool = BlockPool(FITS * -(-(PROMPT + NEW - 1) // BLOCK), BLOCK)
    scheduler = Scheduler(pool, PrefixCache(pool), max_batch_tokens=256, max_sequences=64)
    for request in requests:
        scheduler.add(request)
    ended: list[Sequence] = []
    most = 0
    while (step := scheduler.schedule()).ranges:
        most = max(most, len(step.ranges))
        scheduler.commit(step, [[7]] * len(step.sampled))
        ended += [sequence for sequence in step.sampled if sequence.state is SequenceState.FINISHED]
    scheduler.check_integrity()
    assert most <= FITS and pool.num_used == 0
    return ended, scheduler


def judge(requests: list[Sequence], ended: list[Sequence]) -> dict[str, float]:
    """How many ended, whether in order within each tenant, and how the tenants fared against each other."""
    place = {request: number for number, request in enumerate(requests)}
    in_order = True
    for tenant in {request.tenant for request in requests}:
        own = [place[request] for request in ended if request.tenant == tenant]
        in_order &= all(first < last for first, last in pairwise(own))
    last_small = max(number for number, request in enumerate(ended) if request.tenant != LARGE)
    large_by_then = sum(request.tenant == LARGE for request in ended[: last_small + 1])
    each_small = sum(request.tenant != LARGE for request in requests) / SMALL_TENANTS
    return {
        "requests": len(requests),
        "ended": len(ended),
        "in order within each tenant": in_order,
        "requests of each small tenant": each_small,
        "of the large one when those were done": large_by_then,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="requests (default 10,000)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    options = parser.parse_args()
    requests = make_requests(options.requests)
    tracemalloc.start()
    start = time.perf_counter()
    ended, scheduler = serve(requests)
    seconds = time.perf_counter() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    row = {
        **judge(requests, ended),
        "preemptions": scheduler.counts.preemptions,
        "steps": scheduler.counts.steps,
        "peak bytes per queued request": round(peak / len(requests)),
        "seconds": round(seconds, 1),
    }
    for name, value in row.items():
        output().print(f"{name}: {value}")
    path = write_result(options.results, "overload", {"requests": options.requests, "fits": FITS}, [row])
    output().print(f"written to {path}", soft_wrap=True)


if __name__ == "__main__":
    main()
