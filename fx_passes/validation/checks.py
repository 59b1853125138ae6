"""The checks of the validation, each as a value: what was rewritten against the model that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from kvpass.fx_passes.graph import CapturedGraph, PassResult
from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.fx_passes.lowering.exact_formats import with_exact_formats
from kvpass.fx_passes.lowering.insert_cache import PagedGraph
from kvpass.fx_passes.validation.calibrate import calibrate, calibration_ids
from kvpass.fx_passes.validation.compare_capture import compare_capture
from kvpass.fx_passes.validation.verify import Comparison, verify
from kvpass.fx_passes.validation.verify_formats import StoredComparison, verify_formats
from kvpass.fx_passes.validation.verify_mass import verify_mass
from kvpass.types import CachePlan


@dataclass(frozen=True, eq=False)
class Oracle:
    """The model as its owner runs it, which has the last word.

    Attributes:
        model: token ids ``[B, S]`` to logits, in the rows that it returns.
        every_row: token ids ``[B, S]`` to logits ``[B, S, V]``.
        captured: its graph as it was captured, before any pass.
        reference: the canonical graph, which also gives what each attention does.
    """

    model: Callable[..., Tensor]
    every_row: Callable[..., Tensor]
    captured: CapturedGraph
    reference: GraphModule


@dataclass(eq=False)
class Validation:
    """A rewritten graph under test, and what was found.

    Attributes:
        oracle: what it is compared with.
        paged: the graph of one step.
        exact: the same with caches in exact formats.
        module: the graph of one step, bound.
        weighs: whether steps that give the attention mass are used.
        structure: how far the rewrite is from the original, caches exact; None before it was compared.
        formats: the same with caches in their own formats; None where these are exact.
        mass: how far steps that give the mass are from those that do not.
    """

    oracle: Oracle
    paged: PagedGraph
    exact: PagedGraph
    module: PagedModule
    weighs: bool = False
    structure: Comparison | None = None
    formats: StoredComparison | None = None
    mass: Comparison | None = None

    @property
    def captured(self) -> CapturedGraph:
        """The graph as it was captured."""
        return self.oracle.captured

    @property
    def passed(self) -> bool:
        """Whether everything that was compared so far held."""
        return all(found is None or found.passed for found in (self.structure, self.formats, self.mass))


@dataclass(frozen=True)
class CompareRewrite:
    """Run the rewritten graph, caches exact, against the original.

    Before: nothing compared.
    After: ``structure`` has the errors of prefill, chunks, decode, a shared prefix, and each attention.
    Requires: a bound graph.
    Refuses: nothing; errors beyond the bound are found here, and told by the front door.
    """

    name: str = "verify"

    def apply(self, state: Validation) -> PassResult:
        """One run of a ragged batch."""
        exact = state.exact
        state.structure = verify(state.oracle.every_row, state.oracle.reference, exact, PagedModule(exact))
        return PassResult()


@dataclass(frozen=True)
class CompareCapture:
    """Run the graph as it was captured against the original, on long and on peculiar texts.

    Before: ``structure``.
    After: the errors of the capture stand before the others.
    Requires: ``verify``, whose bound holds here too.
    Refuses: nothing.
    """

    name: str = "compare-capture"

    def apply(self, state: Validation) -> PassResult:
        """One run of each text."""
        assert state.structure is not None
        oracle = state.oracle
        state.structure = compare_capture(oracle.model, oracle.captured, state.exact.plan, state.structure)
        return PassResult()


@dataclass(frozen=True)
class CompareFormats:
    """Run the rewritten graph with its caches as they are stored, where a format is lossy.

    Before: ``structure`` passed; what did not is not worth it.
    After: ``formats`` says what the formats cost, and that nothing else does.
    Requires: ``compare-capture``.
    Refuses: nothing.
    """

    name: str = "verify-formats"

    def apply(self, state: Validation) -> PassResult:
        """One run of a ragged batch."""
        if state.paged is not state.exact and state.passed:
            oracle, paged = state.oracle, state.paged
            state.formats = verify_formats(oracle.every_row, oracle.reference, state.exact, paged, state.module)
        return PassResult()


@dataclass(frozen=True)
class CompareMass:
    """Run steps that give the attention mass against those that do not, where they are used.

    Before: everything else passed.
    After: ``mass`` has the errors.
    Requires: ``verify-formats``.
    Refuses: nothing.
    """

    name: str = "verify-mass"

    def apply(self, state: Validation) -> PassResult:
        """One sequence, in a chunk and by single tokens."""
        if state.weighs and state.passed:
            state.mass = verify_mass(state.module)
        return PassResult()


def in_exact_formats(
    paged: PagedGraph, planned: CachePlan, device: torch.device, examples: Tensor | None
) -> tuple[PagedGraph, dict[str, list[float]]]:
    """The graph with exact caches, and the scales that were chosen with it; itself where its caches are exact.

    Args:
        paged: the graph of one step.
        planned: its caches in exact formats.
        device: of the model.
        examples: token ids ``[B, S]`` to choose scales with; random ones where there are none.
    """
    if paged.plan == planned:
        return paged, {}
    exact = with_exact_formats(paged, planned)
    ids = calibration_ids(paged.plan, device) if examples is None else list(examples[:, : paged.plan.max_length])
    return exact, calibrate(exact, paged.plan, ids)
