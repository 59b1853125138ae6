"""A model whose weights are drawn where they are first used: a spelling asks for what it needs, shape by shape."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fx_passes.tracing import VOCAB

Weight = Callable[..., Tensor]


class DrawnWeights(nn.Module):
    """An embedding, and whatever :meth:`compute` does with it, in float64.

    Args:
        width: of the embedding.
        spread: standard deviation of the weights.
    """

    def __init__(self, width: int, spread: float) -> None:
        super().__init__()
        self.spread = spread
        self.embed = nn.Parameter(self.draw(VOCAB, width))
        self.weights = nn.ParameterList()
        self.made = False
        with torch.no_grad():
            self(torch.zeros(1, 3, dtype=torch.int64))
        self.made = True

    @staticmethod
    def draw(*shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def forward(self, ids: Tensor) -> Tensor:
        pending = iter(self.weights)

        def weight(*shape: int) -> Tensor:
            if self.made:
                return next(pending)
            self.weights.append(nn.Parameter(self.draw(*shape, seed=len(self.weights) + 1) * self.spread))
            return self.weights[-1]

        return self.compute(F.embedding(ids, self.embed), weight)

    def compute(self, x: Tensor, weight: Weight) -> Tensor:
        """The output for embeddings ``x [B, S, width]``; ``weight`` gives the next weight, of a shape."""
        raise NotImplementedError
