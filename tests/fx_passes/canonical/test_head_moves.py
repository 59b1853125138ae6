"""Heads taken out of scores are taken out of queries and keys, with the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvpass.fx_passes.canonical.canonicalize import Canonicalize
from kvpass.fx_passes.graph import aten, is_call, shape_of
from tests.fx_passes.tracing import VOCAB, Cases, captured

HEADS = 4


def scores(m: Cases, x: Tensor, einsum: bool = False) -> Tensor:
    """`[B, 4, S, S]`, with a bias of its own for each head."""
    q = x.unsqueeze(1) * m.vector[:HEADS, None, None]
    k = (x @ m.square).unsqueeze(1).expand_as(q)
    s = torch.einsum("bhqd,bhkd->bhqk", q, k) if einsum else q @ k.mT
    return (s + m.table[:HEADS, :1, None]).softmax(-1)


MOVED = {
    "select": lambda m, x: scores(m, x)[:, 2],
    "select from the end": lambda m, x: scores(m, x)[:, -1],
    "slice": lambda m, x: scores(m, x)[:, 1:3],
    "strided": lambda m, x: scores(m, x, einsum=True)[:, 1::2],
    "chunk": lambda m, x: scores(m, x).chunk(2, 1)[1],
    "split with sizes": lambda m, x: scores(m, x).split([1, 3], 1)[1],
    "unbind": lambda m, x: scores(m, x, einsum=True).unbind(1)[3],
    "split in two dims": lambda m, x: scores(m, x).unflatten(1, (2, 2)),
    "split in two dims, of an einsum": lambda m, x: scores(m, x, einsum=True).unflatten(1, (2, 2)),
    "split in two dims, one picked": lambda m, x: scores(m, x, einsum=True).unflatten(1, (2, 2))[:, :, 1],
    "mask that each head has": lambda m, x: torch.where(scores(m, x) > m.table[:HEADS, 1:2, None], 1.0, 0.0)[:, 1],
}
# A softmax over the heads themselves does not treat each by itself.
KEPT = {
    "after a softmax over heads": lambda m, x: F.softmax(scores(m, x), 1)[:, 1],
}


@pytest.mark.slow
def test_moves_sink_below_the_scores_and_keep_the_numbers() -> None:
    graph = captured(Cases({**MOVED, **KEPT}))
    ids = torch.randint(0, VOCAB, (2, 5))
    with torch.no_grad():
        before = list(graph.module(ids))
        Canonicalize().apply(graph)
        after = list(graph.module(ids))
    for name, old, new in zip(["x", *MOVED, *KEPT], before, after, strict=True):
        torch.testing.assert_close(new, old, msg=lambda text, n=name: f"{n}: {text}")
    taken = [n for n in graph.graph.nodes if is_call(n, aten.slice, aten.select) and is_of_scores(n.args[0], graph)]
    assert len(taken) == len(KEPT)
    assert not [n for n in graph.graph.nodes if is_call(n, aten.split, aten.split_with_sizes, aten.unbind)]
    assert Canonicalize().apply(graph).rewritten == 0


def is_of_scores(node, graph) -> bool:
    return shape_of(node).count(graph.length) == 2
