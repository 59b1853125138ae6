"""Facts of ops that are not torch's, as their owners declare them.

A declaration is no proof. The capture checks it by perturbing rows (:mod:`kvpass.fx_passes.capture.declarations`), and
the report names every op that was taken by declaration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch._ops import OpOverloadPacket

from kvpass.fx_passes.op_facts.facts import OpFacts


@dataclass(frozen=True)
class DeclaredFacts(OpFacts):
    """Facts of an op by declaration.

    Attributes:
        dims: dims of the operands that carry tokens which the op works along, counted from the end; every other dim is
            kept, and each row along it computed by itself.
        reference: computes the same from the same arguments, for the check; None where rows are perturbed alone.
    """

    dims: tuple[int, ...] = (-1,)
    reference: Callable[..., Any] | None = None


DECLARED: dict[OpOverloadPacket, DeclaredFacts] = {}
MEANINGS: dict[OpOverloadPacket, Callable[..., Any]] = {}  # functions in ATen ops that mean the same
