"""Norm, rotation and write become one op whatever their spelling, and only where they are what the op computes."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvpass.config import CacheConfig
from kvpass.fx_passes.graph import arguments, is_call
from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.fx_passes.lowering.insert_cache import PagedGraph
from kvpass.fx_passes.optimization.fuse_writes import fuse_writes
from kvpass.fx_passes.stages import lower, plan, prove
from kvpass.fx_passes.validation.verify import Comparison, reference_graph, verify
from tests.fx_passes.tracing import VOCAB, captured
from tests.grammar.check import judge
from tests.grammar.decoder import DEFAULTS

pytestmark = pytest.mark.slow  # one graph of many layers

HEADS, KV_HEADS, DIM = 4, 2, 6
WIDTH = HEADS * DIM
EPS = 1e-3
kvpass_ops = torch.ops.kvpass


def tables(x: Tensor, dims: int = DIM) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[S, dims / 2]`."""
    rates = 0.3 ** torch.arange(dims // 2)
    angles = torch.arange(x.shape[-2])[:, None] * rates
    return angles.cos(), angles.sin()


def halves(x: Tensor) -> Tensor:
    cos, sin = (torch.cat([t, t], -1) for t in tables(x))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def halves_apart(x: Tensor) -> Tensor:
    cos, sin = tables(x)
    first, second = x[..., : DIM // 2], x[..., DIM // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def backwards(x: Tensor) -> Tensor:
    cos, sin = tables(x)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], -1)


def neighbours(x: Tensor) -> Tensor:
    cos, sin = (t.repeat_interleave(2, -1) for t in tables(x))
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + turned * sin


def complex_numbers(x: Tensor) -> Tensor:
    cos, sin = tables(x)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def partial(x: Tensor) -> Tensor:
    cos, sin = (torch.cat([t, t], -1) for t in tables(x, 4))
    turned, rest = x[..., :4], x[..., 4:]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def last_dims(x: Tensor) -> Tensor:
    cos, sin = (torch.cat([t, t], -1) for t in tables(x, 4))
    rest, turned = x[..., :2], x[..., 2:]
    first, second = turned.chunk(2, -1)
    return torch.cat([rest, turned * cos + torch.cat([-second, first], -1) * sin], -1)


def reflected(x: Tensor) -> Tensor:
    cos, sin = (torch.cat([t, t], -1) for t in tables(x))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([second, first], -1) * sin


def tempered(x: Tensor) -> Tensor:
    return halves(x) * (1 + torch.arange(x.shape[-2])[:, None] * 0.1)


def by_hand(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def one_more(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().sum(-1, keepdim=True) / DIM + EPS) * (1 + weight)


def library(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (DIM,), weight, EPS)


def no_weight(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def clamped(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)


def centred(x: Tensor, weight: Tensor) -> Tensor:
    return by_hand(x - x.mean(-1, keepdim=True), weight)


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    return by_hand(x, weight) * torch.arange(1.0, x.shape[1] + 1)[:, None, None]


def fourth_powers(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True).sqrt() + EPS)


Turn, Norm = Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """What a layer does to queries and keys, and what of it the op takes over: norm, dims rotated, neighbours."""

    query: Turn
    key: Turn
    norm: Norm | None = None
    fused: bool = True
    normed: bool = False
    rotated: int | None = DIM
    interleaved: bool = False


CASES = {
    "halves": Case(halves, halves),
    "halves apart": Case(halves_apart, halves_apart),
    "two spellings": Case(halves, halves_apart, fused=False),  # tables of their own
    "backwards": Case(backwards, backwards),
    "neighbours": Case(neighbours, neighbours, interleaved=True),
    "complex numbers": Case(complex_numbers, complex_numbers, interleaved=True),
    "partial": Case(partial, partial, rotated=4),
    "norm by hand": Case(halves, halves, by_hand, normed=True),
    "one plus weight": Case(neighbours, neighbours, one_more, normed=True, interleaved=True),
    "norm of the library": Case(partial, partial, library, normed=True, rotated=4),
    "norm without weight": Case(halves, halves, no_weight, normed=True),
    "norm alone": Case(lambda x: x, lambda x: x, by_hand, normed=True, rotated=None),
    "centred norm": Case(halves, halves, centred, normed=True),  # of what was centred before
    "clamped norm": Case(halves, halves, clamped),  # the op takes the rotation alone, here and below
    "weight per head": Case(halves, halves, per_head),
    "norm by fourth powers": Case(halves, halves, fourth_powers),
    "last dims": Case(last_dims, last_dims, fused=False),
    "reflected": Case(reflected, reflected, fused=False),
    "tempered queries": Case(tempered, halves, fused=False),
    "queries alone": Case(halves, lambda x: x, fused=False),
    "opposite ways": Case(halves, backwards, fused=False),
    "neither": Case(lambda x: x, lambda x: x, fused=False),
}


class Layer(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = nn.Linear(WIDTH, KV_HEADS * DIM), nn.Linear(WIDTH, KV_HEADS * DIM)
        self.query_norm, self.key_norm = nn.Parameter(torch.rand(DIM) + 0.5), nn.Parameter(torch.rand(DIM) + 0.5)
        self.case = case

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (f(x).view(b, s, -1, DIM).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.case.norm is not None:
            q, k = self.case.norm(q, self.query_norm), self.case.norm(k, self.key_norm)
        q, k = self.case.query(q), self.case.key(k)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + self.o(out.transpose(1, 2).reshape(b, s, WIDTH))


class Model(nn.Module):
    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(map(Layer, cases))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x @ self.embed.weight.mT


@dataclass
class Fused:
    paged: PagedGraph
    found: Comparison
    model: Model


@pytest.fixture(scope="module")
def fused() -> Fused:
    config = CacheConfig(block_size=4)
    model = Model(list(CASES.values())).eval()
    graph = captured(model)
    proof = prove(graph, config)
    assert proof.refusals == []
    planned = plan(proof, config, VOCAB)
    reference = reference_graph(graph, [site.node.name for site in planned.sites])
    paged = lower(proof, planned, fuse=True)
    assert fuse_writes(graph) == 0, "a second run changes nothing"
    return Fused(paged, verify(model, reference, paged, PagedModule(paged)), model)


@pytest.mark.slow  # its model has a layer for each case
@pytest.mark.parametrize(("place", "name"), list(enumerate(CASES)))
def test_fused_where_it_is_the_ops_formula(fused: Fused, place: int, name: str) -> None:
    case, nodes = CASES[name], {n.name: n for n in fused.paged.module.graph.nodes}
    (write,) = (n for n in nodes[f"key_cache_{place}"].users if not is_call(n, kvpass_ops.paged_attention))
    assert is_call(write, kvpass_ops.norm_rotary_write if case.fused else kvpass_ops.write_cache)
    if not case.fused:
        return
    named = arguments(write)
    assert ((named["query_weight"] is not None), (named["key_weight"] is not None)) == (case.normed, case.normed)
    assert named["eps"] == (EPS if case.normed else 0)
    assert (None if named["cos"] is None else int(named["cos"].meta["val"].shape[1])) == case.rotated
    assert named["interleaved"] == case.interleaved
    assert named["query"].meta["val"].shape[1:] == (HEADS, DIM)


def test_the_step_computes_what_the_model_does(fused: Fused) -> None:
    assert fused.found.passed and fused.found.history_effect > 0
    assert max(fused.found.errors.values()) < 1e-5 and max(fused.found.site_errors.values()) < 1e-5


def test_equal_tables_are_laid_out_once(fused: Fused) -> None:
    """What every layer computes from positions is one node already, and so is its layout."""
    writes = [n for n in fused.paged.module.graph.nodes if is_call(n, kvpass_ops.norm_rotary_write)]
    of_halves = [arguments(writes[i])["cos"] for i, name in enumerate(n for n in CASES if CASES[n].fused)
                 if CASES[name].query is halves]  # fmt: skip
    assert len(of_halves) > 3 and len(set(of_halves)) == 1


def test_the_norm_follows_a_change_of_its_weight(fused: Fused) -> None:
    place = list(CASES).index("norm by hand")
    write = next(n for n in fused.paged.module.graph.nodes if n.name.startswith("norm_rotary_write")
                 and arguments(n)["key_cache"].name == f"key_cache_{place}")  # fmt: skip
    weight = fused.paged.module.get_parameter(str(arguments(write)["query_weight"].target))
    assert weight is fused.model.layers[place].query_norm


@pytest.mark.slow
def test_a_single_head_that_is_left_out_stays_with_the_plain_write() -> None:
    """Time first, one KV head: rows are ``[S, B, D]`` until the step flattens them."""
    spec = {**DEFAULTS, "kv_heads": 1, "projection": "time first", "position": "rotary interleaved", "seed": 1352}
    assert judge([spec])[0].outcome == "right"
