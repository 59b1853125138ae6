"""What stands around the attention: experts, parallel blocks, layers used twice, caches shared between layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.decoders.positions import Attention, causal_sdpa, rotary_angles, rotate_halves
from tests.decoders.skeleton import DIM, HEAD_DIM, HEADS, VOCAB, Block, GeluMLP, RMSNorm

EXPERTS, CHOSEN = 4, 2


class DenseExperts(nn.Module):
    """Every expert computed for every token, weighted by a softmax masked to the best two."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.zeros(EXPERTS, DIM, DIM))
        self.down = nn.Parameter(torch.zeros(EXPERTS, DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        smallest = scores.topk(CHOSEN, dim=-1).values[..., -1:]
        weights = scores.masked_fill(scores < smallest, -torch.inf).softmax(-1)
        hidden = F.silu(torch.einsum("bse,nef->bsnf", x, self.up))
        return torch.einsum("bsnf,nfe,bsn->bse", hidden, self.down, weights)


class LoopedExperts(nn.Module):
    """One expert after the other on the tokens that chose it: `torch.where`, gather, `index_add_`."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, EXPERTS, bias=False)
        self.experts = nn.ModuleList(GeluMLP(DIM, DIM) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        tokens = x.reshape(-1, d)
        weights, chosen = self.router(tokens).softmax(-1).topk(CHOSEN, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == number)
            out.index_add_(0, row, expert(tokens[row]) * weights[row, slot, None])
        return out.view(b, s, d)


class SquaredReluMLP(nn.Module):
    """Down of the square of a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, 3 * DIM, bias=False)
        self.down = nn.Linear(3 * DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


class MemorySlots(nn.Module):
    """Attention of each token to 16 learned slots: a softmax that mixes no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(DIM, DIM)
        self.keys = nn.Parameter(torch.zeros(16, DIM))
        self.values = nn.Parameter(torch.zeros(16, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.query(x) @ self.keys.T, dim=-1) @ self.values


class ParallelBlock(nn.Module):
    """GPT-J's block: attention and MLP read one norm and are added; interleaved rotary on 4 of 12 dims."""

    ROTARY = 4

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))
        self.mlp = GeluMLP(DIM, 2 * DIM)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary on `[B, S, H, D]` that pairs dim 2i with dim 2i + 1, on the first dims only."""
        turned, rest = x[..., : self.ROTARY], x[..., self.ROTARY :]
        rates = 10.0 ** -torch.arange(0, self.ROTARY, 2, device=x.device)
        angles = torch.arange(x.size(1), device=x.device)[:, None] * rates
        sin = angles.sin().repeat_interleave(2, dim=-1)[None, :, None, :]
        cos = angles.cos().repeat_interleave(2, dim=-1)[None, :, None, :]
        swapped = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
        return torch.cat([turned * cos + swapped * sin, rest], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (proj(h).unflatten(-1, (HEADS, HEAD_DIM)) for proj in (self.q, self.k, self.v))
        q, k = self.rotate(q).permute(0, 2, 1, 3), self.rotate(k).permute(0, 2, 1, 3)
        return x + self.o(causal_sdpa(q, k, v.permute(0, 2, 1, 3))) + self.mlp(h)


class ParallelDecoder(nn.Module):
    """Two parallel blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.Sequential(ParallelBlock(), ParallelBlock())
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(input_ids)))


class UniversalDecoder(nn.Module):
    """One block, run three times over with the input put in anew: three attention sites with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.block = Block(Attention(), GeluMLP(DIM, 2 * DIM))
        self.step = nn.Parameter(torch.zeros(3, DIM))
        self.norm = RMSNorm(DIM)
        self.head = nn.Parameter(torch.zeros(DIM, VOCAB))

    def forward(self, input_ids: Tensor) -> Tensor:
        first = x = self.embed(input_ids)
        for depth in range(3):
            x = self.block(self.norm(x) * 0.2 + first + self.step[depth])
        return self.norm(x) @ self.head


class CrossLayerSharing(nn.Module):
    """Layer 2 attends with its own queries to the keys and values of layer 1."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.kv = nn.Linear(DIM, 2 * DIM)
        self.q = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
        self.o = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
        self.mlp = nn.ModuleList(GeluMLP(DIM, 2 * DIM) for _ in range(2))
        self.norms = nn.ModuleList(RMSNorm(DIM) for _ in range(3))
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        cos, sin = rotary_angles(x.size(1), HEAD_DIM, x.device)
        k, v = (t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for t in self.kv(self.norms[0](x)).chunk(2, -1))
        k = rotate_halves(k, cos, sin)
        for norm, query, out, mlp in zip(self.norms[:2], self.q, self.o, self.mlp, strict=True):
            q = rotate_halves(query(norm(x)).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2), cos, sin)
            x = x + out(causal_sdpa(q, k, v))
            x = x + mlp(x)
        return self.head(self.norms[2](x))


class PostNormResidual(nn.Module):
    """Norms after each half, a learned mix of the embedding into every layer, logits soft-capped."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.attention = nn.ModuleList(Attention() for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(3))
        self.mix = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        first = x = self.norms[0](self.embed(input_ids))
        for mix, attention, norm in zip(self.mix, self.attention, self.norms, strict=True):
            x = norm(mix * x + (1 - mix) * first + attention(x))
        return 15 * torch.tanh(self.head(x) / 15)


class FirstValuesMixedIn(nn.Module):
    """Every layer's values are mixed with those of the first layer (arXiv:2410.17897)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.qkv = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(3))
        self.out = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))
        self.share = nn.Parameter(torch.full((3,), 0.5))
        self.norm = RMSNorm(DIM)
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x, first = self.embed(input_ids), None
        for qkv, out, share in zip(self.qkv, self.out, self.share, strict=True):
            q, k, v = qkv(self.norm(x)).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
            first = v if first is None else first
            x = x + out(causal_sdpa(q, k, torch.lerp(v, first, share)))
        return self.head(self.norm(x))


class TwoStreams(nn.Module):
    """Two residual streams `[B, 2, S, E]`, mixed by a small matrix around each block (arXiv:2409.19606)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList(Block(Attention(), GeluMLP(DIM, DIM)) for _ in range(2))
        self.mix = nn.Parameter(torch.zeros(2, 2, 2))
        self.read = nn.Parameter(torch.zeros(2, 2))
        self.norm = RMSNorm(DIM)
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        streams = self.embed(input_ids).unsqueeze(1).repeat(1, 2, 1, 1)
        for block, mix, read in zip(self.blocks, self.mix, self.read, strict=True):
            out = block(torch.einsum("i,bise->bse", 1 + read, streams))
            streams = streams + torch.einsum("ij,bjse->bise", mix, streams) + out.unsqueeze(1)
        return self.head(self.norm(streams.sum(dim=1)))


class BatchNormInEval(nn.Module):
    """BatchNorm over channels: in eval mode its statistics are constants, and tokens stay apart."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM)
        self.inner = GeluMLP(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(x.transpose(1, 2)).transpose(1, 2))
