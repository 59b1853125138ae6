"""A squeeze without a dim holds for one sequence and one token too."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kvpass
from tests.decoders.catalogue import DECODERS
from tests.decoders.skeleton import VOCAB
from tests.fx_passes.tracing import captured
from tests.parity.harness import CONFIG, SEED, assert_tokens_equal, ragged_prompts

SQUEEZED: dict[str, Callable[[Tensor], Tensor]] = {
    "heads of one": lambda x: x.unsqueeze(1).squeeze(),
    "a norm": lambda x: x / x.norm(dim=-1, keepdim=True).squeeze()[..., None],
    "the batch by number": lambda x: x.unsqueeze(2).squeeze(2).squeeze(0),
    "several": lambda x: x[:, :, None, None].squeeze((0, 2, 3)),
}


class Squeezes(nn.Module):
    def __init__(self, squeeze: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.squeeze = DECODERS["GQA by repeat_interleave"](SEED), squeeze

    def forward(self, ids: Tensor) -> Tensor:
        return self.squeeze(self.inner(ids)).reshape(*ids.shape, -1)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", SQUEEZED)
def test_one_sequence_and_one_token_keep_their_dims(name: str) -> None:
    model = Squeezes(SQUEEZED[name]).eval()
    graph = captured(model)
    for shape in ((3, 5), (1, 5), (1, 1)):
        ids = torch.arange(shape[0] * shape[1]).reshape(shape)
        torch.testing.assert_close(graph.module(ids)[0], model(ids))


@pytest.mark.slow
def test_such_a_model_is_served() -> None:
    model = Squeezes(SQUEEZED["heads of one"]).eval()
    assert_tokens_equal(model, kvpass.compile(model, CONFIG), ragged_prompts(VOCAB))
