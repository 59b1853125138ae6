"""``calibrate``: the scales of the heads of fp8 caches, from the largest numbers that a run of the model writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kvpass.fx_passes.graph import arguments, is_call
from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.fx_passes.lowering.insert_cache import PagedGraph
from kvpass.fx_passes.lowering.prefix_steps import show_prefix
from kvpass.fx_passes.lowering.tree_steps import with_tree_mask
from kvpass.fx_passes.validation.verify import allowed_tokens, with_sites
from kvpass.kernels.formats.cache_formats import allocate_cache, find_format
from kvpass.types import CachePlan, StepInputs

MARGIN = 2.0  # how much larger than anything seen a number may be before it saturates; rounding up adds up to as much
LENGTH = 512


def calibration_ids(plan: CachePlan, device: torch.device) -> list[Tensor]:
    """Token ids to calibrate with where the caller has none: drawn at random, always the same."""
    length = min(LENGTH, plan.max_length or LENGTH)
    allowed = allowed_tokens(plan)
    drawn = torch.randint(0, len(allowed), (length,), generator=torch.Generator().manual_seed(0))
    return [allowed[drawn].to(device)]


@torch.no_grad()
def calibrate(exact: PagedGraph, plan: CachePlan, sequences: Sequence[Tensor]) -> dict[str, list[float]]:
    """Choose the scales of all heads that have one, and set them in the graph's buffers.

    A scale is the smallest power of two with which :data:`MARGIN` times the largest number seen fits the format.

    Args:
        exact: the graph with exact caches, whose scales are 1.
        plan: the caches as they will be stored.
        sequences: token ids ``[S]``, each run from its first token.

    Returns:
        the scales of the heads by the name of their buffer; empty when no format has any.
    """
    module = PagedModule(exact)
    rows = _written_rows(exact)
    if not rows:
        return {}
    observed = with_sites(exact.module, exact.module.graph, [node.name for node in rows.values()])
    if exact.plan.prefix:
        shown = with_tree_mask(observed)
        assert isinstance(shown, GraphModule), "such a graph was refused before"
        observed = shown
    largest = {name: torch.zeros(()) for name in rows}
    for ids in sequences:
        step = _whole_step(ids, exact.plan)
        if exact.plan.prefix:
            step = show_prefix(step, exact.plan.prefix)
        _, *written = observed(*module.arguments(step, _caches(exact.plan, len(ids), module.device)))
        for name, row in zip(rows, written, strict=True):
            largest[name] = torch.maximum(largest[name].to(row.device), row.abs().amax((0, 2)).float())
    chosen = {}
    for name, seen in largest.items():
        part, _, index = name.removeprefix("_scale_").split("_")
        spec = plan.caches[int(index)]
        most = find_format(spec.key_format if part == "key" else spec.value_format).largest
        assert most is not None, "only formats with a largest number have scales of heads"
        scale = torch.exp2(torch.ceil(torch.log2(seen * MARGIN / most)))
        scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
        buffer = exact.module.get_buffer(name)
        buffer.copy_(scale[:, None, None])
        chosen[name] = buffer.flatten().tolist()
    return chosen


def _written_rows(exact: PagedGraph) -> dict[str, Node]:
    """For each buffer of scales the node that is written to the cache, already divided by it (``[T, Hkv, D]``)."""
    found = {}
    for write in exact.module.graph.nodes:
        if not is_call(write, torch.ops.kvpass.write_cache, torch.ops.kvpass.norm_rotary_write):
            continue
        named = arguments(write)
        for row, cache in ((named[part], named[f"{part}_cache"]) for part in ("key", "value")):
            name = f"_scale_{cache.name}"
            if hasattr(exact.module, name):
                found[name] = row
    return found


def _whole_step(ids: Tensor, plan: CachePlan) -> StepInputs:
    """One sequence from its first token, in blocks that lie in order; caches of one group share nothing with others."""
    where, length = torch.arange(len(ids), device=ids.device), torch.tensor([len(ids)], device=ids.device)
    start = torch.tensor([0, len(ids)], device=ids.device)
    groups = len(plan.group_windows)
    slots, tables = where.expand(groups, -1), where.expand(groups, 1, -1)
    return StepInputs(ids, where, slots, tables, length, start, length - 1)


def _caches(plan: CachePlan, length: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    blocks = -(-length // plan.block_size)
    return [allocate_cache(spec, blocks, plan.block_size, device) for spec in plan.caches]
