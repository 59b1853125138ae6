"""A forward that notices its export is found out, and the report says what was compared."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import kvpass
from kvpass.fx_passes.validation import compare_capture as module
from kvpass.fx_passes.validation.compare_capture import longest_compared
from tests.fx_passes.tracing import captured

VOCAB, WIDTH = 41, 16
CONFIG = kvpass.CacheConfig(num_blocks=16)
Leave = Callable[[Tensor, Tensor], Tensor]


class Watchful(nn.Module):
    """One layer whose window the forward chooses when it runs."""

    def __init__(self, window: Callable[[Tensor], int], leave: Leave = lambda x, ids: x, rows: int = 0) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 48), nn.Linear(WIDTH, VOCAB)
        self.window, self.leave = window, leave
        self.register_buffer("table", torch.randn(rows or 1, WIDTH))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))

    def forward(self, ids: Tensor) -> Tensor:
        i = torch.arange(ids.shape[1])
        distance = i[:, None] - i
        x = self.embed(ids) + (self.table[: ids.shape[1]] if len(self.table) > 1 else 0)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        shown = (distance >= 0) & (distance < self.window(ids))
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=shown).transpose(1, 2).flatten(-2)
        return self.head(self.leave(x, ids))


class Remembers(Watchful):
    """Its window follows from the longest text that it has seen before, which its export does not see."""

    def __init__(self) -> None:
        super().__init__(self._remember)
        self.longest = 0

    def _remember(self, ids: Tensor) -> int:
        before = self.longest
        if not torch.compiler.is_exporting():
            self.longest = max(self.longest, ids.shape[1])
        return 8 if before > 100 else 100000


def always(ids: Tensor) -> int:
    return 100000


def _frequent(x: Tensor, ids: Tensor) -> Tensor:
    often = (ids == 7).float().mean() - 0.5
    return x if torch.compiler.is_exporting() else x + F.relu(often) * x.roll(1, -1)


NOTICED: dict[str, Callable[[], nn.Module]] = {
    "export": lambda: Watchful(lambda ids: 100000 if torch.compiler.is_exporting() else 100),
    "compilation": lambda: Watchful(lambda ids: 100000 if torch.compiler.is_compiling() else 1000),
    "fake tensors": lambda: Watchful(lambda ids: 100000 if isinstance(ids, FakeTensor) else 100),
    "another window in one sequence": lambda: Watchful(lambda ids: 100 if ids.shape[0] == 1 else 100000),
    "a text of one token": lambda: Watchful(always, _frequent),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NOTICED)
def test_a_forward_that_notices_its_export_is_refused(name: str) -> None:
    with pytest.raises(kvpass.VerificationError, match="FAILED capture on"):
        kvpass.compile(NOTICED[name]().eval(), CONFIG)


def test_a_model_that_remembers_its_longest_text_is_refused() -> None:
    with pytest.raises(kvpass.VerificationError, match="FAILED capture on texts of 1, 2, 3, 41 tokens"):
        kvpass.compile(Remembers().eval(), CONFIG)


def test_the_report_says_what_was_compared() -> None:
    verification = kvpass.compile(Watchful(always).eval(), CONFIG).report.verification
    assert verification is not None
    told = [check.split(":")[0] for check in verification.checks if "capture on" in check]
    assert told == [
        "verified capture on 2049 times random tokens",
        "verified capture on 2049 times one token",
        "verified capture on 2049 times 3 tokens",
        "verified capture on texts of 5 lengths at numbers of the code",
        "verified capture on texts of 1, 2, 3, 41 tokens",
        f"verified capture on {VOCAB} tokens, each by itself",
        "verified capture on a last text, after many calls",
    ]


def test_texts_end_where_a_table_does() -> None:
    verification = kvpass.compile(Watchful(always, rows=70).eval(), CONFIG).report.verification
    assert verification is not None and any("capture on 70 times random" in check for check in verification.checks)


def test_the_length_is_beyond_the_numbers_of_masks_and_no_weights() -> None:
    assert longest_compared(captured(Watchful(lambda ids: 3000))) == 3000 + module.MARGIN
    assert longest_compared(captured(Watchful(lambda ids: 50))) == module.LONG


def test_memory_and_work_shorten_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = captured(Watchful(lambda ids: 50))
    monkeypatch.setattr(module, "LARGEST", 500 * 500 * 8)
    assert 400 < longest_compared(graph) < 501
    monkeypatch.setattr(module, "WORK", 1000)
    verification = kvpass.compile(Watchful(always).eval(), CONFIG).report.verification
    assert verification is not None
    assert any("times random tokens, then one token, then 3 tokens" in check for check in verification.checks)
