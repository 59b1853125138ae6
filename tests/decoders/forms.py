"""What a model asks for and how it hands over its logits."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.decoders.positions import Attention
from tests.decoders.skeleton import DIM, MAX_LENGTH, VOCAB, Block, Decoder, GeluMLP, RMSNorm


class AsksForPositions(nn.Module):
    """`forward(input_ids, position_ids)`, both required."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, DIM)
        self.positions = nn.Embedding(MAX_LENGTH, DIM)
        self.blocks = nn.ModuleList(Block(Attention(), GeluMLP(DIM, 2 * DIM)) for _ in range(2))
        self.norm = RMSNorm(DIM)
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions(position_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class MayTakePositions(AsksForPositions):
    """`forward(input_ids, position_ids=None)`, an arange where none are given."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.size(1), device=input_ids.device).expand(input_ids.shape)
        return super().forward(input_ids, position_ids)


@dataclass
class Output:
    """What a research codebase returns."""

    logits: Tensor
    loss: Tensor | None = None


torch.utils._pytree.register_dataclass(Output)


class ReturnsObject(Decoder):
    """An object with `.logits`."""

    def forward(self, input_ids: Tensor) -> Output:
        return Output(logits=super().forward(input_ids))


class ReturnsDict(Decoder):
    """A dict with the key `logits`, among others."""

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        logits = super().forward(input_ids)
        return {"hidden": self.embed(input_ids), "logits": logits}


class ReturnsTuple(Decoder):
    """A tuple `(logits, loss)` as nanoGPT returns it."""

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = super().forward(input_ids)
        loss = None if targets is None else nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


class TheLastUnlessTraining(Decoder):
    """Logits of the last token alone, `[B, 1, V]`, unless there are targets; nanoGPT generates with that."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.embed(idx)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        if targets is None:
            return self.head(x[:, [-1], :]), None
        logits = self.head(x)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class OnlyTheLastWhenAsked(Decoder):
    """A keyword with a default that changes the output's shape, left alone."""

    def forward(self, input_ids: Tensor, last_only: bool = False) -> Tensor:
        logits = super().forward(input_ids)
        return logits[:, -1] if last_only else logits
