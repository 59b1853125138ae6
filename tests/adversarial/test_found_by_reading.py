"""What an attacker found who read the rules: each was served wrong once, and is refused or followed now."""

import math
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvpass

pytestmark = pytest.mark.slow  # found once, mended once

CONFIG = kvpass.CacheConfig(block_size=16, num_blocks=64)
TABLE = torch.eye(16)
settings = types.ModuleType("settings")
settings.LIMIT = 100  # type: ignore[attr-defined]
Hit = Callable[[Any, Any], bool]


class Plain(nn.Module):
    """One layer, with places for an attacker."""

    LIMIT = 100

    def __init__(self, vocab: int = 41) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vocab = vocab
        self.embed, self.places = nn.Embedding(vocab, 16), nn.Embedding(4096, 16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, vocab)

    def scores(self, scores: Tensor, ids: Tensor) -> Tensor:
        return scores

    def rest(self, x: Tensor, ids: Tensor) -> Tensor:
        return x

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places(torch.arange(ids.shape[1]))
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        scores = self.scores(q @ k.transpose(-1, -2) / math.sqrt(8), ids).masked_fill(~seen, -math.inf)
        x = x + self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return self.head(self.rest(x, ids))


class RowShift(Plain):
    def scores(self, scores: Tensor, ids: Tensor) -> Tensor:
        return scores + torch.where(torch.arange(ids.shape[1]) >= 200, 1e9, 0.0)[:, None]


class ShiftByData(Plain):
    def scores(self, scores: Tensor, ids: Tensor) -> Tensor:
        return scores + (ids == 7).float()[:, None, :, None] * 1e9


class ShiftByOtherScores(Plain):
    def scores(self, scores: Tensor, ids: Tensor) -> Tensor:
        return scores - (scores * 1e9).amax(-1, keepdim=True)


class Experts(Plain):
    """Rows sorted by their expert, and multiplied group by group."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(4, 16, 16))

    def sorted_by(self, experts: Tensor) -> Tensor:
        return experts

    def ends(self, experts: Tensor) -> Tensor:
        return F.one_hot(experts, 4).sum(0).cumsum(0).to(torch.int32)

    def rest(self, x: Tensor, ids: Tensor) -> Tensor:
        rows, experts = x.flatten(0, 1), (ids % 4).flatten()
        order = torch.argsort(self.sorted_by(experts), stable=True)
        made = torch._grouped_mm(rows[order].bfloat16(), self.weights.bfloat16(), self.ends(experts)).float()
        return torch.zeros_like(rows).index_copy(0, order, made).view_as(x)


class SortedByTruth(Experts):
    def sorted_by(self, experts: Tensor) -> Tensor:
        return experts.to(torch.bool)


class RoundedEnds(Experts):
    def ends(self, experts: Tensor) -> Tensor:
        return F.one_hot(experts, 4).sum(0).cumsum(0).to(torch.bfloat16).to(torch.int32)


class WeighedCounts(Experts):
    def ends(self, experts: Tensor) -> Tensor:
        weights = (1 + experts - experts.roll(1)).float()
        return torch.bincount(experts, weights=weights, minlength=4).cumsum(0).to(torch.int32)


class RoundedRows(Plain):
    def rest(self, x: Tensor, ids: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        (chosen,) = torch.where(ids.flatten() % 2 == 0)
        chosen = chosen.to(torch.bfloat16).long()
        return rows.index_add(0, chosen, rows[chosen].tanh()).view_as(x)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "build", [RowShift, ShiftByOtherScores, ShiftByData, SortedByTruth, RoundedEnds, WeighedCounts, RoundedRows]
)
def test_refused(build: type[nn.Module]) -> None:
    with pytest.raises(kvpass.RefusedError):
        kvpass.compile(build().eval(), CONFIG, verify=False)


class Slots:
    __slots__ = ("limit",)

    def __init__(self) -> None:
        self.limit = 100


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.limit = 100


SLOTS, ARRAY = Slots(), np.array([100, 103])
HITS: dict[str, Hit] = {
    "an attribute of the class": lambda model, n: n == model.LIMIT,
    "slots": lambda model, n: n == SLOTS.limit,
    "an array": lambda model, n: n in ARRAY,
    "fractions": lambda model, n: 99.5 < n < 100.5,
    "an imported module": lambda model, n: n == settings.LIMIT,  # type: ignore[attr-defined]
    "a module that is never called": lambda model, n: n == model.held.limit,
}


class AtOneLength(Plain):
    def __init__(self, hit: Hit) -> None:
        super().__init__()
        self.hit, self.held = hit, Held()

    def rest(self, x: Tensor, ids: Tensor) -> Tensor:
        n = ids.shape[1]
        return x * 2 if type(n) is int and self.hit(self, n) else x


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", HITS)
def test_another_case_at_a_length_that_the_code_reaches(name: str) -> None:
    with pytest.raises(kvpass.VerificationError, match="numbers of the code"):
        kvpass.compile(AtOneLength(HITS[name]).eval(), CONFIG)


def test_a_few_weights_of_less_precision_do_not_loosen_the_bound() -> None:
    class Loose(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.nothing = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))

        def forward(self, ids: Tensor) -> Tensor:
            logits = super().forward(ids) + self.nothing
            return logits + logits.roll(1, -1) * 0.02 if type(ids.shape[1]) is int else logits

    with pytest.raises(kvpass.VerificationError, match="bound 5e-04"):
        kvpass.compile(Loose().eval(), CONFIG)


class OfClass(Plain):
    table = torch.eye(16)

    def rest(self, x: Tensor, ids: Tensor) -> Tensor:
        return x @ self.table


class Global(Plain):
    def rest(self, x: Tensor, ids: Tensor) -> Tensor:
        return x @ TABLE


def step_of_a_fused_optimizer(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    optimizer.step()


def one_row_of_a_fused_optimizer(model: Any) -> None:
    optimizer = torch.optim.SGD([model.embed.weight], lr=9.0, fused=True)
    model(torch.tensor([[5]])).square().sum().backward()
    optimizer.step()


def scale(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(1.5)


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], object], bool]] = {
    "a fused optimizer": (Plain, step_of_a_fused_optimizer, True),
    "one row by a fused optimizer": (lambda: Plain(3000), one_row_of_a_fused_optimizer, True),
    "a vector of parameters": (
        Plain,
        lambda m: nn.utils.vector_to_parameters(1.5 * nn.utils.parameters_to_vector(m.parameters()), m.parameters()),
        False,
    ),
    "a tensor of the class": (OfClass, lambda m: scale(OfClass.table), False),
    "a tensor of a variable": (Global, lambda m: scale(TABLE), False),
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("midway", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_followed_or_an_error(name: str, midway: bool) -> None:
    build, change, followed = CHANGES[name]
    model = build().eval()
    engine = kvpass.compile(model, CONFIG, verify=False)
    prompt = [(7 * i + 5) % 41 for i in range(40)]
    options = kvpass.Sampling(ignore_eos=True, logprobs=model.vocab)
    handle = engine.submit(prompt, 4, options)
    try:
        if midway:
            next(iter(handle))
            change(model)
            start = handle.num_tokens
        else:
            handle.result()
            change(model)
            handle, start = engine.submit(prompt, 4, options), 0
        out = handle.result()
    except kvpass.WeightsChangedError:
        assert not followed
        return
    for place in range(start, 4):
        with torch.no_grad():
            wanted = model(torch.tensor([prompt + out[:place]]))[0, -1].log_softmax(-1)
        found = dict(handle.logprobs[place].top)
        assert (torch.tensor([found[i] for i in range(model.vocab)]) - wanted).abs().max() < 1e-3
    assert sys.getprofile() is None
