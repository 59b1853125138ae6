"""Projections of one input are one product over the model's own memory; what is not safe to move is left alone."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvpass.fx_passes.canonical.canonicalize import Canonicalize
from kvpass.fx_passes.graph import CapturedGraph, aten, is_call
from kvpass.fx_passes.optimization import merge_projections as merging
from kvpass.fx_passes.optimization.merge_projections import LARGE_ON_CPU, join_rows, merge_projections, owns_its_memory
from tests.fx_passes.tracing import VOCAB, captured, compare_golden, graph_text

WIDTH = 12


class Projections(nn.Module):
    """Several linear maps of the same tokens; `forward` sums them so that none is dead."""

    def __init__(self, *widths: int, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.maps = nn.ModuleList(nn.Linear(WIDTH, width, bias=bias) for width in widths)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return torch.cat([each(x).sin() for each in self.maps], -1)


class Spelled(Projections):
    """A linear layer, a product with a transpose, and one of flattened tokens: the first two have one input."""

    def __init__(self) -> None:
        super().__init__(6, 4, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        first, second, third = (each.weight for each in self.maps)
        flat = torch.addmm(torch.zeros(5), x.reshape(-1, WIDTH), third.t()).reshape(*ids.shape, 5)
        return torch.cat([F.linear(x, first), x @ second.permute(1, 0), x @ third.mT, flat], -1)


class Lookalikes(Projections):
    """Two inputs that have one value, a weight that is computed, a weight with its rows apart, and a bias."""

    def __init__(self) -> None:
        super().__init__(6, 6, 6)
        self.columns = nn.Parameter(torch.randn(WIDTH, 6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = x + 1
        a, b, c = (each.weight for each in self.maps)
        return F.linear(x, a) + F.linear(y, b) + F.linear(x, c * 2) + x @ self.columns + F.linear(x, a, self.bias)


def merged(model: nn.Module) -> tuple[CapturedGraph, int]:
    graph = captured(model)
    Canonicalize().apply(graph)
    return graph, merge_projections(graph)


def products(graph: CapturedGraph) -> int:
    return sum(is_call(n, aten.linear, aten.matmul, aten.mm, aten.addmm) for n in graph.graph.nodes)


@pytest.mark.parametrize("bias", [False, True])
def test_one_product_and_the_same_model(bias: bool) -> None:
    model = Projections(8, 4, 4, bias=bias)
    before, original = {k: v.clone() for k, v in model.state_dict().items()}, copy.deepcopy(model)
    strides = [p.stride() for p in model.parameters()]
    graph, count = merged(model)
    ids = torch.arange(10).reshape(2, 5)
    assert (count, products(graph)) == (3, 1)
    torch.testing.assert_close(graph.module(ids)[0], original(ids), rtol=1e-6, atol=1e-6)
    assert torch.equal(model(ids), original(ids))
    assert [p.stride() for p in model.parameters()] == strides
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert merge_projections(graph) == 0, "a second run changes nothing"


def test_no_second_copy_and_in_place_changes_count() -> None:
    model = Projections(8, 4, 4, bias=True)
    graph, _ = merged(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = [p.untyped_storage() for p in graph.module.parameters()]
    assert {s.data_ptr() for s in held} == own
    assert sum(s.nbytes() for s in held) == sum(p.nbytes for p in model.parameters())
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        model.maps[1].weight.neg_()
        model.maps[2].bias.fill_(0.5)
    torch.testing.assert_close(graph.module(ids)[0], model(ids))
    model.load_state_dict(Projections(8, 4, 4, bias=True).state_dict())
    torch.testing.assert_close(graph.module(ids)[0], model(ids))


def test_the_model_can_be_saved_copied_and_trained() -> None:
    model = Projections(8, 4)
    merged(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = Projections(8, 4)
    loaded.load_state_dict(torch.load(file))
    ids = torch.arange(10).reshape(2, 5)
    assert torch.equal(loaded(ids), model(ids))
    model(ids).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(loaded(ids), model(ids))


def test_saved_as_safetensors(tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = Projections(8, 4)
    merged(model)
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = safetensors.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_a_second_capture_merges_over_the_same_memory() -> None:
    model = Projections(8, 4, 4)
    first, _ = merged(model)
    addresses = [p.data_ptr() for p in model.parameters()]
    second, count = merged(model)
    assert count == 3 and [p.data_ptr() for p in model.parameters()] == addresses
    held = [{p.untyped_storage().data_ptr() for p in graph.module.parameters()} for graph in (first, second)]
    assert held[0] == held[1]


def test_every_spelling_with_a_transpose() -> None:
    model = Spelled()
    graph, count = merged(model)
    ids = torch.arange(10).reshape(2, 5)
    assert (count, products(graph)) == (3, 2)
    torch.testing.assert_close(graph.module(ids)[0], model(ids))


def test_golden() -> None:
    graph = captured(Projections(8, 4, 4))
    Canonicalize().apply(graph)
    before = graph_text(graph)
    merge_projections(graph)
    compare_golden("merge_projections", f"# before\n{before}\n# after\n{graph_text(graph)}")


def test_lookalikes_are_left_alone() -> None:
    graph, count = merged(Lookalikes())
    assert (count, products(graph)) == (0, 5)


def test_memory_that_something_else_uses_is_left_alone() -> None:
    kept = []
    views, twice, rows, shared = (Projections(8, 4) for _ in range(4))
    kept.append(views.maps[0].weight.data)
    twice.maps[1].weight = nn.Parameter(twice.maps[0].weight.data)
    whole = torch.randn(13, WIDTH)
    rows.maps[0].weight, rows.maps[1].weight = nn.Parameter(whole[:8]), nn.Parameter(whole[9:])
    shared.maps[0].weight.share_memory_()
    for model in (views, twice, rows, shared):
        addresses = [p.data_ptr() for p in model.parameters()]
        assert merged(model)[1] == 0
        assert [p.data_ptr() for p in model.parameters()] == addresses
    assert kept[0].data_ptr() == views.maps[0].weight.data_ptr()


def test_special_parameters_are_left_alone() -> None:
    class Special(nn.Parameter):
        pass

    model = Projections(8, 4, 4)
    model.maps[0].weight = Special(torch.randn(8, WIDTH))
    model.maps[1].weight = nn.Parameter(torch.randn(WIDTH, 4).t())
    assert merged(model)[1] == 0


def test_a_tied_parameter_stays_tied() -> None:
    model = Projections(VOCAB, 4)
    model.maps[0].weight = model.embed.weight
    graph, count = merged(model)
    assert count == 2 and model.maps[0].weight is model.embed.weight
    with torch.no_grad():
        model.embed.weight.mul_(2)
    ids = torch.arange(10).reshape(2, 5)
    torch.testing.assert_close(graph.module(ids)[0], model(ids))


def test_parameters_joined_under_inference_mode_can_be_trained() -> None:
    first, second = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(1, 2))
    with torch.inference_mode():
        whole = join_rows((first, second))
    (first.sum() + second.sum()).backward()
    assert not whole.is_inference() and first.grad is not None
    assert torch.equal(whole, torch.cat((first, second)))
    alone = nn.Linear(2, 2).weight
    assert not owns_its_memory(first) and owns_its_memory(alone)


def test_on_a_cpu_large_projections_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Projections(8, 7, 4, 2)
    assert sum(p.numel() for p in model.parameters()) < LARGE_ON_CPU
    monkeypatch.setattr(merging, "LARGE_ON_CPU", 7 * WIDTH)
    graph, count = merged(model)
    assert (count, products(graph)) == (3, 2), "one of the large ones takes the small ones along"
    assert [n.args[1] for n in graph.graph.nodes if is_call(n, aten.split_with_sizes)] == [[8, 4, 2]]
