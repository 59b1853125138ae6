"""Softmaxes by any means become `softmax`, with the same numbers; what is none stays as it is."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpass.fx_passes.canonical.canonicalize import Canonicalize
from kvpass.fx_passes.graph import aten, is_call
from tests.fx_passes.tracing import VOCAB, Cases, captured, outputs


def scores(x: Tensor) -> Tensor:
    """Tokens against tokens, `[B, S, S]`."""
    return x @ x.mT


def seen(x: Tensor) -> Tensor:
    return torch.ones(x.size(1), x.size(1), dtype=torch.bool).tril()


def over_sum(top: Tensor, dim: int = -1) -> Tensor:
    return top / top.sum(dim, keepdim=True)


def shifted(x: Tensor) -> tuple[Tensor, Tensor]:
    top = x.amax(-1, keepdim=True)
    return (x - top).exp(), top


def with_sink(x: Tensor, sink: Tensor) -> Tensor:
    e, top = shifted(x)
    return e / (e.sum(-1, keepdim=True) + (sink - top).exp())


def log_of_sum(x: Tensor) -> Tensor:
    e, top = shifted(x)
    return (x - (top + e.sum(-1, keepdim=True).log())).exp()


SOFTMAXES = {
    "over the middle dim": lambda m, x: over_sum(x.unsqueeze(2).exp(), 1),
    "sum without keepdim": lambda m, x: _unsqueezed(x),
    "times the reciprocal": lambda m, x: _inverse(x),
    "base two": lambda m, x: over_sum(torch.exp2(x)),
    "log of the sum": lambda m, x: log_of_sum(x),
    "sink in the sum": lambda m, x: with_sink(x, m.vector[:1]),
    "sink in a sum that is not shifted": lambda m, x: _over_more(x.exp(), m.vector[0].exp()),
    "a number in a sum that is not shifted": lambda m, x: _over_more(x.exp(), 0.02),
    "less the largest, and less than rounding in the sum": lambda m, x: _over_more(shifted(x)[0], 1e-15),
    "less the largest, the sum kept above a number": lambda m, x: _kept_above(*shifted(x)[:1], 1e-6),
    "softmax of a softmax's own sum": lambda m, x: over_sum(x.softmax(-1)),
    "masked after exp": lambda m, x: over_sum(scores(x).exp() * seen(x)),
    "masked after softmax": lambda m, x: over_sum(scores(x).softmax(-1).masked_fill(~seen(x), 0.0)),
    "chosen after softmax": lambda m, x: over_sum(torch.where(seen(x), scores(x).softmax(-1), 0.0)),
    "divided after the values": lambda m, x: _divided_late(scores(x), x),
}
# What looks alike, and is no softmax, or is one that a logarithm could spoil.
KEPT = {
    "running sum": lambda m, x: over_sum(x.exp().cumsum(-1)),
    "gate that depends on data": lambda m, x: over_sum(scores(x).exp() * scores(x).relu()),
    "gate that is no score's": lambda m, x: over_sum(x.exp() * m.vector.abs()),
    "shift that is no row": lambda m, x: _over_more((x - m.vector).exp(), (-m.vector).exp().sum(-1, keepdim=True)),
    "less the largest, and more in the sum": lambda m, x: _over_more(shifted(x)[0], 0.02),
    "less something, and little in the sum": lambda m, x: _over_more((x - x.mean(-1, keepdim=True)).exp(), 1e-15),
    "less something, the sum kept above a number": lambda m, x: _kept_above((x - x.mean(-1, keepdim=True)).exp(), 1e-6),
    "less the largest, the sum kept above two": lambda m, x: _kept_above(shifted(x)[0], 2.0),
    "masked after the largest was taken off": lambda m, x: _kept_above(shifted(scores(x))[0] * seen(x), 1e-6),
    "log of another sum": lambda m, x: (x - (x * 2).exp().sum(-1, keepdim=True).log()).exp(),
    "sigmoid of another sum": lambda m, x: x.sin() * torch.sigmoid(x.logsumexp(-1, keepdim=True)),
    "values over another sum": lambda m, x: torch.matmul(scores(x).sin(), x) / scores(x).sin().sum(-1, keepdim=True),
}


def _unsqueezed(x: Tensor) -> Tensor:
    e = x.exp()
    return e / e.sum(-1).unsqueeze(-1)


def _inverse(x: Tensor) -> Tensor:
    e = x.exp()
    return e.sum(-1, keepdim=True).reciprocal() * e


def _over_more(top: Tensor, extra: Tensor | float) -> Tensor:
    return top / (top.sum(-1, keepdim=True) + extra)


def _kept_above(top: Tensor, least: float) -> Tensor:
    return top / top.sum(-1, keepdim=True).clamp(min=least)


def _divided_late(s: Tensor, x: Tensor) -> Tensor:
    e = s.exp()
    return torch.matmul(e, x) / e.sum(-1, keepdim=True)


def run(graph, ids: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(graph.module(ids))


def test_every_spelling_becomes_a_softmax_with_the_same_numbers() -> None:
    graph = captured(Cases(SOFTMAXES))
    ids = torch.randint(0, VOCAB, (2, 5))
    before = run(graph, ids)
    Canonicalize().apply(graph)
    for name, old, new in zip(["x", *SOFTMAXES], before, run(graph, ids), strict=True):
        torch.testing.assert_close(new, old, msg=lambda text, n=name: f"{n}: {text}")
    for name, output in zip(SOFTMAXES, outputs(graph)[1:], strict=True):
        behind = output
        while is_call(behind, aten.slice, aten.matmul):
            behind = behind.args[0]
        assert is_call(behind, aten.softmax), f"{name}: {output.target}"
    assert [n.name for n in graph.graph.nodes if is_call(n, aten.exp, aten.exp2, aten.logsumexp)] == []
    assert Canonicalize().apply(graph).rewritten == 0


def test_what_is_none_keeps_its_numbers() -> None:
    graph = captured(Cases(KEPT))
    ids = torch.randint(0, VOCAB, (2, 5))
    before = run(graph, ids)
    Canonicalize().apply(graph)
    for name, old, new in zip(["x", *KEPT], before, run(graph, ids), strict=True):
        torch.testing.assert_close(new, old, msg=lambda text, n=name: f"{n}: {text}")
    assert [n for n in graph.graph.nodes if is_call(n, aten.softmax)] == []


PRODUCTS = {
    "scores": lambda m, x: (x[:, :, None] * x[:, None]).sum(-1),
    "scores, kept": lambda m, x: (x[:, None] * x[:, :, None]).sum(3, keepdim=True),
    "values": lambda m, x: (F.relu(scores(x))[..., None] * x[:, None]).sum(2),
    "values, tokens last": lambda m, x: (scores(x)[:, None] * x.mT[:, :, None]).sum(-1),
}


def test_products_and_sums_become_matrix_products() -> None:
    graph = captured(Cases(PRODUCTS))
    ids = torch.randint(0, VOCAB, (2, 5))
    before = run(graph, ids)
    Canonicalize().apply(graph)
    for name, old, new in zip(["x", *PRODUCTS], before, run(graph, ids), strict=True):
        torch.testing.assert_close(new, old, msg=lambda text, n=name: f"{n}: {text}")
    assert [n for n in graph.graph.nodes if is_call(n, aten.sum)] == []
