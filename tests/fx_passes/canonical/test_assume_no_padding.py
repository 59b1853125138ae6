"""Comparisons with the padding token are decided where they mix tokens, and all others are left alone."""

import torch
from torch import Tensor, nn

from kvpass.fx_passes.canonical.assume_no_padding import AssumeNoPadding
from kvpass.fx_passes.canonical.canonicalize import Canonicalize
from kvpass.fx_passes.graph import CapturedGraph
from tests.fx_passes.tracing import VOCAB, captured

COUNTED = {
    "ne": lambda ids: ids != 0,
    "eq": lambda ids: (ids == 0).logical_not(),
    "gt": lambda ids: ids > 0,
    "ge": lambda ids: ids >= 1,
    "le": lambda ids: ~(ids <= 0),
    "lt": lambda ids: ~(ids < 1),
    "cast": lambda ids: ids.bool(),
}
LEFT_ALONE = {
    "another token": lambda ids: ids != 3,
    "a range": lambda ids: ids > 1,
    "not the ids": lambda ids: (ids // 2) != 0,
}


class Counts(nn.Module):
    """Counts of the tokens for which each function holds, and one that treats tokens one by one."""

    def __init__(self, padding: int | None, functions: dict) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 4, padding_idx=padding)
        self.functions = functions

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(ids)
        return (x, *((x + function(ids).long().cumsum(1)[..., None]) for function in self.functions.values()))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 4, padding_idx=0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids) * (ids != 0)[..., None]


def canonical(model: nn.Module) -> CapturedGraph:
    graph = captured(model)
    Canonicalize().apply(graph)
    return graph


def test_every_spelling_of_the_comparison_is_decided_and_no_other() -> None:
    model = Counts(0, COUNTED | LEFT_ALONE).eval()
    graph = canonical(model)
    assert AssumeNoPadding().apply(graph).rewritten == len(COUNTED)
    assert graph.forbidden_tokens == {0}
    without = torch.arange(10).reshape(2, 5) % (VOCAB - 1) + 1
    for got, wanted in zip(graph.module(without), model(without), strict=True):
        torch.testing.assert_close(got, wanted)
    padded = torch.tensor([[1, 0, 2, 3]])
    differs = [not torch.equal(a, b) for a, b in zip(graph.module(padded)[1:], model(padded)[1:], strict=True)]
    assert differs == [True] * len(COUNTED) + [False] * len(LEFT_ALONE)
    assert AssumeNoPadding().apply(graph).rewritten == 0


def test_without_padding_in_the_embedding_nothing_is_assumed() -> None:
    graph = canonical(Counts(None, {"ne": COUNTED["ne"]}))
    assert AssumeNoPadding().apply(graph).rewritten == 0 and not graph.forbidden_tokens


def test_what_is_exact_for_all_tokens_stays() -> None:
    graph = canonical(Scaled())
    assert AssumeNoPadding().apply(graph).rewritten == 0 and not graph.forbidden_tokens
