"""What the rewrite did, site by site, and what it refused."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from kvpass.types import FoldedRotation, Refusal


@dataclass(frozen=True)
class SiteReport:
    """One attention site.

    Attributes:
        name: unique name, from the module path.
        module_path: module whose forward computes the attention.
        spelling: how the model wrote it: ``sdpa`` or ``softmax``.
        query_heads: Hq.
        kv_heads: heads that are stored, Hkv.
        key_dim: entries of a stored key row, D.
        value_dim: entries of a value row, Dv, where values are part of the keys as well.
        scale: factor of ``q.k``.
        softcap: bound of the scores, or None.
        sinks: whether the softmax has a sink per head.
        mask: meaning of the mask.
        evidence: how the meaning was established.
        cached: the nodes that are stored, with numbers per token; whether weights are absorbed, and whether values are
            part of the stored keys.
        cache: name of the cache; sites that share one have the same.
        format: storage formats of keys and values.
        bytes_per_token_before: keys and values as the attention op received them.
        bytes_per_token: what the cache stores; 0 for a site that reads another site's cache.
        error: largest difference of this site's output from the original graph's, over the largest magnitude; None
            when it was not verified. With caches in exact formats.
        format_error: the same with the caches in their own formats, where one of them is lossy; what earlier sites
            lost is in it.
    """

    name: str
    module_path: str
    spelling: str
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    softcap: float | None
    sinks: bool
    mask: str
    evidence: str
    cached: str
    cache: str
    format: str
    bytes_per_token_before: int
    bytes_per_token: int
    error: float | None = None
    format_error: float | None = None


@dataclass(frozen=True)
class Verification:
    """Figures of the translation validation.

    Attributes:
        passed: every check held.
        checks: one line per check: what was run and how far the logits are apart.
        logits_error: largest difference of logits, over the largest magnitude of the original's.
        tolerance: bound on ``logits_error``.
        history_effect: how much the logits change, on the same scale, when one token of the past is spoilt; a model
            for which this is 0 cannot be verified by its outputs.
        format_error: ``logits_error`` with the caches in their own formats, where one of them is lossy. The figures
            above are with exact formats, so that what the rewrite does and what a format loses are told apart.
        format_tolerance: bound on ``format_error``.
        format_loss: what rounding alone does to the logits: the exact graph with each row rounded as it is written.
            None where nothing is lossy, or blocks are rounded again after they were written.
    """

    passed: bool
    checks: tuple[str, ...]
    logits_error: float
    tolerance: float
    history_effect: float
    format_error: float | None = None
    format_tolerance: float | None = None
    format_loss: float | None = None


@dataclass(frozen=True)
class RewriteReport:
    """The result of the passes; prints as a table.

    Attributes:
        sites: the attention sites, in graph order.
        refusals: what could not be proven; a model with a refusal is not rewritten.
        verification: None when it was switched off or not reached.
        max_length: longest sequence for which the rewrite is proven; None means every length.
        max_length_reason: what limits it.
        forbidden_tokens: token ids that no sequence may contain; the rewrite is proven for sequences without them.
        seconds: time of each step.
        calls: calls in the captured graph, and in the graph of one paged step.
        launches: the same, without views and sizes.
        calibration: scales of the heads of fp8 caches, by cache and part.
        rotations: around int4 and k4v2 caches, each in the weights or, with the reason, in every step.
        derived_bytes: weights that rotations are part of, beside the model's own.
        declared: custom ops that were taken for what :func:`kvpass.declare_tokenwise` or
            :func:`kvpass.declare_meaning` says of them: checked on the model's tensors, not proven.
    """

    sites: tuple[SiteReport, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    verification: Verification | None = None
    max_length: int | None = None
    max_length_reason: str = ""
    forbidden_tokens: tuple[int, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    calls: tuple[int, int] | None = None
    launches: tuple[int, int] | None = None
    calibration: dict[str, list[float]] = field(default_factory=dict)
    rotations: tuple[FoldedRotation, ...] = ()
    derived_bytes: int = 0
    declared: tuple[str, ...] = ()

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in all caches."""
        return sum(site.bytes_per_token for site in self.sites)

    @property
    def bytes_per_token_before(self) -> int:
        """Bytes of keys and values as the attention ops received them, for one token."""
        return sum(site.bytes_per_token_before for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists, strings and numbers."""
        return {
            **asdict(self),
            "bytes_per_token": self.bytes_per_token,
            "bytes_per_token_before": self.bytes_per_token_before,
        }

    def __rich__(self) -> Group:
        parts: list[Any] = []
        if self.sites:
            parts.append(self._table())
            parts.append(Text(self._totals()))
            parts += [Text(line) for line in self._rotations()]
        if self.declared:
            parts.append(Text(f"declared, not proven: {', '.join(self.declared)}", style="yellow"))
        for refusal in self.refusals:
            parts.append(Text(f"refused by {refusal.pass_name}: {refusal}", style="bold red"))
        if self.verification is not None:
            style = "green" if self.verification.passed else "bold red"
            parts += [Text(check, style=style) for check in self.verification.checks]
        return Group(*parts)

    def __str__(self) -> str:
        target = io.StringIO()
        Console(file=target, width=160, no_color=True).print(self)
        return target.getvalue().rstrip()

    def _repr_html_(self) -> str:
        """For notebooks."""
        console = Console(file=io.StringIO(), width=160, record=True)
        console.print(self)
        return console.export_html(inline_styles=True, code_format='<pre style="line-height: normal">{code}</pre>')

    def _table(self) -> Table:
        table = Table(title="attention sites")
        for name in ("site", "spelling", "heads", "dims", "scale", "mask", "cached", "format", "B/token", "error"):
            table.add_column(name, overflow="fold")
        for site in self.sites:
            scale = f"{site.scale:.4g}" + (f", cap {site.softcap:g}" if site.softcap is not None else "")
            stored = f"{site.bytes_per_token_before} -> {site.bytes_per_token}"
            table.add_row(
                site.name,
                site.spelling,
                f"{site.query_heads}/{site.kv_heads}",
                f"{site.key_dim}" if site.key_dim == site.value_dim else f"{site.key_dim}, {site.value_dim}",
                scale,
                site.mask + (" + sinks" if site.sinks else ""),
                site.cached,
                site.format,
                stored,
                _errors(site),
            )
        return table

    def _totals(self) -> str:
        before, after = self.bytes_per_token_before, self.bytes_per_token
        times = f", {before / after:.2f}x less" if 0 < after < before else ""
        limit = (
            "any length" if self.max_length is None else f"up to {self.max_length} tokens ({self.max_length_reason})"
        )
        without = (
            f", without the token ids {', '.join(map(str, self.forbidden_tokens))}" if self.forbidden_tokens else ""
        )
        cache = f"cache: {after} bytes per token (attention received {before}{times}); sequences of {limit}{without}"
        if self.calls is None or self.launches is None:
            return cache
        calls, launches = (f"{first} -> {last}" for first, last in (self.calls, self.launches))
        return f"{cache}\ngraph: {calls} calls, {launches} of them computations"

    def _rotations(self) -> list[str]:
        """How many rotations are in the weights, and what keeps the others out, each reason once."""
        if not self.rotations:
            return []
        kept = [rotation for rotation in self.rotations if rotation.reason]
        folded = len(self.rotations) - len(kept)
        lines = [f"rotations: {folded} in weights of {self.derived_bytes} bytes, {len(kept)} in every step"]
        for role in dict.fromkeys(rotation.role for rotation in kept):
            first, *more = [rotation for rotation in kept if rotation.role == role]
            others = f", and {len(more)} like it" if more else ""
            lines.append(f"  {role} of {first.module_path or 'the model'}{others}: {first.reason}")
        return lines


def _errors(site: SiteReport) -> str:
    """The error of the rewrite, and that of the formats where they are lossy."""
    if site.error is None:
        return "-"
    return f"{site.error:.1e}" + ("" if site.format_error is None else f", {site.format_error:.1e} as stored")
