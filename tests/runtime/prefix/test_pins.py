from tests.runtime.trie import Trie, ids


def test_pinned_prefixes_stay_until_their_time_is_over():
    trie = Trie(num_blocks=4)
    now = [0.0]
    trie.cache.pins.clock = lambda: now[0]
    blocks = trie.register(1, 2, 3, 4)
    trie.pool.release(blocks)
    pin = trie.cache.pin(ids(1, 2, 3, 4, 5), ttl=10)
    assert (pin.num_tokens, pin.tables, trie.cache.pins.blocks) == (4, (tuple(blocks),), set(blocks))
    trie.check(blocks)
    assert trie.pool.num_available == 2
    trie.pool.release(trie.pool.allocate(2))
    now[0] = 9.9
    trie.cache.pins.expire()
    assert trie.match(1, 2, 3, 4) == blocks and len(trie.cache.pins) == 1
    now[0] = 10.0
    trie.cache.pins.expire()
    assert not trie.cache.pins.release(pin)
    assert trie.pool.num_available == 4 and trie.match(1, 2, 3, 4) == blocks
    trie.check()


def test_pins_end_with_their_namespace_or_by_hand():
    trie = Trie()
    for namespace in ("us", "them"):
        trie.pool.release(trie.register(1, 2, 3, 4, namespace=namespace))
    ours, _ = (trie.cache.pin(ids(1, 2, 3, 4), None, namespace) for namespace in ("us", "them"))
    nothing = trie.cache.pin(ids(9, 9), None, "us")
    assert nothing.num_tokens == 0 and len(trie.cache.pins) == 2
    trie.cache.drop("them")
    assert trie.match(1, 2, 3, 4, namespace="them") == [] and len(trie.cache.pins) == 1
    trie.check(*ours.tables)
    assert trie.cache.pins.release(ours) and not trie.cache.pins.release(ours)
    trie.cache.pin(ids(1, 2), None, "us")
    trie.cache.clear()
    trie.check()
    assert trie.pool.num_free == trie.pool.num_blocks


def test_a_pin_holds_what_a_window_looks_at_and_no_more():
    trie = Trie(num_blocks=4, window=4)  # two blocks
    blocks = trie.register(1, 2, 3, 4, 5, 6)
    trie.pool.release(blocks)
    pin = trie.cache.pin(ids(1, 2, 3, 4, 5, 6), None)
    assert pin.tables == (tuple(blocks[1:]),)
    trie.pool.allocate(2)
    assert trie.match(1, 2, 3, 4, 5, 6) == [None, *blocks[1:]]
