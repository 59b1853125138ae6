"""The machine over real block moves, tiers and files, and random operations on it that also end the process."""

import random
import shutil
from pathlib import Path

import torch

from kvpass.runtime.block_moves import BlockMoves
from kvpass.runtime.block_pool import BlockPool
from kvpass.runtime.disk_store import DiskStore
from kvpass.runtime.eviction import POLICIES
from kvpass.runtime.prefix_cache import PrefixCache
from kvpass.runtime.scheduler import Scheduler
from kvpass.runtime.tiers import Tiers
from kvpass.types import CachePlan, CacheSpec
from tests.runtime.machine import Machine
from tests.runtime.operations import OPERATIONS, finish, operate

SLOT = 8  # bytes
# Beside those of the scheduler.
TIER_OPERATIONS = {**OPERATIONS, "save": 2, "crash": 2, "wiped": 15}


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


def draw_sizes(numbers: random.Random) -> dict[str, object]:
    """Sizes of a machine, of its tiers, and its policy."""
    size = numbers.choice((1, 2, 4, 8))
    windowed = numbers.random() < 0.6
    return {
        "num_blocks": numbers.choice((24, 36)) * 4 // size,
        "block_size": size,
        "windows": numbers.choices((None, 1, 3, 6, 11), k=numbers.randint(1, 3)) if windowed else (None,),
        "host_blocks": numbers.choice((0, 8, 60)),
        "disk_blocks": numbers.choice((0, 20, 200)),
        "policy": numbers.choice(list(POLICIES)),
        "swap_blocks": numbers.choice((0, 40)),
    }


def play_tiers(seed: int, operations: int, folder: Path) -> TieredMachine:
    """A machine after so many operations, and after its end; its files are in folders of ``folder``."""
    numbers = random.Random(seed)
    sizes = draw_sizes(numbers)
    machine = TieredMachine(folder / "0", **sizes)
    for count, name in enumerate(numbers.choices(list(TIER_OPERATIONS), list(TIER_OPERATIONS.values()), k=operations)):
        if name == "save":
            machine.moves.save(machine.prefix.held_blocks())
        elif name == "wiped":
            check_wiped(machine)
        elif name != "crash":
            operate(machine, numbers, name)
        elif machine.tiers.has_disk:
            # The process ends at once, and another one finds the files as they are.
            copy = folder / f"{count + 1}"
            shutil.copytree(machine.tiers._disk.path.parent, copy)
            machine.check_outputs()
            machine.tiers.close()
            shutil.rmtree(machine.tiers._disk.path.parent)
            machine = TieredMachine(copy, **sizes)
    finish(machine)
    check_wiped(machine)
    assert machine.tiers.counts.disk_errors == 0
    machine.tiers.close()
    return machine
