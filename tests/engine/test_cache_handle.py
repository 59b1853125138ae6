"""``engine.cache``, wiping, and the tiers, through an engine whose tokens depend on every slot that it reads."""

import time

import numpy as np
import pytest

from kvpass.config import CacheConfig
from kvpass.errors import ConfigError, InputError
from kvpass.runtime.tiers.disk_store import FILE_NAME
from tests.history_engine import VOCABULARY, check_idle, make_engine, naive

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def prompts_of(count, length=24, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCABULARY, length).tolist() for _ in range(count)]


def hits(engine, prompt):
    """Tokens of a prompt that are not computed."""
    before = engine.stats().prefix_hit_tokens
    assert engine.generate([prompt], 3) == [naive(prompt, 3)]
    return engine.stats().prefix_hit_tokens - before


def crowd_out(engine):
    """Use every block of the pool for something else."""
    for prompt in prompts_of(12, seed=99):
        assert engine.generate([prompt], 3) == [naive(prompt, 3)]


def test_pinned_prompts_stay_and_others_go():
    engine = make_engine(num_blocks=16)
    engine.generate([PROMPT], 2)
    pin = engine.cache.pin(PROMPT, ttl=1000)
    assert pin.num_tokens == 8
    engine.check_integrity()
    crowd_out(engine)
    assert hits(engine, PROMPT) >= 8
    engine.check_integrity()
    assert engine.cache.unpin(pin) and not engine.cache.unpin(pin)
    crowd_out(engine)
    assert hits(engine, PROMPT) == 0
    check_idle(engine)


def test_pins_end_by_themselves():
    engine = make_engine(num_blocks=16)
    engine.generate([PROMPT], 2)
    pin = engine.cache.pin(PROMPT, ttl=0.01)
    time.sleep(0.02)
    crowd_out(engine)
    assert hits(engine, PROMPT) == 0 and not engine.cache.unpin(pin)
    check_idle(engine)


def test_a_request_that_needs_the_whole_pool_ends_a_pin():
    engine = make_engine(num_blocks=8)
    engine.generate([PROMPT], 2)
    pin = engine.cache.pin(PROMPT)
    (long,) = prompts_of(1, length=28)
    assert engine.generate([long], 4) == [naive(long, 4)]
    assert not engine.cache.unpin(pin)
    check_idle(engine)


def test_clearing_and_dropping_forget_and_disturb_nobody():
    engine = make_engine()
    handle = engine.submit(PROMPT, 12)
    next(iter(handle))
    engine.cache.pin(PROMPT)
    engine.cache.drop("somebody else")
    assert hits(engine, PROMPT) >= 8
    engine.cache.drop()
    assert hits(engine, PROMPT) == 0
    engine.cache.clear()
    assert hits(engine, PROMPT) == 0
    assert handle.result() == naive(PROMPT, 12)
    engine.cache.clear()
    stats = engine.stats()
    assert stats.blocks_free == stats.blocks_total
    check_idle(engine)


@pytest.mark.parametrize("options", [{}, {"host_memory": "1MiB"}])
def test_a_namespace_never_hits_what_another_one_left(options):
    """Prompts that are equal, longer, or part of one another, kept on the device or evicted to host memory."""
    engine = make_engine(num_blocks=16, **options)

    def hits_of(prompt, namespace):
        before = engine.stats().prefix_hit_tokens
        assert engine.submit(prompt, 3, namespace=namespace).result() == naive(prompt, 3)
        return engine.stats().prefix_hit_tokens - before

    assert hits_of(PROMPT, "ours") == 0
    for theirs in ("", "theirs", "our", "ours ", "OURS"):
        for prompt in (PROMPT, PROMPT[:9], [*PROMPT, 7, 7]):
            engine.cache.drop(theirs)
            assert hits_of(prompt, theirs) == 0
    if options:
        crowd_out(engine)
        assert engine.stats().tiers.demoted > 2
        engine.cache.drop("theirs")
        assert hits_of(PROMPT, "theirs") == 0
        assert hits_of(PROMPT, "ours") >= 8
    check_idle(engine)
    engine.close()


@pytest.mark.parametrize("scrub", [False, True])
def test_tokens_of_finished_requests_cannot_be_read_back_from_wiped_blocks(scrub):
    engine = make_engine(scrub=scrub, prefix_sharing=False)
    ((keys, values),) = engine.caches
    keys.fill_(-1)
    values.fill_(-1)
    handle = engine.submit(PROMPT, 4)
    iterator = iter(handle)
    next(iterator)
    owned = (keys != -1).any((1, 2, 3))
    assert int(owned.sum()) == 3
    handle.result()
    left = keys[owned].flatten().tolist()
    assert set(left) == {0.0} if scrub else set(PROMPT) <= {int(token) for token in left}
    again = engine.submit(PROMPT, 4)
    next(iter(again))
    again.cancel()
    engine.check_integrity()
    if scrub:
        assert set(keys.unique().tolist()) <= {0.0, -1.0} and set(values.unique().tolist()) <= {0.0, -1.0}


def test_wiping_spares_what_is_kept_until_it_is_forgotten():
    engine = make_engine(scrub=True)
    engine.generate([PROMPT], 2)
    assert hits(engine, PROMPT) >= 8
    engine.cache.clear()
    for tensor in engine.caches[0]:
        assert set(tensor.nan_to_num(-1).unique().tolist()) <= {0.0, -1.0}


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "cost"])
def test_every_policy_gives_the_same_tokens(policy):
    engine = make_engine(num_blocks=12, eviction=policy)
    prompts = prompts_of(6, length=9) * 3
    assert engine.generate(prompts, 5) == [naive(prompt, 5) for prompt in prompts]
    check_idle(engine)


BAD_CALLS = [
    (lambda c: c.pin("text"), InputError, "tokens is text"),
    (lambda c: c.pin([]), InputError, "tokens is empty"),
    (lambda c: c.pin([VOCABULARY]), InputError, r"tokens\[0\] is 40"),
    (lambda c: c.pin([1], ttl=0), InputError, "ttl=0 is no positive number of seconds"),
    (lambda c: c.pin([1], ttl=float("nan")), InputError, "ttl=nan"),
    (lambda c: c.pin([1], ttl="1h"), InputError, "ttl='1h'"),
    (lambda c: c.pin([1], ttl=True), InputError, "ttl=True"),
    (lambda c: c.pin([1], namespace=3), InputError, "namespace=3 is no string"),
    (lambda c: c.unpin(None), InputError, "pin is a NoneType"),
    (lambda c: c.drop(None), InputError, "namespace=None"),
    (lambda c: c.save(), ConfigError, "there is no disk to save to"),
]


def test_bad_calls_are_refused_and_change_nothing():
    engine = make_engine()
    engine.generate([PROMPT], 2)
    for call, error, message in BAD_CALLS:
        with pytest.raises(error, match=message):
            call(engine.cache)
    assert hits(engine, PROMPT) >= 8
    check_idle(engine)


def test_without_sharing_there_is_nothing_to_hold():
    engine = make_engine(prefix_sharing=False)
    for call in (lambda c: c.pin([1]), lambda c: c.drop(), lambda c: c.save()):
        with pytest.raises(ConfigError, match="prefix_sharing is off"):
            call(engine.cache)
    engine.cache.clear()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eviction": "random"}, "eviction='random' is unknown: choose one of lru, lfu, fifo, cost"),
        ({"scrub": 1}, "scrub=1 is neither True nor False"),
        ({"disk": 5}, "disk=5 is no path of a folder"),
        ({"disk": ""}, "disk='' is no path of a folder"),
        ({"disk": "x", "disk_memory": "lots"}, "disk_memory='lots' is not an amount of memory"),
        ({"host_memory": 0}, "host_memory=0 is not an amount of memory"),
        ({"host_memory": "1GiB", "prefix_sharing": False}, "host_memory and disk keep registered prefixes"),
        ({"memory": 1.5}, "memory=1.5 is no share of the device's memory"),
        ({"memory": "0%"}, "memory='0%' is no share of the device's memory"),
        ({"memory": float("nan")}, "memory=nan is no share"),
        ({"memory": "0.5"}, "memory='0.5' is not an amount of memory"),
        ({"memory": True}, "memory=True is not an amount of memory"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        CacheConfig(**options)


def test_evicted_prefixes_come_back_from_host_memory():
    engine = make_engine(num_blocks=16, host_memory="1MiB", scrub=True)
    engine.generate([PROMPT], 2)
    crowd_out(engine)
    assert hits(engine, PROMPT) >= 8
    tiers = engine.stats().tiers
    assert tiers.demoted > 2 and tiers.promoted >= 2 and tiers.host_bytes > 0
    engine.cache.drop()
    crowd_out(engine)
    assert hits(engine, PROMPT) == 0
    check_idle(engine)
    engine.close()


def test_a_later_engine_finds_what_was_saved_and_another_model_does_not(tmp_path):
    with make_engine(disk=tmp_path) as engine:
        engine.generate([PROMPT], 2)
        engine.cache.save()
    with make_engine(disk=tmp_path) as engine:
        assert hits(engine, PROMPT) >= 8
        check_idle(engine)
    with make_engine(disk=tmp_path, vocabulary=VOCABULARY + 1) as engine:
        assert hits(engine, PROMPT) == 0
    assert len(list(tmp_path.glob(f"*/{FILE_NAME}"))) == 2


def test_a_broken_store_is_a_miss(tmp_path):
    with make_engine(disk=tmp_path) as engine:
        engine.generate([PROMPT], 2)
        engine.cache.save()
    (path,) = tmp_path.glob(f"*/{FILE_NAME}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)
    with make_engine(disk=tmp_path) as engine:
        hits(engine, PROMPT)
        check_idle(engine)
