"""A small model rewritten in float64, and what each of its attentions gives before and after."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kvpass.config import CacheConfig
from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.fx_passes.lowering.exact_formats import with_exact_formats
from kvpass.fx_passes.lowering.insert_cache import PagedGraph
from kvpass.fx_passes.planning.plan_cache import GraphPlan
from kvpass.fx_passes.stages import lower, plan, prove
from kvpass.fx_passes.validation.verify import reference_graph
from kvpass.types import StepInputs
from tests.fx_passes.tracing import VOCAB, captured

CONFIG = CacheConfig(dtype="float32", block_size=4)


@dataclass
class Rewritten:
    """A float64 model, rewritten; and what it and each attention give, in the original and in the rewritten graph."""

    model: nn.Module
    plan: GraphPlan
    paged: PagedGraph
    wanted: list[Tensor]
    got: list[Tensor]
    wanted_logits: Tensor
    got_logits: Tensor


def rewrite(model: nn.Module, config: CacheConfig, stored: str | None = None) -> Rewritten:
    """Run both graphs over 11 tokens, the rewritten one in steps of 6, 4 and 1; caches are float64 as well.

    With `stored` the graph is made for caches of that format, which are exact in that run nevertheless.
    """
    graph = captured(model)
    proof = prove(graph, config)
    assert proof.refusals == []
    planned = plan(proof, config, VOCAB)
    if stored is not None:
        planned = replace(planned, formats=((stored, stored),) * len(planned.formats))
    reference = reference_graph(graph, [site.node.name for site in planned.sites])
    ids = torch.arange(11) * 7 % VOCAB
    paged = lower(proof, planned)
    exact = with_exact_formats(paged, planned.cache_plan)
    module = PagedModule(exact)
    shapes = [
        ((3, s.num_kv_heads, 4, s.key_dim), (3, s.num_kv_heads, 4, s.value_dim)) for s in planned.cache_plan.caches
    ]
    caches = [tuple(torch.full(shape, float("nan"), dtype=torch.float64) for shape in pair) for pair in shapes]
    parts: list[list[Tensor]] = []
    with torch.no_grad():
        wanted = reference(ids[None])
        for start, end in ((0, 6), (6, 10), (10, 11)):
            where = torch.arange(start, end)
            counts = torch.tensor([0, end - start])
            step = StepInputs(
                ids[start:end],
                where,
                where[None],
                torch.arange(3)[None, None],
                torch.tensor([end]),
                counts,
                where - start,
            )
            parts.append(exact.observed(*module.arguments(step, caches)))
    logits, *sites = zip(*parts, strict=True)
    got = [torch.cat(site, 2) for site in sites]
    return Rewritten(model, planned, paged, list(wanted[1:]), got, wanted[0], torch.cat(logits, 1))
