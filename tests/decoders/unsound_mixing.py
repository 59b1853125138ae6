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


# --- the token axis under another name -----------------------------------------------------------------------------


class ShiftedByIndex(nn.Module):
    """The token before, fetched by an index."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, (torch.arange(x.size(1), device=x.device) - 1).clamp(min=0)]


class ViewInsteadOfTranspose(nn.Module):
    """`view` where `transpose` was meant: channels of one token land among those of another."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, e = x.shape
        return x.contiguous().view(b, e, s).transpose(1, 2)


class SlidingSum(nn.Module):
    """Windows of three tokens by `unfold`, summed."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1).sum(-1)


class GroupNormOverTime(nn.Module):
    """GroupNorm on channels-first tensors takes its mean over the tokens as well."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class UnitLengthOverTime(nn.Module):
    """`F.normalize` with its default dim, which is the token axis here."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x)


class SoftmaxOverTime(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.softmax(dim=1)


class LargestSoFar(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cummax(dim=1).values


class LargestOfAll(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.amax(dim=1, keepdim=True)


class SortedTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(dim=1).values


class FourierOverTime(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x, dim=1).real


class PooledTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool1d(F.pad(x.transpose(1, 2), (2, 0)), 3, stride=1).transpose(1, 2)


class ExpertsChooseTokens(nn.Module):
    """Each expert takes the token with its highest score in the sequence (arXiv:2202.09368)."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, 4)
        self.experts = nn.Parameter(torch.zeros(4, DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        weights = scores.softmax(-1) * (scores >= scores.topk(1, dim=1).values)
        return torch.einsum("bse,nef,bsn->bsf", x, self.experts, weights)


class ExpertsWithCapacity(nn.Module):
    """An expert drops the tokens that come after its first eight in the batch (arXiv:2101.03961)."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, 4)
        self.experts = nn.Parameter(torch.zeros(4, DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, DIM)
        chosen = F.one_hot(self.router(tokens).argmax(-1), 4)
        kept = chosen * (chosen.cumsum(dim=0) <= 8)
        return torch.einsum("te,nef,tn->tf", tokens, self.experts, kept.to(x.dtype)).view_as(x)
