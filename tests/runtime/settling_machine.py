"""The machine over caches in k4v2: what it reads back is exact in wide blocks, and near where blocks have settled."""

import random
from pathlib import Path

import numpy as np
import torch

from kvpass.engine.settling_module import SettlingModule
from kvpass.kernels.formats.cache_formats import FORMATS, allocate_caches
from kvpass.kernels.formats.settling import read_blocks, wide_view
from kvpass.runtime.pool.wide_blocks import WideBlocks
from kvpass.runtime.schedule.batch import BatchBuilder
from kvpass.types import CachePlan, CacheSpec
from tests.runtime.machine import VOCABULARY
from tests.runtime.tiered_machine import TieredMachine, draw_sizes, play_with

SIZE = 16
KEYS, VALUES = FORMATS["k4"], FORMATS["v2"]
NIBBLES = np.arange(0, 64, 4)
SETTLED_BYTES, WIDE_BYTES = SIZE * (16 * 9 // 16 + 2 + 4 // 4 + 2), SIZE * 2 * (16 + 4)
# A step writes to at most 6 blocks, and what is swapped in has as many at most that stay wide.
MAX_BATCH_TOKENS, LEAST_WIDE = 32, 10


def rows_of(values):
    """Keys ``[n, 16]`` and values ``[n, 4]`` that bfloat16 holds exactly; the keys tell one value from any other."""
    numbers = np.array(values, dtype=np.int64)
    keys = (numbers[:, None] >> NIBBLES & 15) - 8
    return torch.from_numpy(keys).float(), torch.from_numpy((numbers[:, None] >> NIBBLES[::4] & 63) - 31).float()


class SettlingMachine(TieredMachine):
    """With ``never_short`` every block may be wide at a time, so that first blocks are for ever."""

    stretch = 5
    device = torch.device("cpu")

    def __init__(self, folder, num_blocks, windows, never_short, scrub, **options):
        self.num_wide = num_blocks if never_short else LEAST_WIDE * len(windows)
        super().__init__(folder, num_blocks, SIZE, windows, MAX_BATCH_TOKENS, scrub, **options)
        self.never_short = never_short
        self.batches = BatchBuilder(SIZE)

    def make_caches(self):
        specs = [CacheSpec(f"{g}", 1, 16, 4, "k4", "v2", window, group=g) for g, window in enumerate(self.windows)]
        plan = CachePlan(tuple(specs), SIZE, VOCABULARY)
        used = self.pool.is_used
        self.wide = WideBlocks(self.pool.num_blocks, self.num_wide, SIZE, self.windows, used, self.scrub)
        self.caches = allocate_caches(specs, self.pool.num_blocks, SIZE, "cpu", self.num_wide)
        self.module = SettlingModule(self, plan, self.wide)
        return plan, self.caches, WIDE_BYTES

    def propose(self, sequence, accepted, rejected, wrong=0):
        super().propose(sequence, accepted, rejected)  # k4v2 takes no trees

    def number(self, block):
        return int(self.wide.number(np.array([block]))[0])

    def copy(self, sources, targets):
        self.module.copy_blocks(self.caches, zip(sources, targets, strict=True))
        self.num_copied += len(sources)

    def write(self, step):
        self.ranges = step.ranges
        self.module(self.batches.build(step), self.caches)
        self.wide.check_integrity()

    def __call__(self, inputs, caches):
        """What the module computes: the rows of all new tokens are written."""
        for group, (keys, values) in enumerate(caches):
            new = [v + self.mark(s, group) for s, start, end in self.ranges for v in self.values_of(s, end)[start:]]
            rows = (row[:, None] for row in rows_of(new))
            slots = inputs.slot_mapping[len(caches) + group]
            torch.ops.kvpass.write_cache(*rows, keys, values, slots, key_format="k4", value_format="v2")

    def check_reads(self, sequence, group, first, end):
        known = np.array(self.values_of(sequence, end)) + self.mark(sequence, group)
        places = range(first // SIZE, -(-end // SIZE))
        numbers = self.wide.number(sequence.tables[group].entries[places.start : places.stop])
        keys, values = (
            read_blocks(cache, form, torch.from_numpy(numbers)).flatten(0, 2)[: end - places.start * SIZE]
            for cache, form in zip(self.caches[group], (KEYS, VALUES), strict=True)
        )
        expected_keys, expected_values = rows_of(known[places.start * SIZE :])
        assert (keys - expected_keys).abs().max() < 1.5
        assert (values - expected_values).abs().max() <= 32
        # What is written in this step is exact, and so is the first block.
        exact = np.zeros(len(keys), dtype=bool)
        start = next(start for known, start, _ in self.ranges if known is sequence)
        exact[start - places.start * SIZE :] = True
        if self.never_short and places.start == 0:
            assert numbers[0] < 0
            exact[:SIZE] = True
        assert torch.equal(keys[exact], expected_keys[exact]) and torch.equal(values[exact], expected_values[exact])

    def read(self, block, offset):
        row = read_blocks(self.caches[0][0], KEYS, torch.tensor([self.number(block)]))[0, 0, offset]
        return sum(int(nibble + 8) << shift for nibble, shift in zip(row.tolist(), NIBBLES.tolist(), strict=True))

    def block_is_empty(self, block):
        return self.number(block) == block and not any(cache[block].any() for cache in self.caches[0])

    def check_wiped(self):
        super().check_wiped()
        if not self.scrub:
            return
        free = torch.tensor(self.wide._state.free, dtype=torch.int64)
        for cache, form in zip(self.caches[0], (KEYS, VALUES), strict=True):
            assert not wide_view(cache, form)[-1 - free].any()


def play_settling(seed: int, operations: int, folder: Path) -> SettlingMachine:
    """As :func:`tests.runtime.tiered_machine.play_tiers`."""
    numbers = random.Random(seed)
    windows = numbers.choice(((None,), (None,), (None, 20), (40,)))
    sizes = {
        **draw_sizes(numbers, SIZE),
        "num_blocks": numbers.choice((12, 20, 30)) * len(windows),
        "host_blocks": numbers.choice((0, 8, 60, 60)),
        "swap_blocks": numbers.choice((0, 40, 40)),
        "windows": windows,
        "never_short": numbers.random() < 0.3,
        "scrub": numbers.random() < 0.5,
    }
    return play_with(lambda place: SettlingMachine(place, **sizes), numbers, operations, folder)
