"""What is advised after a failed capture fits what was raised."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvpass.errors import CaptureError
from tests.fx_passes.tracing import captured


class Model(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.embed = nn.Embedding(19, 8)
        self.function = function

    def forward(self, ids: Tensor) -> Tensor:
        return self.function(self, ids, self.embed(ids))


def _raises(model: Any, ids: Tensor, x: Tensor) -> Tensor:
    raise ValueError("a trouble of its own")


BY_VALUE, NO_RULE = "data-dependent Python control flow", "only works on real numbers"
ADVICE: dict[str, tuple[Callable[..., Any], str]] = {
    "a branch": (lambda m, ids, x: x * 2 if ids.sum() > 3 else x, BY_VALUE),
    "an item": (lambda m, ids, x: x[:, : int(ids[0, 0].item()) + 1], BY_VALUE),
    "numpy": (lambda m, ids, x: x + torch.from_numpy(ids.numpy()).float().mean(), NO_RULE),
    "a tensor by .data": (lambda m, ids, x: x + m.embed.weight.data.sum(), r"takes a tensor by \.data"),
    "shapes": (lambda m, ids, x: x @ x, r"the model itself raises RuntimeError for token ids int64 \[2, 11\]"),
    "an error of the model": (_raises, r"trouble of its own\nthe model itself raises ValueError"),
    "a missing attribute": (lambda m, ids, x: m.missing, "the model itself raises AttributeError"),
}


@pytest.mark.parametrize("name", ADVICE)
def test_advice_fits_the_error(name: str) -> None:
    function, words = ADVICE[name]
    with pytest.raises(CaptureError, match=words) as caught:
        captured(Model(function))
    if words != BY_VALUE:
        assert BY_VALUE not in str(caught.value)
