"""Softmaxes and products that nobody wrote with `softmax` and `matmul`, and flex_attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.decoders.heads import GROUP, KV_HEADS, Grouped
from tests.decoders.masks import Heads
from tests.decoders.scores import future
from tests.decoders.skeleton import DIM, HEAD_DIM, HEADS, MAX_LENGTH, VOCAB


class SinkInTheSum(Heads):
    """A learned bias on the denominator: one more logit per head that no key and no value belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.ones(HEADS, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(future(q.size(2), q.device), -torch.inf)
        largest = torch.maximum(scores.amax(-1, keepdim=True), self.sinks)
        weights = (scores - largest).exp()
        return weights / (weights.sum(-1, keepdim=True) + (self.sinks - largest).exp()) @ v


class SinkOfMergedHeads(Heads):
    """Batch and heads in one dim, as `bmm` wants them: the column of sinks is repeated for every sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.ones(HEADS, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, _, s, _ = q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        scores = torch.bmm(q, k.mT * HEAD_DIM**-0.5).masked_fill(future(s, q.device), -torch.inf)
        column = self.sinks.repeat(b, 1, 1).expand(-1, s, 1)
        weights = torch.cat([column, scores], -1).softmax(-1)[..., 1:]
        return torch.bmm(weights, v).unflatten(0, (b, -1))


class SinkInTheSumOfMergedHeads(SinkOfMergedHeads):
    """The same column, whose exponential is added to the sum of the weights."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, _, s, _ = q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        weights = torch.bmm(q, k.mT * HEAD_DIM**-0.5).masked_fill(future(s, q.device), -torch.inf).exp()
        column = self.sinks.repeat(b, 1, 1).expand(-1, s, 1)
        return torch.bmm(weights / (weights.sum(-1, keepdim=True) + column.exp()), v).unflatten(0, (b, -1))


class LogSumExpByHand(Heads):
    """exp of scores less their log-sum-exp, itself written with max, exp, sum and log."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT / HEAD_DIM**0.5).masked_fill(future(q.size(2), q.device), -torch.inf)
        largest = scores.max(-1, keepdim=True).values
        total = largest + (scores - largest).exp().sum(-1, keepdim=True).log()
        return (scores - total).exp() @ v


class ElementwiseProducts(Heads):
    """No matrix product at all: broadcast, multiply, sum; the scale split over queries and keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q * HEAD_DIM**-0.25, k * HEAD_DIM**-0.25
        scores = (q[:, :, :, None] * k[:, :, None]).sum(-1)
        weights = torch.where(future(q.size(2), q.device), -torch.inf, scores).softmax(-1)
        return (weights[..., None] * v[:, :, None]).sum(dim=3)


class ZeroedAfterTheSoftmax(Heads):
    """Negative scores negated back, NaN and hidden weights set to zero once more after the softmax."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = future(q.size(2), q.device)
        scores = -(q @ k.mT * -(HEAD_DIM**-0.5))
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1).nan_to_num(0.0)
        return weights.masked_fill(hidden, 0.0) @ v


class HeadByHead(Heads):
    """Each head by itself in a Python loop, joined again."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = future(q.size(2), q.device)
        heads = []
        for i in range(HEADS):
            scores = torch.bmm(q[:, i], k[:, i].mT) / HEAD_DIM**0.5
            heads.append(torch.bmm(scores.masked_fill(hidden, -torch.inf).softmax(-1), v[:, i]))
        return torch.stack(heads, dim=1)


class FlexALiBi(Heads):
    """flex_attention: slopes from a buffer in score_mod, causal by mask_mod."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", torch.tensor([2.0 ** -(i + 1) for i in range(HEADS)]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slopes, s = self.slopes, q.size(2)

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score - slopes[h] * (i - j)

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return i >= j

        mask = create_block_mask(mask_mod, None, None, s, s, device=q.device.type)
        return flex_attention(q, k, v, score_mod=score_mod, block_mask=mask)


class FlexSoftcapGQA(Grouped):
    """flex_attention with grouped heads: a softcap, and a window of 9, both in score_mod."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            capped = 4.0 * torch.tanh(score / 4.0)
            return torch.where((i >= j) & (i - j < 9), capped, -torch.inf)

        assert q.size(1) == GROUP * KV_HEADS
        return flex_attention(q, k, v, score_mod=score_mod, scale=0.4, enable_gqa=True)


class TorchDecoderLayers(nn.Module):
    """nn.TransformerDecoderLayer as a decoder: its memory is the embedding, seen causally as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.positions = nn.Parameter(torch.zeros(MAX_LENGTH, DIM))
        layer = nn.TransformerDecoderLayer(DIM, HEADS, 2 * DIM, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, num_layers=1)
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        s = tokens.size(1)
        hidden = future(s, tokens.device)
        x = self.embed(tokens) + F.embedding(torch.arange(s, device=tokens.device), self.positions)
        return self.head(self.decoder(x, x, tgt_mask=hidden, memory_mask=hidden, tgt_is_causal=True))
