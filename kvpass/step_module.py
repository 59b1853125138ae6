"""What the engine asks of whatever computes its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvpass.types import StepInputs


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
