import numpy as np
import pytest

from kvpass.runtime.schedule.latency import Histogram, Latencies, Percentiles


@pytest.mark.parametrize("scale", [1e-4, 0.03, 20.0])
def test_percentiles_are_within_two_percent(scale):
    times = np.random.default_rng(0).lognormal(size=5000) * scale
    histogram = Histogram()
    for seconds in times:
        histogram.add(float(seconds))
    found = histogram.percentiles()
    exact = np.quantile(times, [0.5, 0.9, 0.99], method="inverted_cdf")
    assert [found.p50, found.p90, found.p99] == pytest.approx(exact, rel=0.02)
    assert (found.count, found.mean) == (5000, pytest.approx(times.mean()))


def test_memory_does_not_grow_and_extremes_are_held():
    histogram = Histogram()
    size = len(histogram._buckets)
    for seconds in (0.0, -1.0, 1e-30, 1e30):
        histogram.add(seconds, count=10**12)
    assert len(histogram._buckets) == size < 1000
    assert histogram.quantile(0) < 2e-5 and histogram.quantile(1) > 9e4


def test_no_times_are_zeros():
    assert Histogram().percentiles() == Percentiles(0, 0.0, 0.0, 0.0, 0.0)


def test_cumulative_counts_rise_to_the_whole():
    histogram = Histogram()
    for seconds in (0.001, 0.02, 0.02, 3.0):
        histogram.add(seconds)
    assert histogram.cumulative((0.0001, 0.01, 0.1, 10.0)) == [0, 1, 3, 4]


def test_tokens_that_come_together_share_their_time():
    latencies = Latencies()
    latencies.tokens_came(1, before=0, since=10.0, now=12.0)
    latencies.tokens_came(4, before=1, since=12.0, now=14.0)
    assert latencies.first_token.percentiles().mean == 2.0
    assert (latencies.between_tokens.count, latencies.between_tokens.total) == (4, 2.0)
