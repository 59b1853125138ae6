"""The passes, in order: a captured graph becomes a proven one, or a list of refusals."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvpass.config import CacheConfig
from kvpass.fx_passes.attention.canonical_attention import attention_sites
from kvpass.fx_passes.attention.find_attention import FindAttention
from kvpass.fx_passes.canonical.assume_no_padding import AssumeNoPadding
from kvpass.fx_passes.canonical.canonicalize import Canonicalize
from kvpass.fx_passes.canonical.common_subexpressions import CommonSubexpressions
from kvpass.fx_passes.canonical.fold_sink_gates import FoldSinkGates
from kvpass.fx_passes.canonical.one_hot_products import OneHotProducts
from kvpass.fx_passes.graph import CapturedGraph, PassResult
from kvpass.fx_passes.masks.read_masks import ReadMasks
from kvpass.fx_passes.token_axis.prove_token_axis import ProveTokenAxis
from kvpass.types import Refusal


class Pass(Protocol):
    """A frozen dataclass whose fields are its options."""

    @property
    def name(self) -> str:
        """Kebab-case name."""

    def apply(self, captured: CapturedGraph) -> PassResult:
        """Rewrite or check the graph; a second run changes nothing."""


def passes(config: CacheConfig) -> tuple[Pass, ...]:
    """The passes that prove a graph, in order."""
    return (
        Canonicalize(),
        CommonSubexpressions(),
        OneHotProducts(),
        AssumeNoPadding(),
        FoldSinkGates(),
        FindAttention(),
        CommonSubexpressions(),  # the masks that attentions came with are spelt out now
        ReadMasks(config.max_length),
        ProveTokenAxis(),
    )


@dataclass
class PassLog:
    """What a run of passes gave: refusals, seconds by pass, and what broke, if a pass did."""

    refusals: list[Refusal] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None


def run_passes(captured: CapturedGraph, ordered: Sequence[Pass]) -> PassLog:
    """Apply passes one after the other. All are run, so that a report names everything that stands in the way."""
    log = PassLog()
    for step in ordered:
        start = time.perf_counter()
        try:
            log.refusals += step.apply(captured).refusals
        except Exception as error:  # fail closed: what a pass cannot handle is not rewritten
            reason = f"the pass failed, which is a defect of kvpass worth a report: {type(error).__name__}: {error}"
            log.refusals.append(Refusal(reason, pass_name=step.name))
            log.error = error
            break
        log.seconds[step.name] = log.seconds.get(step.name, 0.0) + time.perf_counter() - start
    if not log.refusals and not attention_sites(captured):
        reason = "no attention was found: there is nothing to cache"
        log.refusals.append(Refusal(reason, pass_name="find-attention"))
    return log
