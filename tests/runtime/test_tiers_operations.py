"""Random operations with blocks that are wiped, and go to host memory and disk and back: the tokens are the same."""

import random
import shutil

import numpy as np
import pytest
import torch

from kvpass.runtime.block_moves import BlockMoves
from kvpass.runtime.block_pool import BlockPool
from kvpass.runtime.disk_store import DiskStore
from kvpass.runtime.eviction import POLICIES
from kvpass.runtime.prefix_cache import PrefixCache
from kvpass.runtime.scheduler import Scheduler
from kvpass.runtime.sequence import SequenceState
from kvpass.runtime.tiers import Tiers
from kvpass.types import CachePlan, CacheSpec
from tests.runtime.machine import Machine
from tests.runtime.operations import draw_operation, operate

SLOT = 8  # bytes


class TieredMachine(Machine):
    """The machine over real block moves: its slots are the tensors that they move blocks of."""

    def __init__(self, folder, num_blocks, block_size, windows, host_blocks, disk_blocks, policy, swap_blocks):
        super().__init__(num_blocks, block_size, windows=tuple(windows))
        self.pool = BlockPool(num_blocks, block_size, scrub=True)
        self.prefix = PrefixCache(self.pool, self.windows, POLICIES[policy]())
        specs = [CacheSpec(f"{g}", 1, 2, 0, "float32", "float32", w, group=g) for g, w in enumerate(self.windows)]
        block_bytes = block_size * SLOT
        tensor = torch.from_numpy(self.slots).view(num_blocks, 1, block_size, 1).view(torch.float32)
        caches = [(tensor, tensor[..., :0])] * len(specs)
        disk = DiskStore(folder, disk_blocks * (block_bytes + 1100)) if disk_blocks else None
        self.tiers = Tiers(host_blocks * (block_bytes + 600), disk, block_size, self.windows)
        plan = CachePlan(tuple(specs), block_size, 5)
        self.moves = BlockMoves(plan, caches, self.pool, self.tiers, swap_blocks * block_bytes)
        self.prefix.shelf = self.moves
        self.scheduler = Scheduler(self.pool, self.prefix, 16, 4, self.windows, self.moves, lambda: self.now)

    def compute(self, step):
        self.moves.flush()
        super().compute(step)

    def block_is_empty(self, block):
        return set(self.block_view()[block].tolist()) <= {0, -1}


def check_wiped(machine):
    """What nobody owns and nothing is kept of is empty."""
    machine.moves.flush()
    kept = machine.pool.kept_blocks()
    for block in range(machine.pool.num_blocks):
        assert block in kept or machine.pool.is_used(block) or machine.block_is_empty(block)


@pytest.mark.parametrize("seed", range(24))
def test_tiers_and_wiping_change_no_token(tmp_path, seed):
    numbers = random.Random(seed)
    windows = (None,) if seed % 3 == 0 else numbers.choices((None, 1, 3, 6, 11), k=numbers.randint(1, 3))
    size = numbers.choice((1, 2, 4, 8))
    options = {
        "num_blocks": numbers.choice((24, 36)) * 4 // size,
        "block_size": size,
        "windows": windows,
        "host_blocks": numbers.choice((0, 8, 60)),
        "disk_blocks": numbers.choice((0, 20, 200)),
        "policy": numbers.choice(list(POLICIES)),
        "swap_blocks": numbers.choice((0, 40)),
    }
    machine = TieredMachine(tmp_path / "0", **options)
    for count in range(250):
        operate(machine, numbers, draw_operation(numbers))
        event = numbers.random()
        if event < 0.01:
            machine.prefix.drop(numbers.choice(("", "other")))
        elif event < 0.02 and not any(s.state is SequenceState.NEW for s, _ in machine.sequences):
            machine.moves.save(machine.prefix.held_blocks())
        elif event < 0.03 and options["disk_blocks"]:
            # The process ends at once, and another one finds the files as they are.
            folder = tmp_path / f"{count + 1}"
            shutil.copytree(machine.tiers._disk.path.parent, folder)
            machine.check_outputs()
            machine.tiers.close()
            machine = TieredMachine(folder, **options)
        if numbers.random() < 0.1:
            check_wiped(machine)
    machine.now += 100
    machine.run()
    machine.check_outputs()
    check_wiped(machine)
    machine.check_empty()
    assert machine.tiers.counts.disk_errors == 0
    machine.tiers.close()


def test_a_prefix_that_was_evicted_is_not_computed_again(tmp_path):
    machine = TieredMachine(tmp_path, 12, 4, (None, 6), 60, 0, "lru", 0)
    prompt = np.random.default_rng(0).integers(0, 5, 17).tolist()
    machine.add(prompt, 1)
    machine.run()
    for token in range(6):
        machine.add([token % 5, *np.random.default_rng(token).integers(0, 5, 16).tolist()], 2)
        machine.run()
    assert not machine.prefix.match(np.array(prompt, dtype=np.int32), 16).path
    machine.add(prompt, 4)
    assert machine.step().ranges[0][1:] == (16, 17)
    assert machine.tiers.counts.promoted == 4 + 2  # the window looks at two blocks
    machine.run()
    machine.check_outputs()
    machine.check_empty()
