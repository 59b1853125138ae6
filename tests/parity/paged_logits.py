"""Logits straight from a paged module, with a pool of the test's own: no scheduler, no prefix cache, no sampling."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from kvpass.engine import Engine
from kvpass.kernels.formats import allocate_cache
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
