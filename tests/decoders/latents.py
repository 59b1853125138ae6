"""Keys and values of all heads computed from one narrow vector per token, in spellings of their own."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.decoders.positions import rotary_angles, rotate_halves
from tests.decoders.skeleton import DIM, HEAD_DIM, HEADS, RMSNorm

LATENT, ROTARY = 20, 8


class EinsumLatent(nn.Module):
    """Weights per head in einsums, queries of low rank, a norm on the latent, the rotary part first."""

    def __init__(self) -> None:
        super().__init__()
        self.q_down, self.q_norm = nn.Linear(DIM, 24, bias=False), RMSNorm(24)
        self.q_up = nn.Parameter(torch.empty(HEADS, ROTARY + HEAD_DIM, 24))
        self.down, self.norm = nn.Linear(DIM, ROTARY + LATENT, bias=False), RMSNorm(LATENT)
        self.k_up = nn.Parameter(torch.empty(HEADS, LATENT, HEAD_DIM))
        self.v_up = nn.Parameter(torch.empty(LATENT, HEADS, HEAD_DIM))
        self.o = nn.Parameter(torch.empty(HEADS, HEAD_DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        s = x.size(1)
        cos, sin = rotary_angles(s, ROTARY, x.device)
        turned, latent = self.down(x).tensor_split([ROTARY], dim=-1)
        latent = self.norm(latent)
        q = torch.einsum("bsr,hdr->bhsd", self.q_norm(self.q_down(x)), self.q_up)
        q = torch.cat([rotate_halves(q[..., :ROTARY], cos, sin), q[..., ROTARY:]], -1)
        k = torch.einsum("bsl,hld->bhsd", latent, self.k_up)
        k = torch.cat([rotate_halves(turned[:, None], cos, sin).repeat(1, HEADS, 1, 1), k], -1)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.size(-1) ** 0.5
        future = torch.full((s, s), float("-inf"), device=x.device).triu(1)
        weights = F.softmax(scores + future, dim=-1)
        out = torch.einsum("bhqk,bhkd->bqhd", weights, torch.einsum("bsl,lhd->bhsd", latent, self.v_up))
        return torch.einsum("bqhd,hde->bqe", out, self.o)


class TwoLatents(nn.Module):
    """Keys and values of latents of their own, with biases, a temperature per head and no rotary; two query heads each
    share keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.down = nn.Linear(DIM, 10 + 6)
        self.k_up, self.v_up = nn.Linear(10, 2 * HEAD_DIM), nn.Linear(6, 2 * HEAD_DIM)
        self.temperature = nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, HEADS, HEAD_DIM).transpose(1, 2)
        for_keys, for_values = F.silu(self.down(x)).split([10, 6], dim=-1)
        k = self.k_up(for_keys).view(b, s, 2, HEAD_DIM).transpose(1, 2) * self.temperature
        v = self.v_up(for_values).view(b, s, 2, HEAD_DIM).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(out.transpose(1, 2).reshape(b, s, DIM))
