"""The whole way of a graph in four stages, which every user of the passes goes: prove, plan, lower, validate.

Each stage is an ordered tuple of passes and of the dialects that hold between them (:mod:`~kvpass.fx_passes.pipeline`).
The engine, a compiler backend and an exporter differ in what captured the graph and in what runs it, and not in what
happens in between.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvpass.config import CacheConfig
from kvpass.errors import ConfigError
from kvpass.fx_passes.attention.canonical_attention import attention_sites
from kvpass.fx_passes.attention.find_attention import FindAttention
from kvpass.fx_passes.canonical.assume_no_padding import AssumeNoPadding
from kvpass.fx_passes.canonical.canonicalize import Canonicalize
from kvpass.fx_passes.canonical.common_subexpressions import CommonSubexpressions
from kvpass.fx_passes.canonical.fold_sink_gates import FoldSinkGates
from kvpass.fx_passes.canonical.one_hot_products import OneHotProducts
from kvpass.fx_passes.capture.normalise_inputs import NormaliseInputs
from kvpass.fx_passes.dialects import CANONICAL, CAPTURED, DENSE, PAGED, PROVEN, TAKEN_IN
from kvpass.fx_passes.graph import CapturedGraph
from kvpass.fx_passes.lowering.insert_cache import InsertCache, PagedGraph, finished
from kvpass.fx_passes.lowering.select_logits import SelectLogits
from kvpass.fx_passes.lowering.store_in_formats import StoreInFormats
from kvpass.fx_passes.masks.read_masks import ReadMasks
from kvpass.fx_passes.optimization.clean_up import CleanUp
from kvpass.fx_passes.optimization.fold_rotations import FoldRotations
from kvpass.fx_passes.optimization.fuse_writes import FuseWrites
from kvpass.fx_passes.optimization.merge_projections import MergeProjections
from kvpass.fx_passes.optimization.step_graph import StepGraph
from kvpass.fx_passes.pipeline import Dialect, Pass, PassLog, Refused, run_passes
from kvpass.fx_passes.planning.plan_cache import (
    ChooseFormats,
    ChooseStorage,
    GraphPlan,
    GroupCaches,
    LimitLength,
    Planning,
)
from kvpass.fx_passes.token_axis.prove_token_axis import ProveTokenAxis
from kvpass.fx_passes.validation.checks import (
    CompareCapture,
    CompareFormats,
    CompareMass,
    CompareRewrite,
    Validation,
)
from kvpass.types import Refusal


@dataclass
class Proof:
    """A graph that was proven to treat tokens one by one outside of its attentions, or why it could not be.

    Attributes:
        captured: the canonical graph; every attention carries what its mask means.
        log: refusals, and the time of each pass.
    """

    captured: CapturedGraph
    log: PassLog = field(default_factory=PassLog)

    @property
    def refusals(self) -> list[Refusal]:
        """What could not be proven; nothing may be rewritten where there is anything."""
        return self.log.refusals


def prove_stage(config: CacheConfig) -> tuple[Pass[CapturedGraph] | Dialect, ...]:
    """The passes that prove a graph, in order."""
    return (
        CAPTURED,
        NormaliseInputs(),
        TAKEN_IN,
        Canonicalize(),
        CANONICAL,
        CommonSubexpressions(),
        OneHotProducts(),
        AssumeNoPadding(),
        FoldSinkGates(),
        FindAttention(),
        DENSE,
        CommonSubexpressions(),  # the masks that attentions came with are spelt out now
        ReadMasks(config.max_length),
        ProveTokenAxis(),
        PROVEN,
    )


PLAN_STAGE: tuple[Pass[Planning] | Dialect, ...] = (
    PROVEN,
    ChooseStorage(),
    ChooseFormats(),
    GroupCaches(),
    LimitLength(),
)


def lower_stage(fuse: bool, fold: bool) -> tuple[Pass[StepGraph] | Dialect, ...]:
    """The passes that make a planned graph the graph of one step, in order.

    Args:
        fuse: whether the device has a kernel for norm, rotation and write in one.
        fold: whether rotations may become part of weights.
    """
    return (
        InsertCache(),
        PAGED,
        SelectLogits(),
        StoreInFormats(),
        FoldRotations(fold),
        CleanUp(),
        MergeProjections(),
        FuseWrites(fuse),
    )


def prove(captured: CapturedGraph, config: CacheConfig | None = None) -> Proof:
    """Bring a captured graph to canonical form and prove it; the graph is rewritten in place.

    All passes are run though one refuses, so that the proof names everything that stands in the way.
    """
    log = run_passes(captured, prove_stage(config or CacheConfig()))
    if not log.refusals and not attention_sites(captured):
        reason = "no attention was found: there is nothing to cache"
        log.refusals.append(Refusal(reason, pass_name="find-attention"))
    return Proof(captured, log)


def plan(proof: Proof, config: CacheConfig, vocab_size: int) -> GraphPlan:
    """Decide what is stored of each attention, in which heads and format, and for how long sequences.

    Args:
        proof: without refusals.
        config: formats and block size.
        vocab_size: number of token ids.

    Raises:
        Refused: if the proof has refusals, or a pass fails.
        ConfigError: if the config asks for what the graph's caches cannot be.
    """
    if proof.refusals:
        raise Refused(proof.log)
    planning = Planning(proof.captured, config, vocab_size)
    if run_passes(planning, PLAN_STAGE, proof.log, (ConfigError,)).refusals:
        raise Refused(proof.log)
    return planning.finished()


def lower(proof: Proof, planned: GraphPlan, *, fuse: bool = False, fold: bool = True) -> PagedGraph:
    """Rewrite a planned graph to the graph of one step; the proof's graph is used up.

    Raises:
        Refused: if a pass fails, or leaves something that is no paged step.
    """
    state = StepGraph(proof.captured, planned, planned.cache_plan)
    if run_passes(state, lower_stage(fuse, fold), proof.log).refusals:
        raise Refused(proof.log)
    return finished(state)


VALIDATE_STAGE: tuple[Pass[Validation] | Dialect, ...] = (
    CompareRewrite(),
    CompareCapture(),
    CompareFormats(),
    CompareMass(),
)


def validate(found: Validation, log: PassLog) -> Validation:
    """Compare what was rewritten with the original; the errors are left in ``found``, the times in the log.

    Raises:
        Refused: if a comparison could not be made.
    """
    if run_passes(found, VALIDATE_STAGE, log).refusals:
        raise Refused(log)
    return found
