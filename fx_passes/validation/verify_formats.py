"""``verify-formats``: caches as they are stored, held to what their formats round in this very model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule

from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.fx_passes.lowering.insert_cache import PagedGraph
from kvpass.fx_passes.validation.bounds import Noise
from kvpass.fx_passes.validation.rounded_caches import RoundedCaches
from kvpass.fx_passes.validation.verify import (
    Run,
    dtypes_of,
    format_bound,
    most_of,
    row_errors,
    site_errors,
    verify,
)

NUDGE = 5e-7  # of a row's largest number: what kernels that sum in another order may differ by
TIMES = 3.0  # how many times what a nudge does to the logits kernels may do to them
SHARE = 0.01  # of the rows of a cache that may lose more than their format rounds: outliers beyond a chosen scale


@dataclass
class StoredComparison:
    """How far the graph is from the original with its caches as they are stored.

    Attributes:
        error: largest difference of logits, relative to the largest logit.
        loss: the same of the exact graph whose rows are rounded, which is what the format costs; None where blocks are
            rounded again after they were written, and this cannot be told.
        apart: largest difference between the two; that from the original where ``loss`` is None.
        tolerance: bound on ``apart``.
        unexplained: caches whose rows lose more than their format rounds.
        site_errors: largest difference of each attention's result.
    """

    error: float
    loss: float | None
    apart: float
    tolerance: float
    unexplained: list[str] = field(default_factory=list)
    site_errors: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Nothing differs but by what the formats round."""
        return self.apart <= self.tolerance and not self.unexplained


@torch.no_grad()
def verify_formats(
    original: Callable[[Tensor], Tensor],
    reference: GraphModule,
    exact: PagedGraph,
    paged: PagedGraph,
    module: PagedModule,
) -> StoredComparison:
    """Run the graph as it is stored, and the exact one with rounded rows, over the same steps.

    Args:
        original: the user's model: token ids ``[1, S]`` to logits ``[1, S, V]``.
        reference: from :func:`~kvpass.fx_passes.validation.verify.reference_graph`.
        exact: the graph with exact caches, rotations and scales included.
        paged: the graph as it is stored.
        module: that graph, bound.
    """
    if module.plan.settles:
        bound = format_bound(module.plan)
        found = verify(original, reference, paged, module, bound)
        worst = max(found.errors.values())
        return StoredComparison(worst, None, worst, found.tolerance, [], found.site_errors)
    stored, ideal = Run(paged, module), Run(exact, PagedModule(exact))
    wanted = [original(ids.unsqueeze(0))[0].float() for ids in stored.sequences]
    scale = max(float(w.abs().max()) for w in wanted) or 1.0
    nudged = Run(exact, PagedModule(exact))
    rounding = RoundedCaches(ideal.caches, module.plan.caches)
    with rounding:
        expected = ideal.steps()
    with RoundedCaches(nudged.caches, module.plan.caches, NUDGE):
        otherwise = nudged.steps()
    errors, losses, apart, moved = [], [], [], []
    for piece, rounded, other in zip(stored.steps(), expected, otherwise, strict=True):
        _, index, places, logits = piece
        errors.append(row_errors(logits, wanted[index][places], scale))
        losses.append(row_errors(rounded[3], wanted[index][places], scale))
        apart.append(row_errors(logits, rounded[3].float(), scale))
        moved.append(row_errors(other[3], rounded[3].float(), scale))
    noise = Noise(dtypes_of(module), original, stored.sequences).bound()
    parts = (errors, losses, apart, moved)
    error, loss, between, edges = (most_of(torch.cat(rows), noise.share) for rows in parts)
    wide = [name for name, (more, rows) in rounding.unexplained.items() if more > SHARE * rows]
    sites = site_errors(stored, reference, paged)
    return StoredComparison(error, loss, between, max(noise.tolerance, TIMES * edges), wide, sites)
