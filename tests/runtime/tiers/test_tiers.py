import threading

import numpy as np
import pytest

from kvpass.runtime.tiers.disk_store import DiskStore
from kvpass.runtime.tiers.host_memory import BlockKey, HostMemory, StoredBlock, prefix_digests
from kvpass.runtime.tiers.tiers import Tiers, Wanted

SIZE = 4
STEP = SIZE * 4
BYTES = 1000


def tokens_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, 100, size=count * SIZE, dtype=np.int32).tobytes()


def content(key):
    return np.random.default_rng(list(key.digest)).integers(0, 256, size=BYTES, dtype=np.uint8)


def put_prefix(tiers, tokens, groups=(0,), namespace="", levels=None):
    """Store blocks of a prefix as eviction does, the last one first, and no faster than the disk takes them."""
    for level in reversed(levels or range(len(tokens) // STEP)):
        for group in groups:
            key = BlockKey.of(namespace, group, tokens[: (level + 1) * STEP])
            tiers.put(StoredBlock(key, content(key)))
        tiers.flush()


def found(tiers, tokens, start=0, namespace="", present=None, held=()):
    """For each further block of a prefix which groups came back; none may come back changed."""
    rows = tiers.find(Wanted(namespace, tokens, STEP, start, present or {}, held))
    for level, row in enumerate(rows, start):
        for group, block in enumerate(row):
            if block is not None:
                assert block.key == BlockKey.of(namespace, group, tokens[: (level + 1) * STEP])
                assert np.array_equal(block.payload, content(block.key))
    return [tuple(group for group, block in enumerate(row) if block is not None) for row in rows]


@pytest.fixture
def make_tiers(tmp_path):
    made = []

    def make(host=1 << 20, disk=None, windows=(None,)):
        store = None if disk is None else DiskStore(tmp_path, disk)
        made.append(Tiers(host, store, SIZE, windows))
        return made[-1]

    yield make
    for tiers in made:
        tiers.close()


def test_digests_tell_namespaces_groups_and_tokens_apart():
    tokens = tokens_of(3)
    digests = [
        digest
        for namespace in ("", "a", "ab")
        for group in (0, 1)
        for digest in prefix_digests(namespace, group, tokens, STEP, 0)
    ]
    digests += prefix_digests("a", 0, b"b" + tokens, STEP, 0)
    assert len(set(digests)) == len(digests) == 21
    assert list(prefix_digests("a", 1, tokens, STEP, 1)) == list(prefix_digests("a", 1, tokens, STEP, 0))[1:]
    assert BlockKey.of("a", 1, tokens).digest == list(prefix_digests("a", 1, tokens, STEP, 0))[-1]


def test_host_memory_is_bounded_and_its_oldest_make_room():
    blocks = [StoredBlock(key, content(key)) for key in (BlockKey.of("", 0, tokens_of(1, seed)) for seed in range(9))]
    gone = []
    memory = HostMemory(4 * blocks[0].size, gone.append)
    for block in blocks:
        memory.put(block)
        memory.touch(blocks[0].key.digest)
        assert memory.size == sum(held.size for held in memory) <= memory.capacity
    assert list(memory) == [*blocks[-3:], blocks[0]] and gone == blocks[1:6]
    key = blocks[0].key
    assert memory.get(key.digest, "", 0, key.tokens) is blocks[0]
    assert memory.get(key.digest, "", 0, tokens_of(1, 99)) is None  # equal digests, were they ever to be met
    assert memory.get(key.digest, "other", 0, key.tokens) is memory.get(key.digest, "", 1, key.tokens) is None
    huge = StoredBlock(BlockKey.of("", 0, tokens_of(2)), np.zeros(memory.capacity, np.uint8))
    memory.put(huge)
    assert len(memory) == memory.size == 0 and gone[-1] is huge


def test_what_was_put_is_found_behind_what_is_there_already(make_tiers):
    tiers = make_tiers()
    tokens = tokens_of(5)
    put_prefix(tiers, tokens)
    assert found(tiers, tokens) == [(0,)] * 5
    assert found(tiers, tokens, start=3) == [(0,)] * 2
    assert found(tiers, tokens[: 4 * STEP + 4], start=3) == [(0,)]  # full blocks only
    assert found(tiers, tokens[: 2 * STEP] + tokens_of(3, 9)) == [(0,)] * 2
    assert found(tiers, tokens, namespace="other") == []
    tiers.drop("")
    assert found(tiers, tokens) == [] and tiers.host_bytes == 0


def test_a_gap_ends_what_is_found(make_tiers):
    tiers = make_tiers()
    tokens = tokens_of(5)
    put_prefix(tiers, tokens, levels=[0, 1, 3, 4])
    assert found(tiers, tokens) == [(0,)] * 2
    assert found(tiers, tokens, start=3) == [(0,)] * 2


def test_window_groups_need_their_newest_blocks_alone(make_tiers):
    tiers = make_tiers(windows=(None, 6))  # a token looks at two blocks before its own
    tokens = tokens_of(6)
    put_prefix(tiers, tokens, levels=range(5))
    put_prefix(tiers, tokens, groups=(1,), levels=[2, 3])
    assert found(tiers, tokens, present={1: 0}) == [(0,), (0,), (0, 1), (0, 1)]
    assert found(tiers, tokens, start=2, present={1: 0}) == [(0, 1), (0, 1)]
    assert found(tiers, tokens, start=3, present={1: 1}) == [(0, 1)]
    assert found(tiers, tokens, start=3, present={1: 0}) == []
    assert found(tiers, tokens, start=4, present={1: 3}) == [(0,)] * 0
    put_prefix(tiers, tokens, groups=(1,), levels=[4])
    assert found(tiers, tokens, start=4, present={1: 3}) == [(0, 1)]


def test_window_groups_come_back_where_the_device_has_all_else(make_tiers):
    tokens, here = tokens_of(5), [[True, False]] * 3 + [[True, True]]
    first = make_tiers(disk=1 << 20, windows=(None, 6))
    put_prefix(first, tokens, groups=(1,), levels=[0, 2])
    put_prefix(first, tokens, groups=(0, 1), levels=[4])
    assert found(first, tokens, present={1: 0}, held=here) == [(), (), (), (), (0, 1)]
    assert found(first, tokens, present={1: 0}, held=here[:3]) == [(1,)]  # the next token looks at two blocks
    assert found(first, tokens[: 4 * STEP], present={1: 0}, held=here) == [(), (), (1,), ()]
    first.save()
    first.close()
    second = make_tiers(disk=1 << 20, windows=(None, 6))
    ahead = second.prefetch(Wanted("", tokens[: 4 * STEP], STEP, 0, {1: 0}, here))
    assert [len(key.tokens) // STEP for key in ahead.keys] == [3] and ahead.wait(10)
    assert found(second, tokens[: 4 * STEP], present={1: 0}, held=here) == [(), (), (1,), ()]


def test_what_overflows_goes_to_disk_and_is_read_back_ahead(make_tiers):
    tokens, other = tokens_of(6), tokens_of(12, 1)
    tiers = make_tiers(host=14 * 1600, disk=1 << 20)
    put_prefix(tiers, tokens)
    put_prefix(tiers, other)
    tiers.flush()
    assert len(found(tiers, tokens)) < 6
    counts = tiers.counts
    assert (counts.demoted, counts.given_up, counts.disk_errors) == (18, 0, 0) and counts.written >= 4
    ahead = tiers.prefetch(Wanted("", tokens, STEP, 0, {}))
    assert ahead.wait(10) and ahead.is_done
    assert found(tiers, tokens) == [(0,)] * 6
    assert tiers.counts.read == len(ahead.keys)
    assert tiers.prefetch(Wanted("", tokens, STEP, 0, {})) is None  # nothing to add
    assert tiers.prefetch(Wanted("other", other, STEP, 0, {})) is None


def test_a_later_process_finds_what_was_saved(make_tiers):
    tokens = tokens_of(7)
    first = make_tiers(disk=1 << 20)
    put_prefix(first, tokens)
    first.save()
    assert first.disk_bytes > 7 * BYTES
    first.close()
    second = make_tiers(disk=1 << 20)
    assert found(second, tokens) == []
    assert second.prefetch(Wanted("", tokens, STEP, 0, {})).wait(10)
    assert found(second, tokens) == [(0,)] * 7


def test_dropping_reaches_every_tier_and_what_is_under_way(make_tiers):
    tiers = make_tiers(host=14 * 1600, disk=1 << 20)
    ours, theirs = tokens_of(6), tokens_of(6, 1)
    for _ in range(20):
        put_prefix(tiers, ours, namespace="ours")
        put_prefix(tiers, theirs, namespace="theirs")
        tiers.prefetch(Wanted("ours", ours, STEP, 0, {}))
        tiers.drop("ours")
        tiers.flush()
        assert found(tiers, ours, namespace="ours") == []
        assert tiers.prefetch(Wanted("ours", ours, STEP, 0, {})) is None
    ahead = tiers.prefetch(Wanted("theirs", theirs, STEP, 0, {}))
    assert ahead is None or ahead.wait(10)
    assert len(found(tiers, theirs, namespace="theirs")) == 6


def test_reading_ahead_ends_at_what_is_broken(make_tiers, monkeypatch):
    tokens = tokens_of(5)
    first = make_tiers(disk=1 << 20)
    put_prefix(first, tokens)
    first.save()
    first.close()
    second = make_tiers(disk=1 << 20)
    key = BlockKey.of("", 0, tokens[: 3 * STEP])
    get = DiskStore.get
    monkeypatch.setattr(DiskStore, "get", lambda self, asked: None if asked == key else get(self, asked))
    assert second.prefetch(Wanted("", tokens, STEP, 0, {})).wait(10)
    assert found(second, tokens) == [(0,)] * 2


def test_a_disk_that_cannot_keep_up_makes_memory_no_larger(make_tiers, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(DiskStore, "put", lambda self, blocks: release.wait(10))
    tiers = make_tiers(host=8 * 1600, disk=1 << 20)
    for seed in range(40):
        key = BlockKey.of("", 0, tokens_of(1, seed))
        tiers.put(StoredBlock(key, content(key)))
    assert tiers._write_bytes <= 2 * 1600 and tiers.counts.given_up > 20
    release.set()
    tiers.flush()


def test_the_thread_ends_when_there_is_nothing_to_do(make_tiers, monkeypatch):
    monkeypatch.setattr("kvpass.runtime.tiers.tiers._IDLE_SECONDS", 0.01)
    tiers = make_tiers(disk=1 << 20)
    for seed in range(2):
        put_prefix(tiers, tokens_of(1, seed))
        tiers.save()
        thread = tiers._thread
        if thread is not None:
            thread.join(10)
        assert tiers._thread is None
    assert tiers.counts.written == 2
