"""Equal values are computed once, and nothing that may differ is merged."""

import torch
from torch import Tensor, nn

from kvpass.fx_passes.canonical.canonicalize import Canonicalize
from kvpass.fx_passes.canonical.common_subexpressions import CommonSubexpressions
from kvpass.fx_passes.graph import aten, is_call
from tests.fx_passes.tracing import VOCAB, captured


class Layer(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.register_buffer("rates", torch.tensor([1.0, rate]))
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x + torch.arange(x.size(1))[:, None] * self.rates) * self.weight + torch.rand_like(x) * 0


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 2)
        self.layers = nn.Sequential(Layer(0.5), Layer(0.5), Layer(0.25))

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.embed(ids))


def test_shapes_and_buffers_are_merged_and_parameters_and_chance_are_not() -> None:
    model = Layers().eval()
    graph = captured(model)
    Canonicalize().apply(graph)
    assert CommonSubexpressions().apply(graph).rewritten > 0
    nodes = list(graph.graph.nodes)
    read = [str(n.target) for n in nodes if n.op == "get_attr"]
    assert sum("rates" in name for name in read) == 2 and sum(".weight" in name for name in read) == 3 + 1
    assert sum(is_call(n, aten.arange) for n in nodes) == 1
    assert sum(is_call(n, aten.rand_like) for n in nodes) == 3
    ids = torch.arange(12).reshape(3, 4)
    (got,) = graph.module(ids)
    torch.testing.assert_close(got, model(ids))
    assert CommonSubexpressions().apply(graph).rewritten == 0
