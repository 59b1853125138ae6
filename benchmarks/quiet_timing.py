"""Timing on a shared machine: which calls were made while nobody else was at work.

A neighbour on the same physical core takes up to half of its speed, for seconds, and so from one row of a table and not
from the next. A small matrix product before and after each call tells.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

SIZE = 256  # of the matrices: they fit into the second-level cache
NOISE = 1.15  # times the least time that the product ever took, above which the machine is not quiet
MOST = 4  # times as many calls as wanted are made in search of quiet ones
PATIENCE = 10.0  # seconds that a probe waits in all for the machine to become quiet


class Probe:
    """Says whether the machine is quiet.

    Args:
        threads: that the probed calls work on.
        clock: seconds.
    """

    def __init__(self, threads: int, clock: Callable[[], float]) -> None:
        torch.set_num_threads(threads)
        self.clock = clock
        self._factor = torch.randn(SIZE, SIZE)
        self._least = min(self._measure() for _ in range(200))
        self._patience = PATIENCE

    def wait(self) -> bool:
        """Until the machine is quiet, or patience has run out; says whether it is."""
        while not self.finds_quiet():
            if self._patience <= 0:
                return False
            start = time.perf_counter()
            time.sleep(0.02)
            self._patience -= time.perf_counter() - start
        return True

    def finds_quiet(self) -> bool:
        took = min(self._measure() for _ in range(2))
        self._least = min(self._least, took)
        return took < self._least * NOISE

    def _measure(self) -> float:
        start = self.clock()
        torch.mm(self._factor, self._factor)
        return self.clock() - start


@dataclass
class Timings:
    """Seconds of calls, of those between two quiet moments and of the others."""

    quiet: list[float] = field(default_factory=list)
    noisy: list[float] = field(default_factory=list)

    def chosen(self) -> list[float]:
        """The quiet ones, or all if these are fewer than a quarter."""
        return self.quiet if 4 * len(self.quiet) >= len(self.quiet) + len(self.noisy) else self.quiet + self.noisy


def time_quietly(call: Callable[[], Any], wanted: int, probe: Probe, timings: Timings) -> Timings:
    """Add ``wanted`` quiet calls to ``timings``, after one to warm up; fewer if the machine is not quiet."""
    call()
    found, before = 0, probe.wait()
    for _ in range(MOST * wanted):
        start = probe.clock()
        call()
        took, after = probe.clock() - start, probe.finds_quiet()
        (timings.quiet if before and after else timings.noisy).append(took)
        found += before and after
        if found >= wanted:
            break
        before = after or probe.wait()
    return timings
