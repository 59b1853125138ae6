"""Decoders that know their padding token: without padding in a sequence they are plain decoders."""

import torch
from torch import Tensor, nn

from tests.decoders.positions import EmbeddedPositions
from tests.decoders.skeleton import DIM, HEAD_DIM, HEADS, MAX_LENGTH, VOCAB

PAD = 1


def without_padding(model: nn.Module) -> nn.Module:
    """The same model, which never gives the padding token: as a trained one."""
    head = model.head
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.bias[PAD] = -100.0
    return model


class CountsWithoutPadding(EmbeddedPositions):
    """Positions count the tokens that are no padding, from the row after the padding's own, as in fairseq."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, DIM, padding_idx=PAD)
        self.table = nn.Embedding(MAX_LENGTH + PAD + 1, DIM, padding_idx=PAD)
        without_padding(self)

    def position_vectors(self, input_ids: Tensor) -> Tensor:
        real = input_ids.ne(PAD).int()
        return self.table((torch.cumsum(real, dim=1).type_as(real) * real).long() + PAD)


class HidesPadding(nn.Module):
    """Keys of padding are hidden, whatever the causal mask says; the embeddings are scaled by whether they are real."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM, padding_idx=PAD)
        self.qkv = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(2))
        self.head = nn.Linear(DIM, VOCAB)
        without_padding(self)

    def forward(self, input_ids: Tensor) -> Tensor:
        padded = input_ids == PAD
        x = self.embed(input_ids) * padded.logical_not().unsqueeze(-1)
        s = x.size(1)
        future = torch.ones(s, s, dtype=torch.bool, device=x.device).triu(1)
        bias = torch.zeros(s, s, device=x.device).masked_fill(future, -torch.inf)
        bias = bias + padded[:, None, None, :] * torch.finfo(x.dtype).min
        for qkv in self.qkv:
            q, k, v = qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
            x = x + nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        return self.head(x)


class RealTokensOnly(EmbeddedPositions):
    """Positions count the tokens that are no separators, in a model that knows no padding."""

    SEPARATOR = 5

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(MAX_LENGTH, DIM)

    def position_vectors(self, input_ids: Tensor) -> Tensor:
        return self.table((input_ids != self.SEPARATOR).long().cumsum(1))
