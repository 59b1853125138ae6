"""The whole pipeline: golden paged graph, a second run that changes nothing, refusals that are data and say where."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvpass.config import CacheConfig
from kvpass.fx_passes.attention.canonical_attention import attention_sites
from kvpass.fx_passes.canonical.canonicalize import Canonicalize
from kvpass.fx_passes.graph import CapturedGraph, PassResult, arguments
from kvpass.fx_passes.pipeline import Dialect
from kvpass.fx_passes.stages import lower, plan, prove, prove_stage
from tests.fx_passes.tracing import VOCAB, captured, compare_golden, graph_text

WIDTH, HEADS = 12, 2
CONFIG = CacheConfig(block_size=4)


class Attention(nn.Module):
    """Multi-head attention in one of several spellings; they all mean the same."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        return x + self.o(getattr(self, self.spelling)(q, k, v).transpose(1, 2).reshape(b, s, WIDTH))

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def sdpa_with_mask(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(q.size(2), q.size(2), dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.25)

    def softmax(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        future = torch.ones(q.size(2), q.size(2), dtype=torch.bool).triu(1)
        return (q @ k.mT * 0.25).masked_fill(future, -torch.inf).softmax(-1) @ v

    def einsum(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        future = torch.full((q.size(2), q.size(2)), -torch.inf).triu(1)
        scores = torch.einsum("bhqd,bhkd->bhqk", q / 4, k) + future
        return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)

    def softcap(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        future = torch.ones(q.size(2), q.size(2), dtype=torch.bool).triu(1)
        return (5 * torch.tanh(q @ k.mT * 0.25 / 5)).masked_fill(future, -1e9).softmax(-1) @ v

    def sink(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        future = torch.full((q.size(2), q.size(2)), -torch.inf).triu(1)
        sinks = torch.tensor([0.5, -0.5]).view(1, -1, 1, 1).expand(q.size(0), -1, q.size(2), 1)
        return torch.cat([q @ k.mT / 4 + future, sinks], -1).softmax(-1)[..., :-1] @ v

    def not_causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def masked_by_tokens(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        future = torch.ones(q.size(2), q.size(2), dtype=torch.bool).triu(1)
        return (q @ k.mT).masked_fill(future | (k[..., :1].mT > 1), -torch.inf).softmax(-1) @ v

    def mask_undone(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """-1e9 times a zero of the second mask is 0: what was hidden is seen again."""
        past = torch.ones(q.size(2), q.size(2)).tril()
        return ((q @ k.mT - 1e9 * (1 - past)) * past).softmax(-1) @ v


class Model(nn.Module):
    def __init__(self, *spellings: str, after: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(map(Attention, spellings))
        self.after = after or nn.Identity()
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.after(x))


class Cumulative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


SPELLINGS = {  # scale, softcap, whether there are sinks
    "sdpa": ((WIDTH // HEADS) ** -0.5, None, False),
    "sdpa_with_mask": (0.25, None, False),
    "softmax": (0.25, None, False),
    "einsum": (1.0, None, False),  # the queries are divided before
    "softcap": (0.25, 5.0, False),
    "sink": (0.25, None, True),
}


@pytest.fixture(scope="module")
def every_spelling() -> tuple[Model, CapturedGraph]:
    model = Model(*SPELLINGS).eval()
    graph = captured(model)
    proof = prove(graph, CONFIG)
    assert proof.refusals == []
    return model, graph


@pytest.mark.slow
def test_every_spelling_has_one_canonical_form(every_spelling) -> None:
    _, graph = every_spelling
    sites = attention_sites(graph)
    assert len(sites) == len(SPELLINGS)
    for site, (scale, softcap, sinks) in zip(sites, SPELLINGS.values(), strict=True):
        named = arguments(site)
        assert named["scale"] == pytest.approx(scale)
        assert named["softcap"] == (None if softcap is None else pytest.approx(softcap))
        assert (named["sinks"] is not None) == sinks
        for part in ("query", "key", "value"):
            assert tuple(named[part].meta["val"].shape[1::2]) == (HEADS, WIDTH // HEADS)


@pytest.mark.slow
def test_the_canonical_graph_computes_what_the_module_does(every_spelling) -> None:
    model, graph = every_spelling
    for batch, length in ((1, 1), (3, 14)):
        ids = torch.arange(batch * length).reshape(batch, length) * 7 % VOCAB
        with torch.no_grad():
            torch.testing.assert_close(graph.module(ids)[0], model(ids), rtol=1e-5, atol=1e-5)


def test_a_second_run_changes_nothing(every_spelling) -> None:
    """Once what find-attention emitted is canonical as well."""
    _, graph = every_spelling
    Canonicalize().apply(graph)
    before = graph_text(graph)
    for step in prove_stage(CONFIG):
        if not isinstance(step, Dialect):
            assert step.apply(graph) == PassResult(), step.name
    assert graph_text(graph) == before


@pytest.mark.parametrize("spelling", ["sdpa", "softmax"])
def test_golden_graphs_from_capture_to_cache(spelling: str) -> None:
    graph = captured(Model(spelling))
    texts = [f"# captured\n{graph_text(graph)}"]
    proof = prove(graph, CONFIG)
    assert proof.refusals == []
    texts.append(f"# canonical and proven\n{graph_text(graph)}")
    paged = lower(proof, plan(proof, CONFIG, VOCAB))
    texts.append(f"# paged\n{graph_text(paged.module)}")
    compare_golden(f"pipeline_{spelling}", "\n".join(texts))


REFUSED = {
    "not_causal": (Model("sdpa", "not_causal"), "read-masks", "layers.1", "not causal"),
    "masked_by_tokens": (Model("masked_by_tokens"), "prove-token-axis", "layers.0", "multiplies tokens with"),
    "mask_undone": (Model("mask_undone"), "read-masks", "layers.0", "multiplied with a mask"),
    "cumulative": (Model("sdpa", after=Cumulative()), "prove-token-axis", "after", "works along the token axis"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_pass_node_module_and_reason(name: str) -> None:
    model, pass_name, path, reason = REFUSED[name]
    refusals = prove(captured(model), CONFIG).refusals
    found = next(r for r in refusals if r.pass_name == pass_name)
    assert reason in found.reason and found.module_path == path
    assert re.fullmatch(r"\w+ \[\w+\.\w+\.\w+\]", found.node)
    assert "test_passes.py:" in found.source
    assert found.module_path in str(found) and found.node in str(found)


def test_a_model_without_attention_is_refused() -> None:
    (refusal,) = prove(captured(Model()), CONFIG).refusals
    assert "no attention was found" in refusal.reason
