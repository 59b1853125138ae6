"""The report of each attention site, from the plan."""

from __future__ import annotations

from kvpass.fx_passes.dense import SPELLING
from kvpass.fx_passes.graph import CapturedGraph, arguments, module_path, shape_of
from kvpass.fx_passes.narrow_cut import entries_per_token
from kvpass.fx_passes.plan_cache import GraphPlan, SitePlan
from kvpass.kernels.formats import cache_bytes_per_token
from kvpass.report import SiteReport


def site_reports(captured: CapturedGraph, plan: GraphPlan) -> tuple[SiteReport, ...]:
    """One report for each attention site, in graph order. Call it before the caches are inserted."""
    first = {site.cache: site.name for site in reversed(plan.sites)}
    return tuple(_report(captured, plan, site, first[site.cache] == site.name) for site in plan.sites)


def _report(captured: CapturedGraph, plan: GraphPlan, site: SitePlan, owns_cache: bool) -> SiteReport:
    named = arguments(site.node)
    spec = plan.cache_plan.caches[site.cache]
    received = 0
    for operand in (named["key"], named["value"]):
        received += entries_per_token(plan.inference, operand) * operand.meta["val"].dtype.itemsize
    formats = {spec.key_format, spec.value_format}
    return SiteReport(
        name=site.name,
        module_path=module_path(site.node, captured),
        spelling=str(site.node.meta[SPELLING]),
        query_heads=int(shape_of(named["query"])[1]),
        kv_heads=spec.num_kv_heads,
        key_dim=spec.key_dim,
        value_dim=spec.value_dim,
        scale=float(named["scale"]),
        softcap=named["softcap"],
        sinks=named["sinks"] is not None,
        mask=site.mask.describe(),
        evidence=site.mask.evidence,
        cached=_cached(plan, site),
        cache=spec.name,
        format=formats.pop() if len(formats) == 1 else f"{spec.key_format}, {spec.value_format}",
        bytes_per_token_before=received,
        bytes_per_token=cache_bytes_per_token(spec) if owns_cache else 0,
    )


def _cached(plan: GraphPlan, site: SitePlan) -> str:
    """Nodes of the cut, each with how many numbers of a token it holds."""
    nodes = plan.stored[site.cache].cut.nodes
    return ", ".join(f"{node.name} [{entries_per_token(plan.inference, node)}]" for node in nodes)
