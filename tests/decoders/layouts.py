"""Packed projections, torch's own attention modules, time-first tensors, scores the other way round."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.decoders.skeleton import DIM, HEAD_DIM, HEADS, MAX_LENGTH, VOCAB


class GPTAttention(nn.Module):
    """Packed QKV, and a tril buffer `[1, 1, L, L]` sliced to the length."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(DIM, 3 * DIM)
        self.c_proj = nn.Linear(DIM, DIM)
        tril = torch.tril(torch.ones(MAX_LENGTH, MAX_LENGTH))
        self.register_buffer("bias", tril.view(1, 1, MAX_LENGTH, MAX_LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        b, s, e = x.size()
        q, k, v = self.c_attn(x).split(DIM, dim=2)
        k = k.view(b, s, HEADS, e // HEADS).transpose(1, 2)
        q = q.view(b, s, HEADS, e // HEADS).transpose(1, 2)
        v = v.view(b, s, HEADS, e // HEADS).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :s, :s] == 0, float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, s, e))


class GPTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(DIM), GPTAttention(), nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TinyGPT(nn.Module):
    """GPT-2 as thousands of notebooks write it: learned positions, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, DIM)
        self.wpe = nn.Embedding(MAX_LENGTH, DIM)
        self.drop = nn.Dropout(0.1)
        self.h = nn.ModuleList([GPTBlock() for _ in range(2)])
        self.ln_f = nn.LayerNorm(DIM)
        self.lm_head = nn.Linear(DIM, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor) -> Tensor:
        _, s = idx.size()
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(0, s, dtype=torch.long, device=idx.device)))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class TorchAttention(nn.Module):
    """nn.MultiheadAttention, mask by generate_square_subsequent_mask."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1), device=x.device)
        return self.attention(x, x, x, attn_mask=mask, **self.options)[0]


class TorchEncoderLayers(nn.Module):
    """A stack of nn.TransformerEncoderLayer with a causal mask, post-norm or pre-norm."""

    def __init__(self, norm_first: bool, batch_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            DIM, HEADS, 2 * DIM, dropout=0.1, activation="gelu", batch_first=batch_first, norm_first=norm_first
        )
        self.batch_first = batch_first
        self.embed = nn.Embedding(VOCAB, DIM)
        self.positions = nn.Parameter(torch.zeros(MAX_LENGTH, DIM))
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.size(1), device=tokens.device)
        x = self.embed(tokens) * math.sqrt(DIM) + self.positions[: tokens.size(1)]
        if not self.batch_first:
            return self.head(self.encoder(x.transpose(0, 1), mask=mask, is_causal=True)).transpose(0, 1)
        return self.head(self.encoder(x, mask=mask, is_causal=True))


class TorchStack(nn.Module):
    """nn.TransformerEncoder or nn.TransformerDecoder with a mask and no hint of what it is; it looks at the values.

    Args:
        decoder: cross-attends to the embeddings, by the same mask.
        ahead: how many later tokens the mask shows; more than none is no decoder.
    """

    def __init__(self, decoder: bool, ahead: int = 0) -> None:
        super().__init__()
        options = {"dropout": 0.1, "batch_first": True}
        self.decoder, self.ahead = decoder, ahead
        self.embed = nn.Embedding(VOCAB, DIM)
        self.positions = nn.Parameter(torch.zeros(MAX_LENGTH, DIM))
        if decoder:
            self.stack = nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, HEADS, 2 * DIM, **options), 2)
        else:
            layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, **options)
            self.stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        s = tokens.size(1)
        mask = torch.full((s, s), -torch.inf, device=tokens.device).triu(1 + self.ahead)
        x = self.embed(tokens) * math.sqrt(DIM) + self.positions[:s]
        mixed = self.stack(x, x, tgt_mask=mask, memory_mask=mask) if self.decoder else self.stack(x, mask=mask)
        return self.head(mixed)


class TimeFirst(nn.Module):
    """[S, B, E] throughout, heads merged into the batch, bmm on [B * H, S, D]: fairseq's way."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.in_proj = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(2))
        self.out_proj = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        self.head = nn.Linear(DIM, VOCAB)

    def attend(self, x: Tensor, layer: int, mask: Tensor) -> Tensor:
        s, b, _ = x.shape
        q, k, v = self.in_proj[layer](x).chunk(3, dim=-1)
        q = (q * HEAD_DIM**-0.5).contiguous().view(s, b * HEADS, HEAD_DIM).transpose(0, 1)
        k = k.contiguous().view(s, b * HEADS, HEAD_DIM).transpose(0, 1)
        v = v.contiguous().view(s, b * HEADS, HEAD_DIM).transpose(0, 1)
        weights = torch.bmm(q, k.transpose(1, 2)) + mask.unsqueeze(0)
        out = torch.bmm(F.softmax(weights.float(), dim=-1).type_as(weights), v)
        return self.out_proj[layer](out.transpose(0, 1).contiguous().view(s, b, DIM))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).transpose(0, 1)
        mask = torch.triu(torch.zeros(x.size(0), x.size(0), device=x.device).fill_(float("-inf")), 1)
        for layer, norm in enumerate(self.norms):
            x = x + self.attend(norm(x), layer, mask)
        return self.head(x).transpose(0, 1)


class BaddbmmBatch(nn.Module):
    """Heads merged into the batch, the mask and the scale given to baddbmm; another adds a token's own values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        # [B, S, H, 3, D], as BLOOM and GPT-NeoX pack it: q, k, v side by side within a head
        q, k, v = (
            t.transpose(1, 2).reshape(b * HEADS, s, HEAD_DIM)
            for t in self.qkv(x).view(b, s, HEADS, 3, HEAD_DIM).unbind(3)
        )
        mask = torch.full((1, s, s), torch.finfo(x.dtype).min, device=x.device).triu(1).expand(b * HEADS, s, s)
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), beta=1.0, alpha=HEAD_DIM**-0.5)
        out = torch.baddbmm(v, scores.softmax(-1), v, beta=-0.25, alpha=3.0).view(b, HEADS, s, HEAD_DIM)
        return self.out(out.transpose(1, 2).reshape(b, s, DIM))


class KeysTimesQueries(nn.Module):
    """Scores as keys x queries: the softmax runs over dim -2, and the values are weighted from the left."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (proj(x).view(b, s, HEADS, HEAD_DIM).transpose(1, 2) for proj in (self.q, self.k, self.v))
        scores = k @ q.transpose(-1, -2) / math.sqrt(HEAD_DIM)
        later = torch.ones(s, s, dtype=torch.bool, device=x.device).tril(-1)
        weights = scores.masked_fill(later, -torch.inf).softmax(dim=-2)
        return self.o((weights.transpose(-1, -2) @ v).transpose(1, 2).reshape(b, s, DIM))


class ColumnsOfValues(nn.Module):
    """Channel-first tensors [B, H, D, S], as vision people write attention: einsum with the token axis last."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Conv1d(DIM, 3 * DIM, 1, bias=False)
        self.to_out = nn.Conv1d(DIM, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.to_qkv(x.transpose(1, 2)).view(b, 3, HEADS, HEAD_DIM, s).unbind(1)
        sim = torch.einsum("bhdi,bhdj->bhij", q * HEAD_DIM**-0.5, k)
        sim = sim.masked_fill(torch.ones(s, s, dtype=torch.bool, device=x.device).triu(1), -torch.finfo(sim.dtype).max)
        out = torch.einsum("bhij,bhdj->bhdi", sim.softmax(dim=-1), v)
        return self.to_out(out.reshape(b, DIM, s)).transpose(1, 2)
