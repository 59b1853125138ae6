"""Rotary positions as long-context models scale them, and with more than one axis."""

import math

import torch
from torch import Tensor, nn

from tests.decoders.positions import causal_sdpa, rotate_halves
from tests.decoders.skeleton import DIM, HEAD_DIM, HEADS

HALF = HEAD_DIM // 2


def frequencies(base: float = 100.0) -> Tensor:
    """One for each pair of dims, `[D / 2]`."""
    return base ** (-torch.arange(HALF) / HALF)


class Rotated(nn.Module):
    """Attention with rotary queries and keys; `angles(x)` gives `[..., S, D / 2]`."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.out = nn.Linear(DIM, DIM, bias=False)

    def angles(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        angles = self.angles(x)
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos() * self.factor, angles.sin() * self.factor
        return self.out(causal_sdpa(rotate_halves(q, cos, sin), rotate_halves(k, cos, sin), v))


class Yarn(Rotated):
    """YaRN (arXiv:2309.00071): low frequencies interpolated by a ramp, and a temperature on both sides."""

    SCALE, ORIGINAL = 4.0, 16
    factor = 0.1 * math.log(SCALE) + 1.0

    def angles(self, x: Tensor) -> Tensor:
        rates = frequencies().to(x.device)
        turns = self.ORIGINAL * rates / (2 * math.pi)
        ramp = ((turns - 0.1) / (1.5 - 0.1)).clamp(0, 1)
        mixed = rates / self.SCALE * (1 - ramp) + rates * ramp
        return torch.arange(x.size(1), device=x.device)[:, None].float() * mixed


class ByPosition(Rotated):
    """Frequencies that change from a position on: a function of each token's own position."""

    SWITCH = 20

    def angles(self, x: Tensor) -> Tensor:
        position = torch.arange(x.size(1), device=x.device)[:, None]
        rates = torch.where(position < self.SWITCH, frequencies().to(x.device), frequencies(1000.0).to(x.device))
        return position * rates


class ThreeAxes(Rotated):
    """Positions in time, height and width, which text counts alike; a share of the frequencies for each."""

    SECTIONS = (3, 2, 1)

    def angles(self, x: Tensor) -> Tensor:
        position = torch.arange(x.size(1), device=x.device).view(1, 1, -1).expand(3, x.size(0), -1)
        rates = frequencies().to(x.device)[None, None, :, None].expand(3, x.size(0), -1, 1)
        angles = (rates @ position[:, :, None, :].float()).transpose(2, 3)
        parts = [part[i % 3] for i, part in enumerate(angles.split(self.SECTIONS, dim=-1))]
        return torch.cat(parts, dim=-1).unsqueeze(1)


class SwitchedByLength(Rotated):
    """Other frequencies for all tokens once the sequence is long: a key turned before does not turn again."""

    LONGEST = 20

    def angles(self, x: Tensor) -> Tensor:
        position = torch.arange(x.size(1), device=x.device)[:, None].float()
        length = position.amax() + 1
        rates = torch.where(length > self.LONGEST, frequencies(1000.0).to(x.device), frequencies().to(x.device))
        return position * rates


class StretchedByLength(Rotated):
    """Dynamic NTK: the base grows with the length of the sequence."""

    ORIGINAL = 16

    def angles(self, x: Tensor) -> Tensor:
        length = max(x.size(1), self.ORIGINAL)
        base = 100.0 * (2.0 * length / self.ORIGINAL - 1.0)
        rates = base ** (-torch.arange(HALF, device=x.device) / HALF)
        return torch.arange(x.size(1), device=x.device)[:, None] * rates
