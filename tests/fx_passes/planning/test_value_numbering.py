"""Heads that a checkpoint holds twice are stored once, and heads that differ by a single bit are not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.decoders.positions import rotary_angles, rotate_halves
from tests.fx_passes.paged_sites import CONFIG, Rewritten, rewrite
from tests.fx_passes.tracing import VOCAB

HEADS, DIM, WIDTH = 4, 6, 24


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def copied(weight: Tensor) -> Tensor:
    """Two heads, each written twice: `[HEADS * DIM, ...]`."""
    return weight.view(2, DIM, -1).repeat_interleave(2, 0).view(HEADS * DIM, -1)


def tiled(weight: Tensor) -> Tensor:
    return weight.view(2, DIM, -1).repeat(2, 1, 1).view(HEADS * DIM, -1)


def one_bit_apart(weight: Tensor) -> Tensor:
    spoilt = copied(weight)
    spoilt[DIM + 2, 5] = torch.nextafter(spoilt[DIM + 2, 5], torch.tensor(9.0).to(weight))
    return spoilt


class Head(nn.Module):
    """Keys with a norm of each head and rotary, values with a bias; heads may be copies."""

    def __init__(
        self,
        key: Callable[[Tensor], Tensor] = copied,
        value: Callable[[Tensor], Tensor] = copied,
        bias: Callable[[Tensor], Tensor] = copied,
        norm: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.k = nn.Parameter(key(draw(2 * DIM, WIDTH, seed=1)))
        self.v = nn.Parameter(value(draw(2 * DIM, WIDTH, seed=2)))
        self.bias = nn.Parameter(bias(draw(2 * DIM, 1, seed=3)).flatten())
        self.norm = nn.Parameter(draw(DIM, seed=4) if norm is None else norm)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        k = F.linear(x, self.k).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        k = k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + 1e-6) * self.norm
        v = F.linear(x, self.v, self.bias).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        return rotate_halves(k, cos, sin), v


class Tied(nn.Module):
    """Two projections with equal weights, and no rotary."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = (nn.Parameter(draw(HEADS * DIM, WIDTH, seed=5)) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (F.linear(x.sin(), w).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for w in (self.k, self.v))
        return k, v


# site: what makes its keys and values; stored heads, entries of a key row, of a value row; order of the query heads
SITES: dict[str, tuple[nn.Module, tuple[int, int, int], tuple[int, ...] | None]] = {
    "copied": (Head(), (2, DIM, DIM), None),
    "copied, again": (Head(), (2, DIM, DIM), None),
    "tiled": (Head(tiled, tiled, tiled), (2, DIM, DIM), (0, 2, 1, 3)),
    "values of their own": (Head(value=lambda w: torch.cat([w, -w])), (4, DIM, DIM), None),
    "keys one bit apart": (Head(one_bit_apart), (4, DIM, DIM), None),
    "values one bit apart": (Head(value=one_bit_apart), (4, DIM, DIM), None),
    "biases apart": (Head(bias=lambda w: torch.cat([w, w + 1])), (4, DIM, DIM), None),
    "norms apart": (Head(norm=draw(HEADS, 1, DIM, seed=6)), (4, DIM, DIM), None),
    "norms of a copy": (Head(norm=draw(2, 1, DIM, seed=6).repeat_interleave(2, 0)), (2, DIM, DIM), None),
    "keys and values of equal weights": (Tied(), (4, DIM, 0), None),
}


class Copies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q = nn.Parameter(draw(VOCAB, WIDTH, seed=7)), nn.Parameter(draw(WIDTH, WIDTH, seed=8))
        self.sites = nn.ModuleList(site for site, _, _ in SITES.values())

    def forward(self, ids: Tensor) -> Tensor:
        x = F.layer_norm(F.embedding(ids, self.embed), (WIDTH,))
        q = (x @ self.q).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        angles = rotary_angles(x.size(1), DIM, x.device)
        outputs = [F.scaled_dot_product_attention(q, *site(x, *angles), is_causal=True) for site in self.sites]
        return torch.cat([x, torch.cat(outputs, -1).transpose(1, 2).flatten(2)], -1)


@pytest.fixture(scope="module")
def rewritten() -> Rewritten:
    return rewrite(Copies(), CONFIG)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", SITES)
def test_copies_are_stored_once(rewritten: Rewritten, name: str) -> None:
    site = rewritten.plan.sites[list(SITES).index(name)]
    spec = rewritten.plan.cache_plan.caches[site.cache]
    _, shape, order = SITES[name]
    assert ((spec.num_kv_heads, spec.key_dim, spec.value_dim), site.head_order) == (shape, order)


@pytest.mark.parametrize("name", SITES)
def test_attention_gives_the_same(rewritten: Rewritten, name: str) -> None:
    site = list(SITES).index(name)
    torch.testing.assert_close(rewritten.got[site], rewritten.wanted[site], rtol=1e-11, atol=1e-11)


def test_layers_of_equal_weights_over_the_same_tokens_share_one_cache(rewritten: Rewritten) -> None:
    caches = dict(zip(SITES, (site.cache for site in rewritten.plan.sites), strict=True))
    assert caches["copied"] == caches["copied, again"] == caches["tiled"]
    assert len(set(caches.values())) == len(SITES) - 2
