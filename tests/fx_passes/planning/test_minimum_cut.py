"""What is stored of a token: the least that keys and values follow from, found for every spelling, and no byte more."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvpass.config import CacheConfig
from kvpass.fx_passes.attention.canonical_attention import attention_sites
from kvpass.fx_passes.graph import CapturedGraph, arguments
from kvpass.fx_passes.planning.minimum_cut import entries_per_token, is_move, narrowest_cut
from kvpass.fx_passes.planning.plan_cache import GraphPlan
from kvpass.fx_passes.stages import plan, prove
from kvpass.kernels.formats.cache_formats import allocate_cache
from tests.fx_passes.tracing import VOCAB, captured

HEADS, DIM = 4, 6
Spread = Callable[[Tensor], Tensor]


class Sites(nn.Module):
    """One attention for each function that makes keys and values of heads `[B, S, n, DIM]`; all in one forward."""

    def __init__(self, makers: dict[str, tuple[int, Callable[[Tensor], tuple[Tensor, Tensor]]]]) -> None:
        super().__init__()
        width = HEADS * DIM
        self.embed, self.q = nn.Embedding(VOCAB, width), nn.Linear(width, width)
        self.makers = makers
        self.kv = nn.ModuleList(nn.Linear(width, 2 * heads * DIM) for heads, _ in makers.values())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for kv, (_, make) in zip(self.kv, self.makers.values(), strict=True):
            q = self.q(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
            k, v = make(kv(x))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + F.pad(out, (0, HEADS * DIM - out.size(-1)))  # values may be narrower
        return x


def grouped(spread: Spread, heads: int = 2) -> tuple[int, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    def make(kv: Tensor) -> tuple[Tensor, Tensor]:
        k, v = kv.unflatten(-1, (2, heads, DIM)).permute(2, 0, 3, 1, 4)
        return spread(k), spread(v)

    return heads, make


def tied(kv: Tensor) -> tuple[Tensor, Tensor]:
    k = kv.unflatten(-1, (2, HEADS, DIM))[:, :, 0].transpose(1, 2)
    return k, k


def latent(kv: Tensor) -> tuple[Tensor, Tensor]:
    """Keys are heads of their own beside one part that all heads share; values are the first part."""
    plain, shared = kv[..., : HEADS * 4].unflatten(-1, (HEADS, 4)).transpose(1, 2), kv[..., None, -2:].transpose(1, 2)
    return torch.cat([plain, shared.expand(-1, HEADS, -1, -1)], -1), plain


EVERY = torch.tensor([0, 0, 1, 1])
GROUPS = torch.eye(2).repeat_interleave(2, dim=0)
SPELLINGS = {
    "repeat_interleave": grouped(lambda t: t.repeat_interleave(2, dim=1)),
    "expand and reshape": grouped(lambda t: t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(t.size(0), 4, -1, DIM)),
    "stack and flatten": grouped(lambda t: torch.stack([t, t], 2).flatten(1, 2)),
    "cat of every head": grouped(lambda t: torch.cat([t[:, :1], t[:, :1], t[:, 1:], t[:, 1:]], 1)),
    "index": grouped(lambda t: t[:, EVERY]),
    "index_select": grouped(lambda t: t.index_select(1, EVERY)),
    "gather": grouped(lambda t: t.gather(1, EVERY[None, :, None, None].expand(t.size(0), -1, t.size(2), DIM))),
    "einsum with a matrix of groups": grouped(lambda t: torch.einsum("bgsd,hg->bhsd", t, GROUPS)),
    "einsum with ones": grouped(lambda t: torch.einsum("bgsd,r->bgrsd", t, torch.ones(2)).flatten(1, 2)),
    "times ones": grouped(lambda t: (t[:, :, None] * torch.ones(2, 1, 1)).flatten(1, 2)),
    "a matrix of groups, times heads": grouped(lambda t: (GROUPS @ t.transpose(1, 2)).transpose(1, 2)),
    "repeat of a new dim": grouped(lambda t: t.unsqueeze(2).repeat(1, 1, 2, 1, 1).flatten(1, 2)),
    "tiled": grouped(lambda t: t.repeat(1, 2, 1, 1)),
    "one head expanded": grouped(lambda t: t.expand(-1, HEADS, -1, -1), heads=1),
    "every head its own": grouped(lambda t: t, heads=HEADS),
    "groups of unequal size": grouped(lambda t: t[:, torch.tensor([0, 1, 1, 1])]),
    "keys are values": (HEADS, tied),
    "a part shared by all heads": (HEADS, latent),
}
# What is stored: heads, and the order of query heads where it is not the model's.
STORED = {
    "tiled": (2, (0, 2, 1, 3)),
    "one head expanded": (1, None),
    "every head its own": (4, None),
    "groups of unequal size": (4, None),
    "keys are values": (4, None),
    "a part shared by all heads": (4, None),
}


@dataclass
class Planned:
    graph: CapturedGraph
    plan: GraphPlan

    def site(self, name: str) -> int:
        return list(SPELLINGS).index(name)


def planned(model: nn.Module, **config: object) -> Planned:
    graph = captured(model)
    options = CacheConfig(**config)
    proof = prove(graph, options)
    assert proof.refusals == []
    return Planned(graph, plan(proof, options, VOCAB))


@pytest.fixture(scope="module")
def spelled() -> Planned:
    return planned(Sites(SPELLINGS))


@pytest.mark.sampled(18, 2)
@pytest.mark.parametrize("name", SPELLINGS)
def test_heads_are_stored_once_however_they_are_spread(spelled: Planned, name: str) -> None:
    site = spelled.plan.sites[spelled.site(name)]
    spec = spelled.plan.cache_plan.caches[site.cache]
    heads, order = STORED.get(name, (2, None))
    assert (spec.num_kv_heads, site.head_order) == (heads, order)


@pytest.mark.parametrize("name", SPELLINGS)
def test_keys_and_values_follow_from_the_row(spelled: Planned, name: str) -> None:
    """Reading the row's entries by the cut's maps gives what the attention reads, number for number."""
    site = spelled.plan.sites[spelled.site(name)]
    stored = spelled.plan.stored[site.cache]
    order = range(HEADS) if site.head_order is None else site.head_order
    group = HEADS // len(stored.key_places)
    named = arguments(site.node)
    cut = narrowest_cut(spelled.plan.inference, spelled.plan.evaluator, named["key"], named["value"])
    for part, places, full in (
        ("key", stored.key_places, cut.key_map),
        ("value", stored.value_places, cut.value_map),
    ):
        assert full.shape[0] == named[part].meta["val"].shape[1]
        repeat = HEADS // full.shape[0]
        for place, head in enumerate(order):
            assert torch.equal(places[place // group], full[head // repeat])


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("repeat_interleave", 2 * 2 * DIM),
        ("tiled", 2 * 2 * DIM),
        ("index", 2 * 2 * DIM),
        ("one head expanded", 2 * DIM),
        ("every head its own", 2 * HEADS * DIM),
        ("keys are values", HEADS * DIM),
        ("a part shared by all heads", HEADS * 4 + 2),
    ],
)
def test_the_row_holds_no_entry_twice(spelled: Planned, name: str, entries: int) -> None:
    assert spelled.plan.stored[spelled.plan.sites[spelled.site(name)].cache].width == entries


@pytest.mark.parametrize(
    ("name", "stored_heads"), [("every head its own", HEADS), ("index", 2), ("tiled", 2), ("one head expanded", 1)]
)
def test_bytes_per_token_are_those_of_the_allocated_tensors(spelled: Planned, name: str, stored_heads: int) -> None:
    spec = spelled.plan.cache_plan.caches[spelled.plan.sites[spelled.site(name)].cache]
    blocks, size = 3, 8
    pair = allocate_cache(spec, blocks, size, "cpu")
    held = sum(t.numel() * t.element_size() for t in pair)
    assert held == 2 * stored_heads * DIM * 4 * blocks * size  # keys and values, Hkv heads of D float32 numbers


class SharedAcrossLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = HEADS * DIM
        self.embed, self.k, self.v = nn.Embedding(VOCAB, width), nn.Linear(width, width), nn.Linear(width, width)
        self.q = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        k, v = (f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (self.k, self.v))
        for i, layer in enumerate(self.q):
            if i == 2:
                k, v = v, k  # the same numbers, but keys are now values
            q = layer(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x


def test_layers_that_read_the_same_share_one_cache() -> None:
    plan = planned(SharedAcrossLayers()).plan
    assert [site.cache for site in plan.sites] == [0, 0, 1]
    assert [len(spec.sites) for spec in plan.cache_plan.caches] == [2, 1]


class RandomMoves(nn.Module):
    """Keys and values by random moves from a few maps of the token, among them casts to a wider dtype."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, width = seed, HEADS * DIM
        self.embed, self.q = nn.Embedding(VOCAB, width), nn.Linear(width, width)
        self.maps = nn.ModuleList(nn.Linear(width, heads * DIM) for heads in (1, 2, 2, 4))

    def forward(self, ids: Tensor) -> Tensor:
        draw = random.Random(self.seed)
        x = self.embed(ids)
        pool = [f(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for f in self.maps]
        pool[1] = pool[1].bfloat16()
        for _ in range(4):
            a, b = draw.choice(pool), draw.choice(pool)
            pool.append(
                draw.choice(
                    [
                        lambda a=a, b=b: torch.cat([a.float(), b.float()], 1),
                        lambda a=a: a.repeat_interleave(2, dim=1),
                        lambda a=a: a[:, :1],
                        lambda a=a: a.flip(1),
                        lambda a=a, b=b: torch.cat([a[:, -1:].float(), b[:, :1].float()], 1),
                    ]
                )()
            )
        k, v = (self.four_heads(draw.choice(pool[4:])) for _ in range(2))
        q = self.q(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    @staticmethod
    def four_heads(t: Tensor) -> Tensor:
        t = t.float()
        return t[:, :HEADS] if t.size(1) >= HEADS else torch.cat([t] * HEADS, 1)[:, :HEADS]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("seed", range(6))
def test_no_cut_has_fewer_bytes(seed: int) -> None:
    """Against every cut of a small random graph of moves."""
    plan = planned(RandomMoves(seed)).plan
    inference = plan.inference
    (site,) = attention_sites(inference.captured)
    ends = {arguments(site)["key"], arguments(site)["value"]}
    reached, stack, leaves = set(), list(ends), set()
    while stack:
        node = stack.pop()
        if node in reached:
            continue
        reached.add(node)
        sources = [n for n in node.all_input_nodes if is_move(node) and inference.is_data(n)]
        stack += sources
        if not sources:
            leaves.add(node)
    weights = {n: entries_per_token(inference, n) * n.meta["val"].dtype.itemsize for n in reached}
    users = {n: [u for u in n.users if u in reached] for n in reached}

    def separates(cut: frozenset) -> bool:
        open_, seen = [n for n in leaves if n not in cut], set()
        while open_:
            node = open_.pop()
            if node in ends:
                return False
            seen.add(node)
            open_ += [u for u in users[node] if u not in cut and u not in seen]
        return True

    chosen = narrowest_cut(inference, plan.evaluator, *(arguments(site)[k] for k in ("key", "value")))
    cost = sum(weights[n] for n in chosen.nodes)
    assert separates(frozenset(chosen.nodes))
    cheap = [n for n in reached if weights[n] < cost]
    for size in range(1, 4):
        for cut in itertools.combinations(cheap, size):
            if sum(weights[n] for n in cut) < cost:
                assert not separates(frozenset(cut)), f"{cut} costs less than {chosen.nodes}"
