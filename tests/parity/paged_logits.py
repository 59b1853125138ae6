"""Logits straight from a paged module, with a pool of the test's own: no scheduler, no prefix cache, no sampling."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from kvpass.engine.engine import Engine
from kvpass.kernels.formats.cache_formats import allocate_cache
from kvpass.types import StepInputs

POISON = 1e4  # in every slot that was never written; NaN would spread through 0 * NaN of a masked key


def paged_logits(engine: Engine, prompts: list[list[int]], cuts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits `[S, V]` of every prompt, computed in the steps that `cuts` asks for.

    Args:
        engine: gives the module and the plan; its own caches are left alone.
        prompts: token ids.
        cuts: for each step, how many more tokens of each prompt it takes; together all tokens.
    """
    plan, device = engine.plan, engine.module.device
    size = plan.block_size
    tables = _scattered_tables([-(-len(prompt) // size) for prompt in prompts])
    num_blocks = int(tables.max()) + 1
    caches = [allocate_cache(spec, num_blocks, size, device) for spec in plan.caches]  # nothing shared between groups
    groups = len(plan.group_windows)
    for tensor in (tensor for pair in caches for tensor in pair):
        tensor.fill_(POISON)
    rows: list[list[Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    for step in cuts:
        taken = [number for number, count in enumerate(step) if count]
        spans = {number: range(done[number], done[number] + step[number]) for number in taken}
        positions = torch.cat([torch.tensor(list(span)) for span in spans.values()])
        owners = torch.cat([torch.full((len(span),), number) for number, span in spans.items()])
        starts = torch.tensor([0, *(len(span) for span in spans.values())]).cumsum(0)
        for number, span in spans.items():
            done[number] = span.stop
        inputs = StepInputs(
            token_ids=torch.tensor([prompts[number][i] for number, span in spans.items() for i in span]),
            positions=positions,
            slot_mapping=(tables[owners, positions // size] * size + positions % size).expand(groups, -1),
            block_tables=tables[taken].expand(groups, -1, -1),
            seq_lens=torch.tensor([done[number] for number in taken]),
            query_start=starts,
            logits_index=torch.arange(len(positions)),
        )
        with torch.no_grad():
            logits = engine.module(inputs, caches)
        for number, part in zip(taken, logits.split([len(span) for span in spans.values()]), strict=True):
            rows[number].append(part)
    assert done == [len(prompt) for prompt in prompts]
    return [torch.cat(parts) for parts in rows]


def tree_logits(engine: Engine, prompts: list[list[int]], nodes: list[int], parents: list[int]) -> list[Tensor]:
    """Logits of the last tokens of every prompt, computed in one step; the first has a tree of tokens behind it.

    Args:
        engine: as above.
        prompts: token ids; all but the last three of each, and but one of the first, are computed before.
        nodes: token of each node.
        parents: the node that each follows, -1 for the last token of the first prompt.

    Returns:
        `[1 + nodes, V]` of the first prompt, `[3, V]` of each other.
    """
    plan, device, size = engine.plan, engine.module.device, engine.plan.block_size
    room = [[*prompts[0], *nodes], *prompts[1:]]
    tables = _scattered_tables([-(-len(tokens) // size) for tokens in room])
    caches = [allocate_cache(spec, int(tables.max()) + 1, size, device) for spec in plan.caches]
    groups = len(plan.group_windows)
    for tensor in (tensor for pair in caches for tensor in pair):
        tensor.fill_(POISON)
    ancestors: list[list[int]] = []
    for node, parent in enumerate(parents):
        ancestors.append([node] if parent < 0 else [*ancestors[parent], node])
    before = [len(prompts[0]) - 1, *(len(prompt) - 3 for prompt in prompts[1:])]
    for spans in ([(0, stop) for stop in before], [(n, len(tokens)) for n, tokens in zip(before, room, strict=True)]):
        places = torch.cat([torch.arange(*span) for span in spans])
        owners = torch.cat([torch.full((stop - start,), number) for number, (start, stop) in enumerate(spans)])
        starts = torch.tensor([0, *(stop - start for start, stop in spans)]).cumsum(0)
        positions, mask = places.clone(), None
        if spans[0][0]:
            mask = torch.zeros(len(places), int(starts.diff().max()), dtype=torch.bool)
            for row, place in enumerate(places.tolist()):
                mask[row, : place - before[owners[row]] + 1] = True
            for node, path in enumerate(ancestors):
                positions[1 + node] = before[0] + len(path)
                mask[1 + node] = False
                mask[1 + node, [0, *(1 + ancestor for ancestor in path)]] = True
        inputs = StepInputs(
            token_ids=torch.tensor([room[n][i] for n, i in zip(owners.tolist(), places.tolist(), strict=True)]),
            positions=positions,
            slot_mapping=(tables[owners, places // size] * size + places % size).expand(groups, -1),
            block_tables=tables.expand(groups, -1, -1),
            seq_lens=torch.tensor([stop for _, stop in spans]),
            query_start=starts,
            logits_index=torch.arange(len(places)),
            tree_mask=mask,
        )
        with torch.no_grad():
            logits = engine.module(inputs, caches)
    return list(logits.split(starts.diff().tolist()))


def _scattered_tables(blocks_needed: list[int]) -> Tensor:
    """Block tables `[N, W]` of blocks in no order; entries past a sequence's end point at blocks of others."""
    total = sum(blocks_needed)
    order = random.Random(1).sample(range(total), total)
    tables = torch.tensor(
        [[order[(row + column) % total] for column in range(max(blocks_needed))] for row in range(len(blocks_needed))]
    )
    start = 0
    for row, needed in enumerate(blocks_needed):
        tables[row, :needed] = torch.tensor(order[start : start + needed])
        start += needed
    return tables
