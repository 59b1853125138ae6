import numpy as np
import pytest
import torch

from kvpass.kernels.formats.cache_formats import FORMATS, allocate_cache, allocate_caches
from kvpass.kernels.formats.settling import read_blocks, read_slabs, settle_slabs, wide_view
from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.pool.wide_blocks import WideBlocks
from kvpass.runtime.prefix.prefix_cache import PrefixCache
from kvpass.runtime.tiers.block_bytes import make_moves
from kvpass.runtime.tiers.block_moves import BlockMoves
from kvpass.runtime.tiers.disk_store import DiskStore
from kvpass.runtime.tiers.host_memory import BlockKey
from kvpass.runtime.tiers.tiers import Tiers, Wanted
from kvpass.types import CachePlan, CacheSpec
from tests.runtime.trie import ids

SIZE = 4
STORED = ("float32", "bfloat16", "float16", "fp8_e4m3", "int8", "int4")


KEYS, VALUES = FORMATS["k4"], FORMATS["v2"]


class Device:
    """Caches of two groups in every format, the pool and the tree over them; every byte of a block follows from it."""

    def __init__(self, num_blocks=8, scrub=False, swap_bytes=0, host=1 << 20, disk=None):
        specs = [CacheSpec(f"full {f}", 2, 32, 16, f, f) for f in STORED]
        specs += [CacheSpec("window", 1, 32, 0, "float32", "float32", window=6, group=1)]
        self.plan = CachePlan(tuple(specs), SIZE, 10)
        self.pool = BlockPool(num_blocks, SIZE, scrub)
        self.cache = PrefixCache(self.pool, self.plan.group_windows)
        self.caches = [allocate_cache(spec, num_blocks, SIZE, "cpu") for spec in specs]
        # Layer i of each group lives in the same tensors.
        self.caches[-1] = (self.caches[0][0][:, :1].clone(), self.caches[-1][1])
        self.tiers = Tiers(host, disk, SIZE, self.plan.group_windows)
        self.moves = BlockMoves(self.plan, self.caches, self.pool, self.tiers, swap_bytes)
        self.cache.shelf = self.moves

    @property
    def tensors(self):
        return [tensor.view(torch.uint8).flatten(1) for pair in self.caches for tensor in pair if tensor.numel()]

    def write(self, block, seed):
        for index, tensor in enumerate(self.tensors):
            tensor[block] = torch.from_numpy(
                np.random.default_rng((seed, index)).integers(1, 256, tensor.shape[1], dtype=np.uint8)
            )

    def holds(self, block, seed, group=None):
        kept = block, seed
        before = [tensor[block].clone() for tensor in self.tensors]
        self.write(*kept)
        after = [tensor[block].clone() for tensor in self.tensors]
        for tensor, old in zip(self.tensors, before, strict=True):
            tensor[block] = old
        count = len(before) - 1  # the last one is that of group 1
        parts = slice(None) if group is None else slice(count) if group == 0 else slice(count, None)
        return all(map(torch.equal, before[parts], after[parts]))

    def is_zero(self, block):
        return not any(tensor[block].any() for tensor in self.tensors)


def test_an_evicted_prefix_comes_back_as_it_was():
    device = Device()
    tokens = ids(*range(12))
    branch, tables = device.cache.root("us"), []
    for start in range(0, 12, SIZE):
        blocks = device.pool.allocate(2)
        branch = device.cache.insert(branch, tokens[start : start + SIZE], blocks)
        for block in blocks:
            device.write(block, 100 + len(tables))
            tables.append(block)
    device.pool.release(tables[::2])
    device.pool.release(tables[1::2])
    taken = device.pool.allocate(8)  # all are evicted
    assert not device.cache.match(tokens, 12, "us").path
    for block in device.moves._leaving:
        assert block[0].namespace == "us"
    device.moves.flush()
    for block in taken:
        device.write(block, 1)  # somebody else's
    match = device.cache.match(tokens, 12, "us")
    assert not match.path and [len(row) for row in match.stored] == [2, 2, 2]
    assert match.stored[0][1] is None  # no window reaches back to it
    assert not device.cache.match(tokens, 12, "them").stored
    targets = iter(taken)
    stored = {next(targets): block for row in match.stored for block in row if block is not None}
    device.moves.fill(stored)
    for target, content in stored.items():
        level, group = len(content.key.tokens) // 16 - 1, content.key.group
        assert device.holds(target, 100 + 2 * level + group, group)
    assert device.tiers.counts.demoted == 6 and device.tiers.counts.promoted == 5


def test_what_is_evicted_is_read_before_its_block_is_filled_with_something_else():
    device = Device(num_blocks=2, scrub=True)
    for tokens, seed in ((ids(1, 1, 1, 1), 1), (ids(2, 2, 2, 2), 2)):
        blocks = device.pool.allocate(2)
        device.moves.flush()
        for block in blocks:
            device.write(block, seed)
        device.cache.insert(device.cache.root(), tokens, blocks)
        device.pool.release(blocks)
    device.moves.flush()
    first = device.cache.match(ids(1, 1, 1, 1), 4).stored
    # One schedule: the second prefix is evicted, and the first one comes into its blocks.
    blocks = device.pool.allocate(2)
    device.moves.fill(dict(zip(blocks, first[0], strict=True)))
    device.moves.flush()
    assert device.holds(blocks[0], 1, 0) and device.holds(blocks[1], 1, 1)
    second = device.cache.match(ids(2, 2, 2, 2), 4).stored
    device.moves.fill(dict(zip(blocks, second[0], strict=True)))
    assert device.holds(blocks[0], 2, 0) and device.holds(blocks[1], 2, 1)


def test_freed_blocks_are_wiped_and_owned_or_kept_ones_are_not():
    device = Device(scrub=True)
    gone, kept, owned, window = device.pool.allocate(4)
    for block in (gone, kept, owned):
        device.write(block, block)
    device.cache.insert(device.cache.root(), ids(1, 2, 3, 4), [kept, window])
    device.pool.release([gone, kept, window])
    device.moves.flush()
    assert device.is_zero(gone) and device.holds(kept, kept) and device.holds(owned, owned)
    device.cache.clear()
    device.moves.flush()
    assert device.is_zero(kept)
    assert device.cache.match(ids(1, 2, 3, 4), 4).stored == ()


def test_without_scrubbing_nothing_is_wiped():
    device = Device()
    (block,) = device.pool.allocate(1)
    device.write(block, 3)
    device.pool.release([block])
    device.moves.flush()
    assert device.holds(block, 3)


def test_swapped_blocks_come_back_into_any_blocks():
    device = Device(scrub=True, swap_bytes=1 << 20)
    blocks = device.pool.allocate(3)
    for block in blocks:
        device.write(block, 50 + block)
    handle = device.moves.swap_out(blocks, range(3), 3 * SIZE)
    assert device.moves.swapped_bytes == 3 * sum(tensor.shape[1] for tensor in device.tensors)
    device.pool.release(blocks)
    targets = device.pool.allocate(3)
    assert device.moves.swap_in(handle, [(2, targets[0]), (0, targets[1])])
    device.moves.flush()  # what became free before is wiped before, and not now
    assert device.holds(targets[0], 50 + blocks[2]) and device.holds(targets[1], 50 + blocks[0])
    device.moves.discard(handle)
    assert device.moves.swapped_bytes == 0


def test_what_is_swapped_out_is_bounded():
    one = sum(tensor.shape[1] for tensor in Device().tensors)
    device = Device(swap_bytes=2 * one)
    blocks = device.pool.allocate(3)
    assert device.moves.swap_out(blocks, range(3), 3 * SIZE) is None
    handle = device.moves.swap_out(blocks[:2], range(2), 2 * SIZE)
    assert handle is not None and device.moves.swap_out(blocks[:1], [0], SIZE) is None
    device.moves.discard(handle)
    assert device.moves.swap_out(blocks[:1], [0], SIZE) is not None
    device.moves.clear()
    assert device.moves.swapped_bytes == 0


@pytest.mark.parametrize("namespace", ["us", None])
def test_what_is_dropped_does_not_arrive_later(namespace):
    device = Device(num_blocks=2)
    blocks = device.pool.allocate(2)
    device.cache.insert(device.cache.root("us"), ids(1, 2, 3, 4), blocks)
    device.pool.release(blocks)
    device.pool.allocate(2)
    device.cache.drop("us") if namespace else device.cache.clear()
    device.moves.flush()
    assert device.cache.match(ids(1, 2, 3, 4), 4, "us").stored == ()


def test_what_is_saved_is_found_by_a_later_pool(tmp_path):
    first = Device(disk=DiskStore(tmp_path, 1 << 24))
    tokens = ids(*range(12))
    branch = first.cache.root("us")
    for start in range(0, 12, SIZE):
        blocks = first.pool.allocate(2)
        branch = first.cache.insert(branch, tokens[start : start + SIZE], blocks)
        for block in blocks:
            first.write(block, 10 + start + block % 2)
    held = list(first.cache.held_blocks())
    assert [len(key) // 16 for _, _, key, _ in held] == [3, 3, 2, 2, 1, 1]  # tails before heads
    first.moves.save(first.cache.held_blocks())
    first.tiers.close()
    second = Device(disk=DiskStore(tmp_path, 1 << 24))
    assert second.cache.prefetch(tokens, 12, "them") is None
    ahead = second.cache.prefetch(tokens, 12, "us")
    assert ahead is not None and ahead.wait(10)
    match = second.cache.match(tokens, 12, "us")
    assert len(match.stored) == 3
    blocks = second.pool.allocate(2)
    second.moves.fill(dict(zip(blocks, match.stored[2], strict=True)))
    assert second.holds(blocks[0], 18, 0) and second.holds(blocks[1], 19, 1)
    second.tiers.close()


class Settling:
    """A k4v2 cache of one group over 6 blocks, 2 of which may be wide at a time."""

    def __init__(self, scrub=False):
        spec = CacheSpec("a", 2, 16, 16, "k4", "v2")
        self.pool, self.formats = BlockPool(6, 16, scrub), (KEYS, VALUES)
        self.wide = WideBlocks(6, 2, 16, (None,), self.pool.is_used, scrub)
        (self.caches,) = allocate_caches((spec,), 6, 16, "cpu", 2)
        self.tiers = Tiers(1 << 20, None, 16)
        plan = CachePlan((spec,), 16, 10)
        self.moves = BlockMoves(plan, [self.caches], self.pool, self.tiers, 1 << 20, self.wide)

    def write(self, block, seed):
        """Rows of 16 bits in a wide place; gives them."""
        self.wide.widen(np.array([block]), np.array([16]))
        make_moves(self.wide, self.moves._bytes._plan, [self.caches])
        number, numbers = self.number(block), torch.Generator().manual_seed(seed)
        rows = [torch.randn(2, 16, 16, generator=numbers).bfloat16() for _ in range(2)]
        for cache, form, part in zip(self.caches, self.formats, rows, strict=True):
            wide_view(cache, form)[number] = part
        return rows

    def number(self, block):
        return int(self.wide.number(np.array([block]))[0])

    def holds(self, block, rows, settled):
        assert (self.number(block) >= 0) == settled
        for cache, form, part in zip(self.caches, self.formats, rows, strict=True):
            expected = read_slabs(settle_slabs(part, form), form) if settled else part.float()
            found = read_blocks(cache, form, torch.tensor([self.number(block)]))[0]
            if not torch.equal(found, expected):
                return False
        return True


def test_of_blocks_that_settle_the_first_comes_back_in_16_bits_and_others_settled():
    device = Settling()
    first, second = device.pool.allocate(2)
    rows = [device.write(first, 1), device.write(second, 2)]
    keys = [BlockKey.of("", 0, ids(*range(end)).tobytes()) for end in (16, 32)]
    for key, block in zip(keys, (first, second), strict=True):
        device.moves.shelve("", 0, key.tokens, block)
    device.moves.flush()
    assert device.number(first) < 0 and device.number(second) < 0  # whoever evicts them has the places
    (found,), (other,) = device.tiers.find(Wanted("", keys[1].tokens, 16 * 4, 0, {}))
    assert (len(found.payload), len(other.payload)) == (2 * 16 * 2 * (16 + 16), 2 * 16 * (9 + 2 + 4 + 2))
    busy = device.write(3, 3)
    device.moves.fill({4: found, 5: other, second: other})
    assert device.holds(4, rows[0], settled=False)
    assert device.holds(5, rows[1], settled=True)
    assert device.holds(second, rows[1], settled=True)  # its wide place was given up
    assert device.holds(3, busy, settled=False)


def test_a_preempted_sequence_finds_its_blocks_as_they_were():
    device = Settling(scrub=True)
    blocks = device.pool.allocate(3)
    rows = [device.write(block, block) for block in blocks]  # the first one to be written has settled
    assert [device.number(block) >= 0 for block in blocks] == [True, False, False]
    handle = device.moves.swap_out(blocks, [0, 1, 2], 3 * 16)
    size = device.moves.swapped_bytes
    assert size == 2 * 2 * 16 * (9 + 2 + 4 + 2) + 2 * 16 * 2 * (16 + 16)  # the second one was about to settle
    device.pool.release(blocks)
    device.moves.flush()
    assert device.wide.num_used == 0
    assert not any(wide_view(cache, form)[-2:].any() for cache, form in zip(device.caches, device.formats, strict=True))
    targets = device.pool.allocate(3)
    device.moves.flush()
    device.moves.swap_in(handle, list(enumerate(reversed(targets))))
    for block, part, settled in zip(reversed(targets), rows, (True, True, False), strict=True):
        assert device.holds(block, part, settled)
    device.moves.discard(handle)
    assert device.moves.swapped_bytes == 0
