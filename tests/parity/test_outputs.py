"""The logits are told from other results by name, by width, or by being alone; never by being the first."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvpass
from kvpass.outputs import find_logits, logits_at, watched_tables
from tests.decoders.catalogue import DECODERS
from tests.decoders.skeleton import VOCAB
from tests.parity.harness import CONFIG, SEED, assert_tokens_equal, ragged_prompts

B, S, W, V = 2, 11, 8, 29
ROWS = frozenset({V})
Y, H = torch.zeros(B, S, V), torch.ones(B, S, W)  # logits and hidden states
WIDE, LOSS, CACHE = torch.ones(B, S, V), torch.ones(()), torch.ones(B, 4, S, W)

TOLD: dict[str, Any] = {
    "alone": Y,
    "hidden first": (H, Y),
    "a loss first": (LOSS, Y),
    "a loss for each token first": (torch.ones(B, S), Y),
    "None first": (None, Y),
    "with a cache": (Y, ((CACHE, CACHE), (CACHE, CACHE))),
    "by name in a dict": {"hidden": WIDE, "logits": Y},
    "by name in an object": SimpleNamespace(hidden=WIDE, logits=Y),
    "by name deeper": {"hidden": WIDE, "rest": {"logits": Y}},
    "rows one short": (WIDE[:, :-1], Y),
}
UNTOLD: dict[str, Any] = {
    "hidden as wide": (WIDE, Y),
    "logits first, hidden as wide": (Y, WIDE),
    "the last row of as wide": (WIDE, Y[:, -1:]),
    "nested as wide": ((WIDE,), (Y,)),
    "a dict of other names": {"hidden": WIDE, "scores": Y},
    "nothing": (None, 3),
    "text": "logits",
}


@pytest.mark.parametrize("name", TOLD)
def test_logits_are_told(name: str) -> None:
    assert logits_at(TOLD[name], find_logits(TOLD[name], B, S, ROWS)) is Y


@pytest.mark.parametrize("name", UNTOLD)
def test_what_cannot_be_told_is_an_error_that_lists_all(name: str) -> None:
    with pytest.raises(kvpass.InputError, match=r"cannot be told.*return the logits alone") as caught:
        find_logits(UNTOLD[name], B, S, ROWS)
    if isinstance(UNTOLD[name], tuple) and name != "nothing":
        assert "[2, 11, 29]" in str(caught.value)


def test_without_a_table_one_alone_is_taken_and_two_are_not() -> None:
    assert logits_at((None, Y), find_logits((None, Y), B, S)) is Y
    with pytest.raises(kvpass.InputError, match="cannot be told"):
        find_logits((H, Y), B, S)


def test_tables_of_tokens_are_seen_and_those_of_positions_are_not() -> None:
    tokens, places = nn.Embedding(V, W), nn.Embedding(64, W)
    ids = torch.zeros(B, S, dtype=torch.int64)
    _, rows = watched_tables(lambda: tokens(ids) + places(torch.arange(S)) + tokens.weight[ids], ids)
    assert rows == ROWS


class Returning(nn.Module):
    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.form = DECODERS["GQA by repeat_interleave"](SEED), form

    def forward(self, ids: Tensor) -> Any:
        return self.form(self.inner.embed(ids), self.inner(ids))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form", [lambda h, y: (h, y), lambda h, y: (h.mean(), y)], ids=["hidden", "loss"])
def test_logits_behind_other_results_are_served(form: Callable[[Tensor, Tensor], Any]) -> None:
    engine = kvpass.compile(Returning(form).eval(), CONFIG)
    assert_tokens_equal(DECODERS["GQA by repeat_interleave"](SEED), engine, ragged_prompts(VOCAB))


def test_two_of_the_width_of_the_vocabulary_are_refused() -> None:
    with pytest.raises(kvpass.InputError, match=r"output\[1\] \[2, 11, 97\]"):
        kvpass.compile(Returning(lambda h, y: (y + 1, y)).eval(), CONFIG)
