"""What the engine asks of whatever computes its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from kvpass.config import CacheConfig
from kvpass.errors import ConfigError
from kvpass.types import HeavyHitters, StepInputs


class StepModule(Protocol):
    """What the engine needs of a paged module.

    One that takes steps with a tree mask and is no :class:`kvpass.PagedModule` has an attribute ``takes_trees``. One
    whose plan has recurrent states finds them in the step, and leaves them as they are after its tokens: see
    :attr:`kvpass.types.StepInputs.states`.
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


def weighing_module(module: StepModule, config: CacheConfig) -> WeighingModule | None:
    """The module, where the attention that blocks receive decides what is forgotten; None where it does not.

    Raises:
        ConfigError: if the module does not say what blocks receive.
    """
    if not isinstance(config.forgetting, HeavyHitters):
        return None
    if not callable(getattr(module, "forward_with_mass", None)):
        raise ConfigError(
            f"a {type(module).__name__} does not say how much attention blocks receive, as kvpass.HeavyHitters needs: "
            "give it forward_with_mass(step, caches), or forget by kvpass.AttentionSinks"
        )
    return cast("WeighingModule", module)
