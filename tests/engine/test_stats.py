"""What an engine says of itself, against what a run must have done."""

import gc
import time

import pytest

from kvpass.errors import InputError
from kvpass.runtime.sequences.output_text import decode_of
from kvpass.types import Sampling
from tests.history_engine import make_engine, naive


def spell(tokens):
    return "".join(chr(ord("A") + token) for token in tokens)


def test_hits_lookups_and_evictions_are_counted():
    engine = make_engine(num_blocks=8, block_size=4)
    engine.generate([list(range(9))], 1)
    engine.generate([[*range(8), 30]], 1)
    stats = engine.stats()
    assert (stats.prefix_lookup_tokens, stats.prefix_hit_tokens, stats.evictions) == (18, 8, 0)
    assert stats.hit_rate == 8 / 18
    engine.generate([[20 + index] * 17 for index in range(4)], 1)
    assert engine.stats().evictions > 0
    assert engine.stats().acceptance == 0


def test_times_are_those_of_the_tokens():
    engine = make_engine()
    engine.module.before_step = lambda step: time.sleep(0.02)
    start = time.perf_counter()
    engine.generate([[1, 2], [3]], 6)
    spent = time.perf_counter() - start
    stats = engine.stats()
    assert (stats.first_token.count, stats.between_tokens.count) == (2, 10)
    assert stats.first_token.mean >= 0.02 and stats.between_tokens.p50 >= 0.019
    total = stats.first_token.mean * 2 + stats.between_tokens.mean * 10
    assert 2 * 6 * 0.02 <= total <= 2 * spent
    assert engine.latencies().first_token is not engine.latencies().first_token


def test_a_handle_has_text_and_log_probabilities():
    engine = make_engine()
    engine._decode = decode_of(spell)
    whole = naive([1, 2], 12)
    handle = engine.submit([1, 2], 12, Sampling(logprobs=2))
    assert (handle.text, handle.logprobs) == ("", [])
    assert handle.result() == whole and handle.text == spell(whole)
    assert [entry.token for entry in handle.logprobs] == whole
    assert all(entry.top[0] == (entry.token, entry.logprob) and len(entry.top) == 2 for entry in handle.logprobs)
    stop = spell(whole[6:8])
    for include, expected in ((False, ""), (True, stop)):
        handle = engine.submit([1, 2], 12, Sampling(stop=(stop,), include_stop=include))
        seen = [handle.text for _ in handle]
        assert handle.finish_reason == "stop"
        assert handle.text == spell(whole)[: spell(whole).index(stop)] + expected
        assert all(handle.text.startswith(part) for part in seen)
    with pytest.raises(InputError, match="the engine has no tokenizer to read its tokens with"):
        _ = make_engine().submit([1], 1).text


@pytest.fixture
def prometheus():
    return pytest.importorskip("prometheus_client")


def exposition(prometheus, registry):
    from prometheus_client.parser import text_string_to_metric_families

    text = prometheus.generate_latest(registry).decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_reads_the_figures_as_they_are(prometheus):
    from kvpass.reports.metrics import METRICS, register

    registry = prometheus.CollectorRegistry()
    engine = make_engine(num_blocks=12)
    register(engine, registry, model="a")
    before = exposition(prometheus, registry)
    assert before["kvpass_steps_total", ("model", "a")] == 0
    engine.generate([[1, 2, 3], [4, 5]], 6)
    found, stats = exposition(prometheus, registry), engine.stats()
    label = ("model", "a")
    for metric in METRICS:
        assert found[f"kvpass_{metric.name}{'_total' if metric.counter else ''}", label] == metric.value(stats)
    states = {state: found["kvpass_blocks", label, ("state", state)] for state in ("free", "used", "cached")}
    assert states == {"free": stats.blocks_free, "used": 0, "cached": stats.blocks_cached}
    assert found["kvpass_between_tokens_seconds_count", label] == stats.between_tokens.count == 10
    assert found["kvpass_first_token_seconds_sum", label] == pytest.approx(stats.first_token.mean * 2)
    assert found["kvpass_first_token_seconds_bucket", ("le", "+Inf"), label] == 2


def test_several_engines_share_one_exposition_and_one_that_is_gone_leaves_it(prometheus):
    from kvpass.reports.metrics import register

    registry = prometheus.CollectorRegistry()
    first, second = make_engine(), make_engine()
    collector = register(first, registry, model="a")
    collector.add(second, model="b")
    with pytest.raises(InputError, match="is collected already"):
        collector.add(second, model="c")
    with pytest.raises(InputError, match="is collected already"):
        collector.add(make_engine(), model="b")
    with pytest.raises(InputError, match="use the same"):
        collector.add(make_engine(), name="b")
    first.generate([[1]], 3)
    found = exposition(prometheus, registry)
    assert found["kvpass_steps_total", ("model", "a")] == 3 and found["kvpass_steps_total", ("model", "b")] == 0
    del first, second
    gc.collect()
    assert exposition(prometheus, registry) == {}
