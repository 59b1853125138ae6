"""Attention whose keys and values come from something narrower, in one forward: one site for each spelling."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.decoders.positions import rotary_angles, rotate_halves
from tests.fx_passes.drawn_weights import DrawnWeights, Weight

WIDTH, HEADS, PLAIN, ROTARY, VALUE, LATENT, OTHER = 24, 4, 8, 4, 6, 12, 10
WIDEST = PLAIN + ROTARY + LATENT + 3


@dataclass(frozen=True)
class Token:
    """What a spelling starts from.

    Attributes:
        x: hidden state `[B, S, WIDTH]`.
        c: a normed latent vector `[B, S, LATENT]`.
        other: a second one, `[B, S, 2 * OTHER]`.
        turned: rotated parts of keys `[B, HEADS, S, ROTARY]`.
        w: draws a weight of a shape.
    """

    x: Tensor
    c: Tensor
    other: Tensor
    turned: Tensor
    w: Weight

    @property
    def shared(self) -> Tensor:
        """One rotated part for all heads."""
        return self.turned[:, :1].expand(-1, HEADS, -1, -1)


Spelling = Callable[[Token], tuple[Tensor, Tensor]]
Attend = Callable[[Tensor, Tensor, Tensor, Weight], Tensor]


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    """`[B, S, count * D]` -> `[B, count, S, D]`."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def with_rotary(t: Token, k: Tensor) -> Tensor:
    return torch.cat([k, t.turned[:, :1].expand(-1, k.size(1), -1, -1)], -1)


def plain(t: Token) -> tuple[Tensor, Tensor]:
    return heads(t.c @ t.w(LATENT, HEADS * PLAIN)), heads(t.c @ t.w(LATENT, HEADS * VALUE))


def fused(t: Token) -> tuple[Tensor, Tensor]:
    k, v = heads(F.linear(t.c, t.w(HEADS * (PLAIN + VALUE), LATENT))).split([PLAIN, VALUE], -1)
    return with_rotary(t, k), v


def rotary_first(t: Token) -> tuple[Tensor, Tensor]:
    k, v = plain(t)
    return torch.cat([t.turned[:, 2:3].repeat(1, HEADS, 1, 1), k], -1), v


def fused_keys_then_values(t: Token) -> tuple[Tensor, Tensor]:
    k, v = (t.c @ t.w(LATENT, HEADS * (PLAIN + VALUE))).split([HEADS * PLAIN, HEADS * VALUE], -1)
    return with_rotary(t, heads(k)), heads(v)


def biased(t: Token) -> tuple[Tensor, Tensor]:
    k = F.linear(t.c, t.w(HEADS * PLAIN, LATENT), t.w(HEADS * PLAIN))
    v = torch.addmm(t.w(HEADS * VALUE), t.c.flatten(0, 1), t.w(LATENT, HEADS * VALUE), beta=2, alpha=3)
    return with_rotary(t, heads(k)), heads(v.view(*t.c.shape[:2], -1))


def einsum_by_head(t: Token) -> tuple[Tensor, Tensor]:
    k = torch.einsum("bsl,hdl->bhsd", t.c, t.w(HEADS, PLAIN, LATENT))
    return with_rotary(t, k), torch.einsum("bsl,lhd->bhsd", t.c, t.w(LATENT, HEADS, VALUE))


def matmul_by_head(t: Token) -> tuple[Tensor, Tensor]:
    c = t.c[:, None]
    return with_rotary(t, c @ t.w(HEADS, LATENT, PLAIN)), torch.matmul(c, t.w(HEADS, VALUE, LATENT).mT)


def weights_times_tokens(t: Token) -> tuple[Tensor, Tensor]:
    c = t.c.transpose(1, 2)
    k, v = t.w(HEADS * PLAIN, LATENT) @ c, t.w(HEADS * VALUE, LATENT) @ c
    return with_rotary(t, k.unflatten(1, (HEADS, -1)).mT), v.unflatten(1, (HEADS, -1)).mT


def heads_innermost(t: Token) -> tuple[Tensor, Tensor]:
    k, v = ((t.c @ t.w(LATENT, n * HEADS)).unflatten(-1, (n, HEADS)).permute(0, 3, 1, 2) for n in (PLAIN, VALUE))
    return with_rotary(t, k), v


def scaled_and_shifted(t: Token) -> tuple[Tensor, Tensor]:
    k, v = plain(t)
    k = k * t.w(HEADS, 1, 1) * 0.5
    v = (t.w(VALUE) - v / (2 + t.w(HEADS, 1, VALUE) ** 2)) * 3 + t.w(1)
    return with_rotary(t, -k), v


def in_two_steps(t: Token) -> tuple[Tensor, Tensor]:
    c = t.c @ t.w(LATENT, 20) + t.w(20)
    return with_rotary(t, heads(c @ t.w(20, HEADS * PLAIN))), heads(c @ t.w(20, HEADS * VALUE))


def latents_of_their_own(t: Token) -> tuple[Tensor, Tensor]:
    return with_rotary(t, plain(t)[0]), heads(t.other[..., :OTHER] @ t.w(OTHER, HEADS * VALUE))


def a_latent_for_two_heads(t: Token) -> tuple[Tensor, Tensor]:
    c = heads(t.other, 2)[:, :, None]  # [B, 2, 1, S, OTHER]
    k, v = c @ t.w(2, 2, OTHER, PLAIN), c @ t.w(2, 2, OTHER, VALUE)
    return k.flatten(1, 2), v.flatten(1, 2)


def values_from_a_part(t: Token) -> tuple[Tensor, Tensor]:
    return with_rotary(t, plain(t)[0]), heads(t.c[..., 3:] @ t.w(LATENT - 3, HEADS * VALUE))


def keys_from_a_part(t: Token) -> tuple[Tensor, Tensor]:
    return with_rotary(t, heads(t.c[..., :7] @ t.w(7, HEADS * PLAIN))), plain(t)[1]


def values_are_the_latent(t: Token) -> tuple[Tensor, Tensor]:
    return with_rotary(t, plain(t)[0]), t.c[:, None].expand(-1, HEADS, -1, -1)


def keys_of_two_maps(t: Token) -> tuple[Tensor, Tensor]:
    k, v = plain(t)
    more = heads(t.c[..., 2:] @ t.w(LATENT - 2, HEADS * 3))
    return torch.cat([k, t.shared, t.c[:, None].expand(-1, HEADS, -1, -1), more], -1), v


def grouped(t: Token) -> tuple[Tensor, Tensor]:
    k, v = heads(t.c @ t.w(LATENT, 2 * (PLAIN + VALUE)), 2).split([PLAIN, VALUE], -1)
    return with_rotary(t, k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)


def tiled(t: Token) -> tuple[Tensor, Tensor]:
    k, v = heads(t.c @ t.w(LATENT, 2 * (PLAIN + VALUE)), 2).split([PLAIN, VALUE], -1)
    return with_rotary(t, k * t.w(2, 1, PLAIN)).repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)


def heads_in_no_order(t: Token) -> tuple[Tensor, Tensor]:
    k, v = fused(t)
    order = torch.tensor([2, 0, 3, 1])
    return k[:, order], v[:, order]


def activated(t: Token) -> tuple[Tensor, Tensor]:
    k, v = fused(t)
    return k, F.gelu(v)


def scaled_by_position(t: Token) -> tuple[Tensor, Tensor]:
    k, v = plain(t)
    return k * torch.arange(1, t.x.size(1) + 1).to(k)[:, None] ** 0.5, v


def a_rotary_part_per_head(t: Token) -> tuple[Tensor, Tensor]:
    k, v = plain(t)
    return torch.cat([k, t.turned], -1), v


def squared(t: Token) -> tuple[Tensor, Tensor]:
    k, v = plain(t)
    return k * k, v + v


def of_the_hidden_state(t: Token) -> tuple[Tensor, Tensor]:
    return heads(t.x @ t.w(WIDTH, HEADS * PLAIN)), heads(t.x @ t.w(WIDTH, HEADS * VALUE))


def biased_keys(t: Token) -> tuple[Tensor, Tensor]:
    k, v = plain(t)
    return k + t.w(HEADS, 1, PLAIN), v


def biased_values(t: Token) -> tuple[Tensor, Tensor]:
    k, v = plain(t)
    return k, v + t.w(HEADS, 1, VALUE)


def rotated(t: Token) -> tuple[Tensor, Tensor]:
    return t.turned, heads(t.x @ t.w(WIDTH, HEADS * VALUE))


ABSORBED = (1, LATENT + ROTARY, 0)
# spelling: stored heads, entries of a key row, entries of a value row (0: they are part of the keys)
LATENTS: dict[Spelling, tuple[int, int, int]] = {
    plain: (1, LATENT, 0),
    fused: ABSORBED,
    rotary_first: ABSORBED,
    fused_keys_then_values: ABSORBED,
    biased: ABSORBED,
    einsum_by_head: ABSORBED,
    matmul_by_head: ABSORBED,
    weights_times_tokens: ABSORBED,
    heads_innermost: ABSORBED,
    scaled_and_shifted: ABSORBED,
    in_two_steps: ABSORBED,
    latents_of_their_own: (1, LATENT + ROTARY, OTHER),
    a_latent_for_two_heads: (2, OTHER, 0),
    values_from_a_part: ABSORBED,
    keys_from_a_part: ABSORBED,
    values_are_the_latent: ABSORBED,
    keys_of_two_maps: ABSORBED,
    grouped: ABSORBED,
    tiled: ABSORBED,
    heads_in_no_order: ABSORBED,
    # no linear map that all heads share
    activated: (HEADS, PLAIN + ROTARY, VALUE),
    scaled_by_position: (HEADS, PLAIN, VALUE),
    a_rotary_part_per_head: (HEADS, PLAIN + ROTARY, VALUE),
    squared: (HEADS, PLAIN, VALUE),
    # a map, but with more products than it saves bytes
    of_the_hidden_state: (HEADS, PLAIN, VALUE),
}


def causal(q: Tensor, k: Tensor, v: Tensor, w: Weight) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def softcapped(q: Tensor, k: Tensor, v: Tensor, w: Weight) -> Tensor:
    future = torch.ones(q.size(2), q.size(2), dtype=torch.bool).triu(1)
    return (2 * torch.tanh(q @ k.mT / 2)).masked_fill(future, -torch.inf).softmax(-1) @ v


def with_sinks(q: Tensor, k: Tensor, v: Tensor, w: Weight) -> Tensor:
    future = torch.ones(q.size(2), q.size(2), dtype=torch.bool).triu(1)
    scores = (q @ k.mT).masked_fill(future, -torch.inf)
    column = w(1, HEADS, 1, 1).expand(q.size(0), -1, q.size(2), -1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v


class LatentSites(DrawnWeights):
    """One attention for each spelling; `forward` gives the results of all of them side by side."""

    def __init__(self, spellings: Sequence[Spelling] = tuple(LATENTS), attend: Sequence[Attend] = (causal,)) -> None:
        self.sites = [(spelling, attend[i % len(attend)]) for i, spelling in enumerate(spellings)]
        super().__init__(WIDTH, spread=0.4)

    def compute(self, x: Tensor, weight: Weight) -> Tensor:
        x = F.layer_norm(x, (WIDTH,))
        cos, sin = rotary_angles(x.size(1), ROTARY, x.device)
        turned = rotate_halves(heads(x @ weight(WIDTH, HEADS * ROTARY)), cos, sin)
        c, other = (F.layer_norm(x @ weight(WIDTH, n), (n,)) for n in (LATENT, 2 * OTHER))
        token = Token(x, c, other, turned, weight)
        queries = heads(x @ weight(WIDTH, HEADS * WIDEST))
        outputs = []
        for spelling, attend in self.sites:
            k, v = spelling(token)
            outputs.append(attend(queries[..., : k.size(-1)], k, v, weight))
        merged = torch.cat(outputs, -1)
        return torch.cat([x, merged.transpose(1, 2).flatten(2)], -1)
