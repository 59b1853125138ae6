"""A gate by the log-sum-exp of its own scores becomes a sink; any other gate stays."""

import torch
from torch import Tensor, nn

from kvpass.fx_passes.canonical.canonicalize import Canonicalize
from kvpass.fx_passes.canonical.fold_sink_gates import FoldSinkGates
from tests.fx_passes.tracing import VOCAB, captured

WIDTH = 4


def _total(s: Tensor) -> Tensor:
    return s.logsumexp(-1, keepdim=True)


# From scores [B, S, S] and one number to the gate of the output [B, S, WIDTH].
GATES = {
    "sigmoid": lambda s, sink: torch.sigmoid(s.logsumexp(-1) - sink).unsqueeze(-1),
    "sigmoid, turned around": lambda s, sink: torch.sigmoid(-(sink - _total(s))),
    "reciprocal": lambda s, sink: (1 + torch.exp(sink - _total(s))).reciprocal(),
    "one over": lambda s, sink: 1 / (torch.exp(sink - _total(s)) + 1),
    "log of a sum": lambda s, sink: torch.exp(_total(s) - torch.logaddexp(_total(s), sink)),
    "a number": lambda s, sink: torch.sigmoid(_total(s) - 0.5),
}
LEFT_ALONE = {
    "the other way": lambda s, sink: torch.sigmoid(sink - _total(s)),
    "of other scores": lambda s, sink: torch.sigmoid(_total(s * 2) - sink),
    "over the queries": lambda s, sink: torch.sigmoid(s.logsumexp(1).unsqueeze(-1) - sink),
    "per key": lambda s, sink: torch.sigmoid(s.logsumexp(-1) - sink).unsqueeze(1)[..., :1],
    "two": lambda s, sink: 2 / (torch.exp(sink - _total(s)) + 1),
}


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.sink = nn.Parameter(torch.tensor([0.3]))

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(ids)
        results = []
        for gate in (GATES | LEFT_ALONE).values():
            scores = x @ x.mT
            results.append((scores.softmax(-1) @ x) * gate(scores, self.sink))
        scores = x @ x.mT
        results.append((scores.softmax(-1) * GATES["sigmoid"](scores, self.sink)) @ x)
        for dim in (1, -2):  # keys first
            scores = x @ x.mT
            total = scores.logsumexp(dim, keepdim=dim > 0)
            gate = torch.sigmoid(total - self.sink)
            results.append((scores.softmax(dim) * (gate if dim > 0 else gate.unsqueeze(1))).mT @ x)
        return (x, *results)


def test_gates_become_sinks_and_the_values_stay() -> None:
    model = Gated().eval()
    graph = captured(model)
    Canonicalize().apply(graph)
    assert FoldSinkGates().apply(graph).rewritten == len(GATES) + 3
    left = [n for n in graph.graph.nodes if "logsumexp" in str(n.target)]
    assert len(left) == len(LEFT_ALONE)
    for shape in ((1, 1), (2, 6)):
        ids = torch.arange(shape[0] * shape[1]).reshape(shape)
        for got, wanted in zip(graph.module(ids), model(ids), strict=True):
            torch.testing.assert_close(got, wanted)
    assert FoldSinkGates().apply(graph).rewritten == 0
