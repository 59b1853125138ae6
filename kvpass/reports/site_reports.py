"""The report of each attention site, from the plan, and what the verification found."""

from __future__ import annotations

from dataclasses import replace

from kvpass.errors import VerificationError
from kvpass.fx_passes.attention.canonical_attention import SPELLING
from kvpass.fx_passes.graph import CapturedGraph, arguments, module_path, shape_of
from kvpass.fx_passes.planning.minimum_cut import entries_per_token
from kvpass.fx_passes.planning.plan_cache import GraphPlan, SitePlan
from kvpass.fx_passes.validation.checks import Validation
from kvpass.fx_passes.validation.verify import Comparison
from kvpass.fx_passes.validation.verify_formats import StoredComparison
from kvpass.kernels.formats.cache_formats import cache_bytes_per_token
from kvpass.report import RewriteReport, SiteReport, Verification


def site_reports(captured: CapturedGraph, plan: GraphPlan) -> tuple[SiteReport, ...]:
    """One report for each attention site, in graph order. Call it before the caches are inserted."""
    first = {site.cache: site.name for site in reversed(plan.sites)}
    return tuple(_report(captured, plan, site, first[site.cache] == site.name) for site in plan.sites)


def _report(captured: CapturedGraph, plan: GraphPlan, site: SitePlan, owns_cache: bool) -> SiteReport:
    named = arguments(site.node)
    key_format, value_format = plan.formats[site.cache]
    spec = replace(plan.cache_plan.caches[site.cache], key_format=key_format, value_format=value_format)
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
        value_dim=plan.stored[site.cache].value_places.shape[1],
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
    """Nodes of the cut, each with how many numbers of a token it holds, and how keys and values follow from them."""
    stored = plan.stored[site.cache]
    text = ", ".join(f"{node.name} [{entries_per_token(plan.inference, node)}]" for node in stored.nodes)
    absorbed = site.absorption is not None and site.absorption.has_weights
    notes = [*(["weights absorbed"] if absorbed else []), *(["values in the keys"] if stored.joint else [])]
    return text + (f" ({', '.join(notes)})" if notes else "")


def with_validation(report: RewriteReport, found: Validation) -> RewriteReport:
    """The report with what was compared; unchanged where nothing was.

    Raises:
        VerificationError: if something differs by more than it may; carries the report.
    """
    if found.structure is not None:
        report = with_verification(report, found.structure)
    if found.formats is not None:
        report = with_format_errors(report, found.formats)
    if report.verification is not None and not report.verification.passed:
        lines = "\n".join(report.verification.checks)
        raise VerificationError(f"the rewritten model differs from the original, and is not used:\n{lines}", report)
    if found.mass is not None and not found.mass.passed:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in found.mass.errors.items())
        raise VerificationError(f"steps that weigh attention differ from those that do not: {errors}", report)
    return report


def with_verification(report: RewriteReport, found: Comparison) -> RewriteReport:
    """The report with what the verification found, caches in exact formats."""
    worst = max(found.errors.values())
    checks = tuple(
        f"verified {name}: logits within {error:.1e} of the original's (bound {found.tolerance:.0e})"
        if error <= found.tolerance
        else f"FAILED {name}: logits differ by {error:.1e} (bound {found.tolerance:.0e})"
        for name, error in found.errors.items()
    )
    effect = f"spoiling the first token moves the last logits by {found.history_effect:.1e}"
    verification = Verification(found.passed, (*checks, effect), worst, found.tolerance, found.history_effect)
    sites = tuple(replace(site, error=found.site_errors[site.name]) for site in report.sites)
    return replace(report, sites=sites, verification=verification)


def with_format_errors(report: RewriteReport, found: StoredComparison) -> RewriteReport:
    """A verified report with what was measured once more, caches in their own lossy formats."""
    known = report.verification
    assert known is not None, "formats are measured after the verification with exact ones"
    line = _stored(found)
    verification = replace(
        known,
        passed=found.passed,
        checks=(*known.checks, line if found.passed else f"FAILED in these formats: {line}"),
        format_error=found.error,
        format_tolerance=found.tolerance if found.loss is None else found.loss + found.tolerance,
        format_loss=found.loss,
    )
    sites = tuple(replace(site, format_error=found.site_errors[site.name]) for site in report.sites)
    return replace(report, sites=sites, verification=verification)


def _stored(found: StoredComparison) -> str:
    if found.unexplained:
        return f"rows of {', '.join(found.unexplained)} lose more than their format rounds: choose one of more bits"
    if found.loss is None:
        figure = f"logits within {found.error:.1e} of the original's (bound {found.tolerance:.0e})"
        return f"measured with the caches as they are stored: {figure}"
    return (
        f"measured with the caches as they are stored: logits within {found.error:.1e} of the original's; "
        f"rounding alone gives {found.loss:.1e}, and they are within {found.apart:.1e} of that "
        f"(bound {found.tolerance:.0e})"
    )
