"""Products with constants of zeros and ones become moves; parameters are not taken for constants."""

import torch
from torch import Tensor, nn

from kvpass.fx_passes.canonical.canonicalize import Canonicalize
from kvpass.fx_passes.canonical.one_hot_products import OneHotProducts
from kvpass.fx_passes.graph import aten, is_call
from tests.fx_passes.tracing import VOCAB, captured


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6)
        self.register_buffer("groups", torch.eye(3).repeat_interleave(2, 0))
        self.register_buffer("ones", torch.ones(6))
        self.weight = nn.Parameter(torch.ones(6))
        self.matrix = nn.Parameter(torch.eye(6))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return (x[..., :3] @ self.groups.T) * self.ones + x * self.weight @ self.matrix


def test_buffers_are_moves_and_parameters_count_when_they_change() -> None:
    model = Products()
    graph = captured(model)
    Canonicalize().apply(graph)
    assert OneHotProducts().apply(graph).rewritten == 2
    kept = [n for n in graph.graph.nodes if is_call(n, aten.mul, aten.matmul)]
    assert len(kept) == 2
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(graph.module(ids)[0], model(ids))
        model.weight.copy_(torch.arange(6.0))
        model.matrix.copy_(torch.arange(36.0).view(6, 6))
        torch.testing.assert_close(graph.module(ids)[0], model(ids))
