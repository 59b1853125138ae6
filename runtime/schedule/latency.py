"""How long tokens take, in memory that does not grow: histograms with buckets of equal ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass

_SHORTEST = 1e-5  # seconds: everything below counts as this
_LONGEST = 1e5
_RATIO = 1.04  # upper over lower end of a bucket
_LOG_RATIO = math.log(_RATIO)
_BUCKETS = math.ceil(math.log(_LONGEST / _SHORTEST) / _LOG_RATIO)


@dataclass(frozen=True)
class Percentiles:
    """Times in seconds; each percentile within 2 % of the exact one, 0 when there is nothing yet.

    Attributes:
        count: times that were measured.
        mean: their mean, exact.
        p50: half of them were no longer.
        p90: nine tenths of them were no longer.
        p99: all but one in a hundred were no longer.
    """

    count: int
    mean: float
    p50: float
    p90: float
    p99: float


class Histogram:
    """Counts of times, by buckets from 10 microseconds to a day, each 4 % wide.

    Attributes:
        count: times that were added.
        total: their sum in seconds.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self._buckets = [0] * _BUCKETS

    def add(self, seconds: float, count: int = 1) -> None:
        """Add a time, ``count`` times."""
        place = int(math.log(max(seconds, _SHORTEST) / _SHORTEST) / _LOG_RATIO)
        self._buckets[min(place, _BUCKETS - 1)] += count
        self.count += count
        self.total += seconds * count

    def quantile(self, fraction: float) -> float:
        """The time that this fraction of all, rounded up, did not exceed: the middle of its bucket; 0 for no times."""
        rank = max(1, math.ceil(fraction * self.count))
        reached = 0
        for place, count in enumerate(self._buckets):
            reached += count
            if reached >= rank:
                return _middle(place)
        return 0.0

    def percentiles(self) -> Percentiles:
        """A summary."""
        quantiles = (self.quantile(fraction) for fraction in (0.5, 0.9, 0.99))
        return Percentiles(self.count, self.total / max(1, self.count), *quantiles)

    def cumulative(self, bounds: tuple[float, ...]) -> list[int]:
        """For each of ``bounds``, rising, how many times were no longer, to within a bucket."""
        counts, reached, place = [], 0, 0
        for bound in bounds:
            while place < _BUCKETS and _middle(place) <= bound:
                reached += self._buckets[place]
                place += 1
            counts.append(reached)
        return counts


def _middle(place: int) -> float:
    return _SHORTEST * math.exp((place + 0.5) * _LOG_RATIO)


class Latencies:
    """Times of the tokens of an engine.

    Attributes:
        first_token: from the submission of a request to its first token (TTFT).
        between_tokens: from one token of a request to its next; tokens that come together share the time.
    """

    def __init__(self) -> None:
        self.first_token = Histogram()
        self.between_tokens = Histogram()

    def tokens_came(self, count: int, before: int, since: float, now: float) -> None:
        """Take note of ``count`` new tokens of a request.

        Args:
            count: at least 1.
            before: tokens that it had before.
            since: when the newest of those came, or the request, in seconds.
            now: the time, in seconds by the same clock.
        """
        if before:
            self.between_tokens.add((now - since) / count, count)
        else:
            self.first_token.add(now - since)
