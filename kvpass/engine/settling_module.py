"""A paged module whose caches are in k4v2, as one that knows blocks only by the numbers of the pool."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kvpass.engine.step_module import StepModule
from kvpass.kernels.formats.settling import settling_caches
from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.pool.capacity import Room
from kvpass.runtime.pool.wide_blocks import WideBlocks
from kvpass.runtime.tiers.block_bytes import make_moves
from kvpass.types import CachePlan, StepInputs


def make_wide_blocks(plan: CachePlan, room: Room, pool: BlockPool, scrub: bool) -> WideBlocks | None:
    """Which of the pool's blocks are wide, if the plan has caches that settle."""
    if not plan.settles:
        return None
    return WideBlocks(room.num_blocks, room.wide_blocks, plan.block_size, plan.group_windows, pool.is_used, scrub)


class SettlingModule:
    """Settles blocks before each step, and hands the tables on in the numbers of the caches.

    Attributes:
        blocks: which of them are wide.
    """

    def __init__(self, module: StepModule, plan: CachePlan, blocks: WideBlocks) -> None:
        self._module = module
        self._plan = plan
        self.blocks = blocks

    @property
    def device(self) -> torch.device:
        """Where the step's tensors and the caches have to be."""
        return self._module.device

    def __call__(self, step: StepInputs, caches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """As the module that this one is made of: logits ``[R, V]``."""
        self._move(caches)  # what an exception may have left
        size = self._plan.block_size
        tables, slots = step.block_tables.cpu().numpy(), step.slot_mapping.cpu().numpy()
        lengths = (step.seq_lens - step.query_start.diff()).cpu().numpy()
        self.blocks.prepare(tables, slots, lengths)
        self._move(caches)
        places = self.blocks.number(slots // size) * size + slots % size
        inputs = replace(
            step,
            slot_mapping=torch.from_numpy(np.concatenate((slots, places))).to(self.device),
            block_tables=torch.from_numpy(np.concatenate((tables, self.blocks.number(tables)))).to(self.device),
        )
        return self._module(inputs, caches)

    def copy_blocks(self, caches: Sequence[tuple[Tensor, Tensor]], pairs: Iterable[tuple[int, int]]) -> None:
        """Copy blocks (source, target), in the pool's numbers, in all caches, so that the targets can be written."""
        self._move(caches)
        pairs = list(pairs)
        self.blocks.copied(pairs)
        self._move(caches)
        settling = {tensor.data_ptr() for tensor in settling_caches(self._plan.caches, caches)[0]}
        others = {tensor.data_ptr(): tensor for pair in caches for tensor in pair if tensor.data_ptr() not in settling}
        source, target = torch.tensor(pairs, device=self.device).t().contiguous()
        torch.ops.kvpass.copy_blocks(list(others.values()), source, target)

    def _move(self, caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        make_moves(self.blocks, self._plan, caches)
