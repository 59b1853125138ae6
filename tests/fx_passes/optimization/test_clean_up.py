"""What ``clean_up`` takes out of a paged step, and that the step computes the same."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from kvpass.fx_passes.canonical.canonicalize import Canonicalize
from kvpass.fx_passes.graph import CapturedGraph, aten, is_call
from kvpass.fx_passes.optimization.clean_up import clean_up, count_nodes
from tests.fx_passes.tracing import captured


class Moves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.weight = nn.Embedding(16, 12), nn.Parameter(torch.randn(12))
        self.register_buffer("steps", torch.arange(6.0))

    def forward(self, ids: Tensor) -> Tensor:
        raise NotImplementedError


class ReshapeTwice(Moves):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return x.reshape(*ids.shape, 3, 4).reshape(*ids.shape, 2, 6).reshape(*ids.shape, 12)


class ThereAndBack(Moves):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).reshape(*ids.shape, 3, 4)
        return x.permute(2, 0, 3, 1).transpose(0, 2).permute(1, 3, 2, 0).reshape(*ids.shape, 12)


class MovesTokens(Moves):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).reshape(*ids.shape, 3, 4).transpose(2, 3)
        return x.reshape(*ids.shape, 12) * 2


class MovesSingles(Moves):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).reshape(*ids.shape, 1, 12).transpose(1, 2)
        return x.reshape(*ids.shape, 12)


class Constants(Moves):
    def forward(self, ids: Tensor) -> Tensor:
        frequencies = (1.0 / 100 ** (self.steps / 6)).repeat(2).cos()
        return self.table(ids) * frequencies * (1.0 + self.weight)


def as_step(model: nn.Module) -> tuple[CapturedGraph, GraphModule]:
    """The captured graph, cleaned up as that of a step of one row, and a copy of it from before."""
    torch.manual_seed(0)
    graph = captured(model.eval())
    Canonicalize().apply(graph)
    before = torch.fx.Graph()
    before.output(before.graph_copy(graph.graph, {}))
    copy = GraphModule(graph.module, before)
    clean_up(graph)
    return graph, copy


@pytest.mark.parametrize(("make", "moves"), [(ReshapeTwice, 0), (ThereAndBack, 0), (MovesTokens, 3), (MovesSingles, 0)])
def test_moves_are_joined(make: type[nn.Module], moves: int) -> None:
    graph, before = as_step(make())
    ids = torch.randint(16, (1, 9))
    assert torch.equal(graph.module(ids)[0], before(ids)[0])
    left = [n for n in graph.graph.nodes if is_call(n, aten.reshape, aten.permute, aten.transpose)]
    assert len(left) == moves, graph.graph


def test_constants_of_buffers_are_folded_and_parameters_are_not() -> None:
    model = Constants()
    graph, before = as_step(model)
    ids = torch.randint(16, (1, 9))
    assert torch.equal(graph.module(ids)[0], before(ids)[0])
    assert not [n for n in graph.graph.nodes if is_call(n, aten.cos, aten.pow, aten.repeat)]
    with torch.no_grad():
        model.weight += 1.0
    assert torch.equal(graph.module(ids)[0], before(ids)[0])


def test_cleaning_twice_changes_nothing() -> None:
    graph, _ = as_step(ThereAndBack())
    once = [str(n.format_node()) for n in graph.graph.nodes]
    clean_up(graph)
    assert [str(n.format_node()) for n in graph.graph.nodes] == once


def test_views_are_calls_and_no_computations() -> None:
    graph, before = as_step(MovesTokens())
    assert count_nodes(graph.graph) == (6, 2)  # one size and three moves; the embedding and the product
    assert count_nodes(before.graph) == (7, 2)
