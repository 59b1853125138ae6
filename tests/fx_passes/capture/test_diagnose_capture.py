"""What a forward does across tokens is named by its op and module before, and when, a capture fails."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvpass.errors import CaptureError
from kvpass.fx_passes.capture.diagnose_capture import convolutions_over_tokens, token_mixers
from tests.fx_passes.tracing import EXAMPLE, VOCAB, captured

Function = Callable[[nn.Module, Tensor], Tensor]


class Inner(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=2)
        self.pointwise = nn.Conv1d(8, 8, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Model(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.inner = Inner(function)

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(self.embed(ids))


def causal(inner: nn.Module, x: Tensor) -> Tensor:
    return inner.conv(x.transpose(1, 2))[..., : x.size(1)].transpose(1, 2)


def recurrence(inner: nn.Module, x: Tensor) -> Tensor:
    rows = [x[:, 0]]
    for i in range(1, x.size(1)):
        rows.append(torch.tanh(rows[-1]) + x[:, i])
    return torch.stack(rows, 1)


def switch(inner: nn.Module, x: Tensor) -> Tensor:
    return torch.tanh(x) if x.size(1) > 4 else x


@pytest.mark.parametrize(
    ("function", "path"),
    [
        (causal, "inner.conv"),
        (lambda m, x: F.conv1d(F.pad(x.mT, (2, 0)), m.conv.weight).mT, "inner"),
        (lambda m, x: F.conv2d(F.pad(x[:, None], (0, 0, 2, 0)), torch.ones(1, 1, 3, 1))[:, 0], "inner"),
        (lambda m, x: x * float(causal(m, x).sum()), "inner.conv"),  # breaks off on fake tensors, after the convolution
    ],
)
def test_a_convolution_over_tokens_is_named_with_its_module(function: Function, path: str) -> None:
    (refusal,) = convolutions_over_tokens(Model(function), (EXAMPLE,))
    assert refusal.module_path == path
    assert "aten.convolution.default is a convolution over the tokens, 3 wide" in refusal.reason


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.pointwise(x.mT).mT,
        lambda m, x: m.conv(x.reshape(-1, 8, 1))[:, :, 1].reshape(x.shape),  # 3 wide, over one token each
        lambda m, x: x * float(x.sum()),
    ],
)
def test_what_reads_one_token_at_a_time_is_none(function: Function) -> None:
    model = Model(function)
    before = [sorted(vars(module)) for module in model.modules()]
    assert convolutions_over_tokens(model, (EXAMPLE,)) == []
    assert [sorted(vars(module)) for module in model.modules()] == before
    assert not model.inner._forward_hooks


def test_a_loop_over_tokens_is_named() -> None:
    with pytest.raises(CaptureError, match=r"it loops over the tokens.* is called 11 times for 11 tokens and 13 times"):
        captured(Model(recurrence))


def test_a_choice_among_tokens_is_named() -> None:
    def chosen(inner: nn.Module, x: Tensor) -> Tensor:
        return switch(inner, x) + x.topk(min(4, x.size(1)), 1).values.sum(1, keepdim=True)

    with pytest.raises(CaptureError, match=r"another branch.*; aten.topk.default chooses among the tokens"):
        captured(Model(chosen))


def test_a_switch_is_no_loop() -> None:
    assert token_mixers(Model(lambda m, x: torch.tanh(x) if x.size(1) > 12 else x), (EXAMPLE,)) == ""
    assert token_mixers(Model(lambda m, x: x / 0 if x.size(1) == 99 else x), (EXAMPLE,)) == ""
