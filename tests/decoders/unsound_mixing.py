"""Modules that mix tokens outside of attention, or make a token's value depend on the length, the batch or chance."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.decoders.skeleton import DIM


class CausalConvolution(nn.Module):
    """Depthwise, padded on both sides and cut to the length, as state-space models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(DIM, DIM, kernel_size=4, padding=3, groups=DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2))[..., : x.size(1)].transpose(1, 2)


class PaddedConvolution(nn.Module):
    """Padded by hand on the left."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(DIM, DIM, kernel_size=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


class CumulativeMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(dim=1) / torch.arange(1, x.size(1) + 1, device=x.device)[:, None]


class TokenShift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


class RolledTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, dims=1)


class Recurrence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(DIM, DIM, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


class MeanOfAllTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(dim=1, keepdim=True)


class NormOverTime(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(dim=1, keepdim=True)) / (x.var(dim=1, keepdim=True, unbiased=False) + 1e-5).sqrt()


class MeanOverBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0, keepdim=True)


class MixesByMatrix(nn.Module):
    """A causal matrix over time, learned in its first rows and columns: MLP-Mixer made causal."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(128, 128))

    def forward(self, x: Tensor) -> Tensor:
        s = x.size(1)
        return self.weight[:s, :s].tril() @ x


class NoisePerToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * torch.rand(x.size(0), x.size(1), 1, device=x.device)


class RelativePlace(nn.Module):
    """Positions from 0 to 1 over the whole length, so that each new token moves all the old ones."""

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.size(1), device=x.device) / x.size(1)
        return x + steps[:, None]


class CountsFromTheEnd(nn.Module):
    """A learned vector by the distance to the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(128, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(x.size(1) - 1 - torch.arange(x.size(1), device=x.device))


class KeepsState(nn.Module):
    """A running mean kept in a buffer from one call to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(DIM))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(dim=(0, 1)))
        return x - self.mean


class LastTokenEverywhere(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x[:, -1:]
