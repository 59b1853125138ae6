"""``verify_trees``: tokens computed as nodes of a tree, against each path of it computed by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.fx_passes.validation.bounds import Bound, Noise
from kvpass.fx_passes.validation.verify import (
    LONGEST,
    Comparison,
    allowed_tokens,
    dtypes_of,
    format_bound,
    logits_error,
)
from kvpass.kernels.formats.cache_formats import allocate_caches
from kvpass.types import StepInputs

PARENTS = (-1, 0, -1, 2, 3)  # of the nodes: a path of two, and one of three
PATHS = ((0, 1), (2, 3, 4))


@torch.no_grad()
def verify_trees(module: PagedModule) -> Comparison:
    """Compare the logits of a tree's nodes, behind one sequence, with those of the paths as plain sequences.

    The sequence is longer than a block, and than windows up to the length that
    :mod:`~kvpass.fx_passes.validation.verify` covers; its blocks are in random order, and unused slots hold NaN.
    Nothing is compared where the model's longest sequence has no room for a tree.
    """
    found = Comparison()
    windows = [s.window for s in module.plan.caches if s.window is not None and s.window < LONGEST - 16]
    length = max([module.plan.block_size, module.plan.prefix, *windows]) + 9
    length = min(length, (module.plan.max_length or LONGEST) - len(PARENTS))
    if length < 2:
        return found
    run = OneSequence(module, length)
    bound = run.bound(length)
    found.tolerance, found.share = max(format_bound(module.plan), bound.tolerance), bound.share
    drawn = run.tokens[length:]
    run.step(0, run.tokens[: length - 1])
    depths, visible = _tree(length - 1)
    got = run.step(length - 1, run.tokens[length - 1 :], depths, visible)
    for path in PATHS:
        wanted = run.step(length - 1, torch.cat((run.tokens[length - 1 : length], drawn[list(path)])))
        rows = got[[0, *(1 + node for node in path)]]
        scale = float(wanted.abs().max()) or 1.0
        found.errors[f"path of {len(path)} in a tree"] = logits_error(rows, wanted.float(), scale, bound.share)
    return found


def _tree(position: int) -> tuple[Tensor, Tensor]:
    """Positions and mask of a token at ``position`` and the nodes behind it."""
    count = 1 + len(PARENTS)
    positions, visible = torch.full((count,), position), torch.eye(count, dtype=torch.bool)
    for row, parent in enumerate(PARENTS, start=1):
        positions[row] = positions[parent + 1] + 1
        visible[row] |= visible[parent + 1]
    return positions, visible


class OneSequence:
    """One sequence of random tokens, as long as ``length`` and a tree, and its blocks.

    Attributes:
        tokens: its token ids.
        caches: keys and values of every cache.
    """

    def __init__(self, module: PagedModule, length: int) -> None:
        self._module = module
        plan, size = module.plan, module.plan.block_size
        generator = torch.Generator().manual_seed(1)
        allowed = allowed_tokens(plan)
        drawn = torch.randint(0, len(allowed), (length + len(PARENTS),), generator=generator)
        self.tokens = allowed[drawn].to(module.device)
        groups, blocks = len(plan.group_windows), -(-len(drawn) // size)
        self._tables = torch.randperm(groups * blocks, generator=generator).view(groups, 1, blocks).to(module.device)
        self.caches = allocate_caches(plan.caches, groups * blocks, size, module.device)
        for tensor in (tensor for pair in self.caches for tensor in pair):
            tensor.view(torch.uint8).fill_(255)  # NaN in every float format, and as a scale

    def bound(self, length: int) -> Bound:
        """How far runs of these first tokens by the module may be apart."""
        sequences = [self.tokens[:length], self.tokens[:length].flip(0)]
        return Noise(dtypes_of(self._module), self._alone, sequences).bound()

    def _alone(self, ids: Tensor) -> Tensor:
        return torch.stack([self.step(0, row) for row in ids])

    def step(
        self, start: int, tokens: Tensor, positions: Tensor | None = None, visible: Tensor | None = None
    ) -> Tensor:
        """Logits ``[n, V]`` of ``tokens [n]`` in the places from ``start`` on."""
        logits: Tensor = self._module(self.inputs(start, tokens, positions, visible), self.caches)
        return logits.float()

    def inputs(
        self, start: int, tokens: Tensor, positions: Tensor | None = None, visible: Tensor | None = None
    ) -> StepInputs:
        """The step of ``tokens [n]`` in the places from ``start`` on, all of whose logits are wanted."""
        device, size = self._module.device, self._module.plan.block_size
        places = torch.arange(start, start + len(tokens), device=device)
        return StepInputs(
            token_ids=tokens,
            positions=places if positions is None else positions.to(device),
            slot_mapping=self._tables[:, 0, places // size] * size + places % size,
            block_tables=self._tables,
            seq_lens=torch.tensor([start + len(tokens)], device=device),
            query_start=torch.tensor([0, len(tokens)], device=device),
            logits_index=torch.arange(len(tokens), device=device),
            tree_mask=None if visible is None else visible.to(device),
        )
