"""Attentions that no cache of keys and values reproduces: the mask looks ahead or depends on data, the scores on more
than a query and its keys.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.decoders.masks import Heads
from tests.decoders.scores import future
from tests.decoders.skeleton import DIM, HEAD_DIM, HEADS, VOCAB


def causal_scores(q: Tensor, k: Tensor, scale: float = HEAD_DIM**-0.5) -> Tensor:
    """Scaled scores `[B, H, S, S]`, -inf above the diagonal."""
    later = torch.ones(q.size(-2), q.size(-2), dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.transpose(-2, -1) * scale).masked_fill(later, -torch.inf)


class CausalHeads(Heads):
    """Sound causal attention, to stand beside what is at fault."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# --- the mask is not what it should be -----------------------------------------------------------------------------


class NoMask(Heads):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class NoMaskSoftmax(Heads):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) * HEAD_DIM**-0.5).softmax(-1) @ v


class OneAhead(Heads):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        visible = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).tril(diagonal=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


class OneAheadAfterTwenty(Heads):
    """Causal for short inputs; beyond 20 tokens each token sees the next one."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.size(2), device=q.device)
        visible = i[None, :] <= i[:, None] + (i[:, None] >= 20).long()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


class OneHeadAhead(Heads):
    """Three heads are causal, the last sees one token ahead."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.size(2), device=q.device)
        ahead = torch.tensor([0, 0, 0, 1], device=q.device)[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=i[None, :] <= i[:, None] + ahead)


class PrefixWithALiBi(Heads):
    """The first five tokens see one another, the farther off the fainter."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.size(2), device=q.device)
        seen, far = (i[None, :] <= i[:, None]) | (i[None, :] < 5), (i[None, :] - i[:, None]).abs()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.where(seen, -0.1 * far, -torch.inf))


class OnlyLater(Heads):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        visible = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).triu()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


class SoftMask(Heads):
    """-1000 instead of -inf: later tokens are faint, not hidden."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.full((q.size(2), q.size(2)), -1000.0, device=q.device).triu(1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class LengthDependentWindow(Heads):
    """The window is half of the length, so that an old token disappears as the sequence grows."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.size(2), device=q.device)
        distance = i[:, None] - i[None, :]
        visible = (distance >= 0) & (distance <= q.size(2) // 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


class MasksAToken(nn.Module):
    """A decoder whose attention skips padding, known by its token id."""

    PAD = 0

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        s = x.size(1)
        causal = torch.ones(s, s, dtype=torch.bool, device=x.device).triu(1)
        hidden = causal | (input_ids == self.PAD)[:, None, :] & ~torch.eye(s, dtype=torch.bool, device=x.device)
        hidden = hidden.repeat_interleave(HEADS, dim=0)
        return self.head(x + self.attention(x, x, x, attn_mask=hidden, need_weights=False)[0])


class MaskFromHiddenState(Heads):
    """A mask computed from the states: keys with a negative first channel are skipped."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        skipped = (k[..., 0] < 0).unsqueeze(-2) & ~torch.eye(k.size(2), dtype=torch.bool, device=k.device)
        return causal_scores(q, k).masked_fill(skipped, -torch.inf).softmax(-1) @ v


class ChosenKeys(Heads):
    """Each query keeps the keys whose score comes near the best."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = causal_scores(q, k)
        best = scores.topk(1, dim=-1).values
        return scores.masked_fill(scores < best - 1, -torch.inf).softmax(-1) @ v


# --- the scores are not those of one query and its keys ------------------------------------------------------------


class SoftmaxOverQueries(Heads):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_scores(q, k).softmax(dim=-2) @ v


class ScaleByLength(Heads):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_scores(q, k, scale=2.0 / q.size(2)).softmax(-1) @ v


class LogLengthScale(Heads):
    """Queries scaled by the logarithm of the whole length, so that every old output changes with each token."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q * math.log(q.size(2) + 1), k, v, is_causal=True)


class TalkingHeads(Heads):
    """Scores mixed across heads before the softmax (arXiv:2003.02436)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhqk,hg->bgqk", q @ k.transpose(-2, -1) * HEAD_DIM**-0.5, self.mix)
        later = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


class FlippedKeys(Heads):
    """Keys and values in reverse order of time, under a causal mask: the future comes first."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k.flip(2), v.flip(2), is_causal=True)


class ShiftedKeys(Heads):
    """Keys of the token before: causal still, but a key is no longer the token's own."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, F.pad(k[:, :, :-1], (0, 0, 1, 0)), v, is_causal=True)


class EverySecondKey(Heads):
    """Only the tokens at even positions serve as keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.size(2), device=q.device)
        visible = i[None, ::2] <= i[:, None]
        return F.scaled_dot_product_attention(q, k[:, :, ::2], v[:, :, ::2], attn_mask=visible)


class AcrossTheBatch(nn.Module):
    """nn.MultiheadAttention with batch_first forgotten: rows of the batch attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class LinearAttention(Heads):
    """Feature maps and a running sum of k v^T (arXiv:2006.16236)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.einsum("bhsd,bhse->bhsde", k, v).cumsum(dim=2)
        norm = torch.einsum("bhsd,bhsd->bhs", q, k.cumsum(dim=2))
        return torch.einsum("bhsd,bhsde->bhse", q, state) / norm[..., None]


class NoSoftmax(Heads):
    """Causal scores through a ReLU, with no softmax at all."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.relu(causal_scores(q, k)) @ v


class DropoutLeftOn(Heads):
    """Attention dropout that does not know of eval mode."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(causal_scores(q, k).softmax(-1), p=0.1, training=True) @ v


class SinkOfTheWrongHead(Heads):
    """Heads before sequences in one dim, and the column of sinks repeated as if sequences came first."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.arange(HEADS).float()[:, None, None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, _, s, _ = q.shape
        q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))
        scores = torch.bmm(q, k.mT * HEAD_DIM**-0.5).masked_fill(future(s, q.device), -torch.inf)
        weights = torch.cat([self.sinks.repeat(b, 1, 1).expand(-1, s, 1), scores], -1).softmax(-1)[..., 1:]
        return torch.bmm(weights, v).unflatten(0, (-1, b)).transpose(0, 1)
