"""What the engine asks of whatever computes its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvpass.errors import ConfigError, VerificationError
from kvpass.fx_passes.bind import PagedModule
from kvpass.fx_passes.verify_trees import verify_trees
from kvpass.report import RewriteReport
from kvpass.types import Refusal, StepInputs


class StepModule(Protocol):
    """What the engine needs of a paged module.

    One that takes steps with a tree mask and is no :class:`kvpass.PagedModule` has an attribute ``takes_trees``.
    """

    @property
    def device(self) -> torch.device:
        """Where the step's tensors and the caches have to be."""

    def __call__(self, step: StepInputs, caches: Sequence[tuple[Tensor, Tensor]], /) -> Tensor:
        """Write the caches of the step's tokens and return logits ``[R, V]``."""


class WeighingModule(StepModule, Protocol):
    """One that also says how much attention each block has received, for :class:`kvpass.HeavyHitters`."""

    def forward_with_mass(self, step: StepInputs, caches: Sequence[tuple[Tensor, Tensor]], /) -> tuple[Tensor, Tensor]:
        """Logits ``[R, V]``, and the attention that the entries of the block tables have received, ``[N, W]``."""


def check_trees(module: StepModule, report: RewriteReport) -> None:
    """Prove that a module computes the nodes of a tree as it computes sequences.

    Raises:
        ConfigError: if it takes no trees; names the reason.
        VerificationError: if it does, and the logits of a tree's paths differ from those of sequences.
    """
    if not isinstance(module, PagedModule):
        if not getattr(module, "takes_trees", False):
            raise ConfigError(f"a {type(module).__name__} takes no trees of drafts: give a drafter with branches=1")
        return
    if isinstance(module.tree_step, Refusal):
        raise ConfigError(f"this model takes no trees of drafts: {module.tree_step}; give a drafter with branches=1")
    found = verify_trees(module)
    if not found.passed:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in found.errors.items())
        raise VerificationError(
            f"trees of drafts give other logits than sequences, and are not used: {errors}, more than "
            f"{found.tolerance:.1e} of the largest",
            report,
        )
