"""What the stages of a random attention share: sizes, weights drawn on first use, and the shape of its scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Spec = dict[str, Any]
MAX_LENGTH = 96
WINDOW = 6


class Part(nn.Module):
    """A module whose weights come into being, seeded, when a stage first asks for them.

    Attributes:
        spec: what was chosen: a name for each stage, and the sizes.
        h, kv, d, dv, e: query heads, key/value heads, head widths of keys and of values, model width.
    """

    def __init__(self, spec: Spec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.h, self.kv, self.d, self.dv, self.e = (
            spec["heads"],
            spec["kv_heads"],
            spec["dim"],
            spec["value_dim"],
            width,
        )
        self.generator = torch.Generator().manual_seed(spec["seed"])

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.h // self.kv

    def weight(self, name: str, *shape: int, spread: float = 0.35, around: float = 0.0) -> Tensor:
        """A parameter of this name, drawn on first use."""
        name = f"w_{name}"
        if not hasattr(self, name):
            drawn = around + spread * torch.randn(shape, generator=self.generator)
            self.register_parameter(name, nn.Parameter(drawn))
        return getattr(self, name)

    def constant(self, name: str, value: Tensor) -> Tensor:
        """A buffer of this name, made on first use."""
        name = f"b_{name}"
        if not hasattr(self, name):
            self.register_buffer(name, value)
        return getattr(self, name)

    def made(self, name: str, module: nn.Module) -> nn.Module:
        """A submodule of this name, its weights drawn on first use."""
        name = f"m_{name}"
        if not hasattr(self, name):
            with torch.no_grad():
                for parameter in module.parameters():
                    noise = torch.randn(parameter.shape, generator=self.generator)
                    parameter.copy_(0.35 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
            self.add_module(name, module.eval())
        return getattr(self, name)


@dataclass
class Heads:
    """Queries `[B, H, S, D]`, keys `[B, Hkv, S, D]`, values `[B, Hkv, S, Dv]`, and the input they come from."""

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def length(self) -> int:
        return self.x.size(1)


@dataclass(frozen=True)
class Frame:
    """How scores are laid out.

    Attributes:
        keys: the dim of the keys.
        rank: number of dims.
        place: brings a mask or bias `[1 or H, S, S]` (query, then key) to the layout of the scores.
        seen: what the scores' queries may see, so placed.
    """

    keys: int
    rank: int
    place: Any
    seen: Tensor | None = None
