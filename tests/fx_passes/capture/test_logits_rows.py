"""A forward that returns the last token's logits is given those of all tokens, or refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kvpass.errors import CaptureError
from kvpass.fx_passes.capture.logits_rows import every_row
from kvpass.fx_passes.graph import LogitsRows
from tests.fx_passes.tracing import VOCAB, captured

Function = Callable[["Model", Tensor], Tensor]


class Model(nn.Module):
    """Returns what a function makes of the embedded tokens `[B, S, 8]`."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.function = function

    def forward(self, ids: Tensor) -> Tensor:
        return self.function(self, self.embed(ids))


ARRANGED: dict[str, tuple[LogitsRows, Function]] = {
    "by a slice, in heads": (
        LogitsRows.LAST,
        lambda m, x: m.head(x[:, -1:].view(x.size(0), 1, 2, 4).flatten(2).squeeze(1)).unsqueeze(1).tanh(),
    ),
    "by two picks": (LogitsRows.LAST, lambda m, x: m.head(x[:, -1] + x.cos()[:, x.size(1) - 1])),
    "by a list": (LogitsRows.LAST, lambda m, x: m.head(x[:, [-1], :])),
    "merged": (LogitsRows.MERGED, lambda m, x: m.head(x).view(-1, VOCAB)),
}
REFUSED: dict[str, Function] = {
    "the first token": lambda m, x: m.head(x[:, 0]),
    "the last two": lambda m, x: m.head(x[:, -2:].sum(1)),
    "the mean": lambda m, x: m.head(x.mean(1)),
    "the last beside the mean": lambda m, x: m.head(x[:, -1] - x.mean(1)),
    "times the length": lambda m, x: m.head(x[:, -1]) * x.size(1),
    "one batch size": lambda m, x: m.head(x[:, -1]) + torch.ones(x.size(0), 1).cumsum(0),
}


@pytest.mark.parametrize("name", ARRANGED)
def test_every_row_is_the_last_of_its_prefix(name: str) -> None:
    rows, function = ARRANGED[name]
    model = Model(function)
    graph = captured(model)
    assert graph.rows is rows
    ids = torch.randint(0, VOCAB, (3, 7))
    with torch.no_grad():
        got = graph.module(ids)[0]
        prefixes = [model(ids[:, : n + 1]).reshape(3, -1, VOCAB)[:, -1] for n in range(7)]
        torch.testing.assert_close(got, torch.stack(prefixes, 1))
        torch.testing.assert_close(every_row(model, rows)(ids), got)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_the_last_token_alone_is_refused(name: str) -> None:
    with pytest.raises(CaptureError, match="or those of the last token"):
        captured(Model(REFUSED[name]))
