"""The machine over real block moves, tiers and files, and random operations on it that also end the process."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.prefix.eviction import POLICIES
from kvpass.runtime.prefix.prefix_cache import PrefixCache
from kvpass.runtime.schedule.scheduler import Scheduler
from kvpass.runtime.tiers.block_moves import BlockMoves
from kvpass.runtime.tiers.disk_store import DiskStore
from kvpass.runtime.tiers.tiers import Tiers
from kvpass.types import CachePlan, CacheSpec
from tests.runtime.machine import VOCABULARY, Machine
from tests.runtime.operations import OPERATIONS, finish, operate, random_prompt

SLOT = 8  # bytes
# Beside those of the scheduler.
TIER_OPERATIONS = {**OPERATIONS, "save": 2, "crash": 2, "wiped": 15, "match": 15}


class TieredMachine(Machine):
    """The machine over real block moves: its slots are the tensors that they move blocks of."""

    def __init__(
        self,
        folder,
        num_blocks,
        block_size,
        windows,
        max_batch_tokens=16,
        scrub=True,
        *,
        host_blocks,
        disk_blocks,
        policy,
        swap_blocks,
    ):
        super().__init__(num_blocks, block_size, max_batch_tokens=max_batch_tokens, windows=tuple(windows))
        self.scrub = scrub
        # Matches that hold more than what is on the device behind the first place where that has a gap.
        self.num_beyond = 0
        self.pool = BlockPool(num_blocks, block_size, scrub)
        self.prefix = PrefixCache(self.pool, self.windows, POLICIES[policy]())
        self.wide = None
        plan, caches, block_bytes = self.make_caches()
        disk = DiskStore(folder, disk_blocks * (block_bytes + 1100)) if disk_blocks else None
        self.tiers = Tiers(host_blocks * (block_bytes + 600), disk, block_size, self.windows)
        self.moves = BlockMoves(plan, caches, self.pool, self.tiers, swap_blocks * block_bytes, self.wide)
        self.prefix.shelf = self.moves
        self.scheduler = Scheduler(
            self.pool, self.prefix, self.max_batch_tokens, 4, self.windows, self.moves, lambda: self.now
        )

    def make_caches(self):
        """The plan of the caches, their tensors, and the bytes of a block."""
        specs = [CacheSpec(f"{g}", 1, 2, 0, "float32", "float32", w, group=g) for g, w in enumerate(self.windows)]
        size = self.pool.block_size
        tensor = torch.from_numpy(self.slots).view(-1, 1, size, 1).view(torch.float32)
        return CachePlan(tuple(specs), size, VOCABULARY), [(tensor, tensor[..., :0])] * len(specs), size * SLOT

    def compute(self, step):
        self.moves.flush()
        super().compute(step)

    def block_is_empty(self, block):
        return set(self.block_view()[block].tolist()) <= {0, -1}

    def check_wiped(self):
        """What nobody owns and nothing is kept of is empty, where freed blocks are wiped."""
        if not self.scrub:
            return
        self.moves.flush()
        kept = self.pool.kept_blocks()
        for block in range(self.pool.num_blocks):
            assert block in kept or self.pool.is_used(block) or self.block_is_empty(block)

    def check_match(self, prompt, namespace):
        """No longer prefix could be taken over, by all that is kept on the device and in host memory."""
        self.moves.flush()
        self.tiers.flush()
        size, tokens = self.pool.block_size, np.array(prompt, dtype=np.int32)
        kept = {(name, group, key) for name, group, key, _ in self.prefix.held_blocks()}
        stored = {(block.key.namespace, block.key.group, block.key.tokens) for block in self.tiers._host}
        if set(self.windows) == {1}:
            return  # a prefix need not be there at all, and is not looked for

        def is_whole(count):
            return all(
                (namespace, group, tokens[: (place + 1) * size].tobytes()) in kept | stored
                for group, window in enumerate(self.windows)
                for place in range(count)
                if window is None or (place + 1) * size > count * size - window + 1
            )

        found = self.prefix.match(tokens, len(tokens), namespace)
        assert found.length == max(filter(is_whole, range(len(tokens) // size + 1)))
        self.num_beyond += bool(found.beyond)


def draw_sizes(numbers: random.Random, size: int) -> dict[str, object]:
    """Sizes of a machine with blocks of ``size`` tokens, of its tiers, and its policy."""
    windowed = numbers.random() < 0.6
    return {
        "num_blocks": numbers.choice((24, 36)) * 4 // size,
        "windows": numbers.choices((None, 1, 3, 6, 11), k=numbers.randint(1, 3)) if windowed else (None,),
        "host_blocks": numbers.choice((0, 8, 60)),
        "disk_blocks": numbers.choice((0, 20, 200)),
        "policy": numbers.choice(list(POLICIES)),
        "swap_blocks": numbers.choice((0, 40)),
    }


def play_tiers(seed: int, operations: int, folder: Path) -> TieredMachine:
    """A machine of random sizes after so many operations, and after its end; its files are in folders of ``folder``."""
    numbers = random.Random(seed)
    size = numbers.choice((1, 2, 4, 8))
    sizes = draw_sizes(numbers, size)
    return play_with(lambda place: TieredMachine(place, block_size=size, **sizes), numbers, operations, folder)


def play_with(
    make: Callable[[Path], TieredMachine], numbers: random.Random, operations: int, folder: Path
) -> TieredMachine:
    """The same for a machine that ``make`` makes over a folder."""
    machine = make(folder / "0")
    for count, name in enumerate(numbers.choices(list(TIER_OPERATIONS), list(TIER_OPERATIONS.values()), k=operations)):
        if name == "save":
            machine.moves.save(machine.prefix.held_blocks())
        elif name == "wiped":
            machine.check_wiped()
        elif name == "match":
            machine.check_match(random_prompt(machine, numbers), numbers.choice(("", "", "other")))
        elif name != "crash":
            operate(machine, numbers, name)
        elif machine.tiers.has_disk:
            # The process ends at once, and another one finds the files as they are.
            copy = folder / f"{count + 1}"
            shutil.copytree(machine.tiers._disk.path.parent, copy)
            machine.check_outputs()
            machine.tiers.close()
            shutil.rmtree(machine.tiers._disk.path.parent)
            machine = make(copy)
    finish(machine)
    machine.check_wiped()
    assert machine.tiers.counts.disk_errors == 0
    machine.tiers.close()
    return machine
