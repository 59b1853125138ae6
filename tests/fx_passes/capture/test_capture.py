"""What cannot be captured for every batch and length is a CaptureError that says what to do."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kvpass.errors import CaptureError
from tests.fx_passes.tracing import VOCAB, captured


class Model(nn.Module):
    def __init__(self, function: Callable[["Model", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.register_buffer("seen", torch.zeros(1))
        self.function = function

    def forward(self, ids: Tensor) -> Tensor:
        return self.function(self, ids, self.embed(ids))


def count_calls(model: Model, ids: Tensor, x: Tensor) -> Tensor:
    model.seen.add_(1)
    return x


def write_ids(model: Model, ids: Tensor, x: Tensor) -> Tensor:
    ids.add_(1)
    return x


REFUSED = {
    "the batch is pinned": (lambda m, ids, x: x.reshape(2, -1, 8), "one batch size only"),
    "the length is pinned by a buffer": (lambda m, ids, x: x + torch.arange(11)[:, None], "one length only"),
    "the length is pinned by int()": (lambda m, ids, x: x * torch.ones(int(x.size(1)), 1), "one length only"),
    "the length is pinned by linspace": (lambda m, ids, x: x + torch.linspace(0, 1, x.size(1))[:, None], "one length"),
    "a buffer is written": (count_calls, "writes to the buffers seen"),
    "the input is written": (write_ids, "changes its input tensors in place"),
    "one row for each sequence": (lambda m, ids, x: x[:, 0], "logits .batch, length, vocabulary. for every token"),
    "time first": (lambda m, ids, x: x.transpose(0, 1), "logits .batch, length, vocabulary. for every token"),
    "a shifted result": (lambda m, ids, x: x[:, 1:], "logits .batch, length, vocabulary. for every token"),
    "a branch on the tokens": (
        lambda m, ids, x: x * 2 if ids.sum() > 3 else x,
        "without data-dependent Python control flow",
    ),
    "a branch on short lengths": (lambda m, ids, x: x * 2 if ids.size(1) > 4 else x, "another branch.* 2 tokens"),
    "a branch on odd lengths": (lambda m, ids, x: x * 2 if ids.size(1) % 2 else x, "another branch.* 2 tokens"),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_for_the_example_only_is_refused(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(CaptureError, match=message):
        captured(Model(function))


def test_one_graph_serves_every_batch_and_length_with_the_models_own_tensors() -> None:
    model = Model(lambda m, ids, x: x @ m.embed.weight.T)
    graph = captured(model)
    for batch, length in ((1, 1), (1, 7), (4, 1), (3, 20)):
        ids = torch.arange(batch * length).reshape(batch, length) % VOCAB
        torch.testing.assert_close(graph.module(ids)[0], model(ids))
    assert graph.module.embed.weight is model.embed.weight
    assert graph.max_length is None


def test_a_table_bounds_the_length() -> None:
    table = torch.randn(40, 8)
    assert captured(Model(lambda m, ids, x: x + table[: x.size(1)])).max_length == 40


def test_position_ids_are_the_second_input() -> None:
    class Positioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCAB, 8)

        def forward(self, ids: Tensor, position_ids: Tensor) -> Tensor:
            return self.embed(ids) + position_ids[..., None]

    graph = captured(Positioned(), position_ids=True)
    assert graph.position_ids is not None and graph.position_ids.name == "position_ids"
