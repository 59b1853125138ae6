import os
import sqlite3
import stat
import threading
import warnings

import numpy as np
import pytest

from kvpass.errors import KvpassWarning
from kvpass.runtime.tiers.disk_store import FILE_NAME, DiskStore
from kvpass.runtime.tiers.host_memory import BlockKey, StoredBlock

BYTES = 4096


def block(number, namespace="", group=0, length=8, size=BYTES):
    """A block whose tokens and content follow from a number."""
    random = np.random.default_rng((number, group, len(namespace)))
    tokens = random.integers(0, 1000, size=length, dtype=np.int32).tobytes()
    return StoredBlock(BlockKey.of(namespace, group, tokens), random.integers(0, 256, size=size, dtype=np.uint8))


def held(store, *blocks):
    """Which of the blocks come back; none may come back changed."""
    found = []
    for index, wanted in enumerate(blocks):
        got = store.get(wanted.key)
        if got is not None:
            assert np.array_equal(got.payload, wanted.payload)
            found.append(index)
    return found


@pytest.fixture
def open_store(tmp_path):
    stores = []

    def opened(capacity=1 << 20, **options):
        stores.append(DiskStore(tmp_path, capacity, **options))
        return stores[-1]

    yield opened
    for store in stores:
        store.close()


def test_a_later_store_finds_what_was_written(open_store, tmp_path):
    blocks = [block(i, group=i % 2) for i in range(10)]
    first = open_store()
    first.put(blocks)
    assert held(first, *blocks) == list(range(10))
    size = first.size
    first.close()
    second = open_store()
    assert (len(second), second.size) == (10, size)
    assert held(second, *blocks) == list(range(10))
    assert second.errors == 0
    assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600


def test_nothing_is_found_under_another_key(open_store):
    store = open_store()
    mine = block(1, "mine")
    store.put([mine])
    key = mine.key
    for other in (
        BlockKey.of("yours", key.group, key.tokens),
        BlockKey.of("mine", 1, key.tokens),
        BlockKey.of("mine", 0, key.tokens[:-4] + b"\1\0\0\0"),
        BlockKey("yours", key.group, key.tokens, key.digest),  # equal digests, were they ever to be met
        BlockKey("mine", 0, b"\1\0\0\0" + key.tokens[4:], key.digest),
    ):
        store.put([mine])
        assert store.get(other) is None


def test_the_least_recently_used_make_room_and_the_file_stays_bounded(open_store, tmp_path):
    store = open_store(capacity=20 * BYTES)
    blocks = [block(i) for i in range(200)]
    for each in blocks:
        store.put([each])
        store.touch(blocks[0].key.digest)
        assert store.size <= store.capacity
    assert held(store, *blocks)[0] == 0
    assert held(store, *blocks)[1:] == list(range(200 - len(store) + 1, 200)) and len(store) > 10
    assert (tmp_path / FILE_NAME).stat().st_size < 1.1 * store.capacity + 17 * 16384
    store.close()
    again = open_store(capacity=20 * BYTES)
    again.put([block(300), block(301)])
    assert 0 in held(again, *blocks) and 200 - 1 in held(again, *blocks)
    assert held(again, blocks[-len(again)]) == []


def test_a_block_larger_than_the_store_is_not_stored(open_store):
    store = open_store(capacity=2 * BYTES)
    store.put([block(0), block(1), block(2)])
    assert len(store) == 0 and store.size == 0
    store.put([block(0)])
    assert held(store, block(0)) == [0]


@pytest.mark.parametrize("wipe", [False, True])
def test_dropping_a_namespace_leaves_the_others(open_store, tmp_path, wipe):
    store = open_store(wipe=wipe)
    mine, yours = [block(i, "mine") for i in range(4)], [block(i, "yours") for i in range(4)]
    store.put(mine + yours)
    store.drop("mine")
    assert held(store, *mine) == [] and held(store, *yours) == [0, 1, 2, 3]
    if wipe:
        content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert not any(each.payload.tobytes()[:64] in content or each.key.tokens in content for each in mine)
        assert all(each.key.tokens in content for each in yours)
    store.drop(None)
    assert len(store) == 0 and store.size == 0


def test_any_flipped_byte_is_a_miss_and_never_wrong(tmp_path):
    """Every region of the file is hit: headers, index, keys, content, checksums."""
    blocks = [block(i, size=600) for i in range(8)]
    store = DiskStore(tmp_path, 1 << 20)
    store.put(blocks)
    store.close()
    path = tmp_path / FILE_NAME
    good = path.read_bytes()
    random = np.random.default_rng(0)
    places = [*range(0, 100, 12), *random.integers(0, len(good), size=30).tolist()]
    places += [good.index(each.key.tokens) + 3 for each in blocks]
    places += [good.index(each.payload.tobytes()) + 7 for each in blocks]
    lost = 0
    for place in places:
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            store = DiskStore(tmp_path, 1 << 20)
            lost += len(held(store, *blocks)) < 8
            store.put([block(99)])
            store.close()
    assert lost >= 16 and lost < len(places)


@pytest.mark.parametrize("length", [0, 1, 50, 100, 4096, 16384, 20000, 40000])
def test_a_truncated_file_is_a_miss(tmp_path, length):
    blocks = [block(i) for i in range(12)]
    store = DiskStore(tmp_path, 1 << 20)
    store.put(blocks)
    store.close()
    path = tmp_path / FILE_NAME
    os.truncate(path, length)
    store = DiskStore(tmp_path, 1 << 20)
    assert len(held(store, *blocks)) < 12
    store.put(blocks)
    store.put(blocks)  # the first write may be what finds the file broken
    assert held(store, *blocks) == list(range(12))
    store.close()


def foreign_text(path):
    path.write_text("these are somebody's notes\n" * 1000)


def foreign_database(path):
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE blocks (digest BLOB, secret TEXT)")
    database.close()


def other_format(path):
    store = DiskStore(path.parent, 1 << 20)
    store.put([block(0)])
    store.close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 77")
    database.close()


@pytest.mark.parametrize("make", [foreign_text, foreign_database, other_format])
def test_a_foreign_file_is_set_aside(tmp_path, make):
    make(tmp_path / FILE_NAME)
    content = (tmp_path / FILE_NAME).read_bytes()
    store = DiskStore(tmp_path, 1 << 20)
    assert len(store) == 0 and store.get(block(0).key) is None
    store.put([block(0)])
    assert held(store, block(0)) == [0]
    store.close()
    assert (tmp_path / (FILE_NAME + ".broken")).read_bytes() == content


def test_a_folder_that_cannot_be_used_is_one_warning_and_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(KvpassWarning, match="no blocks are kept on disk"):
        store = DiskStore(tmp_path / "file" / "folder", 1 << 20)
    store.put([block(0)])
    store.drop(None)
    assert len(store) == 0 and store.get(block(0).key) is None
    store.close()


def test_many_threads_may_call(open_store):
    store = open_store(capacity=40 * BYTES)
    failures = []

    def work(seed):
        random = np.random.default_rng(seed)
        try:
            for _ in range(40):
                mine = [block(int(i)) for i in random.integers(0, 60, size=3)]
                store.put(mine)
                held(store, *mine)
                store.touch(mine[0].key.digest)
                if random.random() < 0.02:
                    store.drop(None)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert store.size == sum(store.row_size(block(i).key.digest) for i in range(60)) <= store.capacity
    assert store.errors == 0
