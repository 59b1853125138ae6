"""What a second attacker got wrong, who knew what the first had found."""

import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kvpass
from tests.dynamo.toys import DIM, HEADS, Bare, Masked, Toy, check, compiled, tokens, toy

pytestmark = pytest.mark.slow  # found once, mended once


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", kvpass.KvpassWarning)
        yield


class Raw(Toy):
    """Hands its caller's mask on as it is."""

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        b, s = ids.shape
        x = self.embed(ids) + self.places(torch.arange(s))
        q, k, v = self.qkv(x).view(b, s, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        a = F.scaled_dot_product_attention(3 * q, k, v, attn_mask=mask)
        return self.head(x + a.transpose(1, 2).reshape(b, s, DIM))


@pytest.mark.slow
def test_masks_of_one_graph_and_other_numbers() -> None:
    model, ids, seen = toy(Raw), tokens(2, 9), torch.ones(9, 9, dtype=torch.bool).tril()
    served = compiled(model)
    with kvpass.cached(served):
        for mask in (seen, seen.float(), torch.where(seen, 0.0, -1.0), ~seen, torch.where(seen, 0.0, float("-inf"))):
            check(model, served, ids, mask=mask)


def test_padding_on_both_sides() -> None:
    model, ids, mask = toy(Masked), tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :4], mask[1, -4:] = 0, 0
    served = compiled(model)
    for tried in (mask, mask * mask.flip(1)):
        with kvpass.cached(served, rows="all"):
            found, wanted = served(ids, attention_mask=tried), model(ids, attention_mask=tried)
            torch.testing.assert_close(found * tried[..., None], wanted * tried[..., None], rtol=1e-3, atol=1e-4)


class Limited(Bare):
    """Another function beyond a limit that it is given."""

    def forward(self, ids: Tensor, limit: int = 0) -> Any:
        logits = super().forward(ids)
        return -logits if ids.shape[1] > limit else logits


def test_a_limit_that_is_an_argument() -> None:
    model, text = toy(Limited), tokens(1, 2560)
    served = compiled(model, num_blocks=800)
    with kvpass.incremental(served) as cache:
        try:
            for limit in (2545, 2548, 2550):
                served(text[:, :30], limit=limit)
                cache.truncate(0)
            served(text[:, :2000], limit=2550)
            served(text[:, 2000:2550], limit=2550)
            found = served(text[:, 2550:], limit=2550)
        except kvpass.RefusedError:
            return
    torch.testing.assert_close(found[:, -1], model(text, 2550)[:, -1], rtol=1e-3, atol=1e-4)


def test_a_flag_that_single_tokens_read() -> None:
    model: Any = toy(Toy, lambda m, logits, ids: -logits if ids.shape[1] < 2 and m.flag else logits)
    model.flag = False
    served = compiled(model)
    with kvpass.cached(served):
        check(model, served, tokens(2, 9))
        check(model, served, tokens(2, 1))
    model.flag = True
    with kvpass.cached(served):
        check(model, served, tokens(2, 1))


def test_numbers_that_are_returned() -> None:
    def leave(model: Any, logits: Tensor, ids: Tensor) -> Any:
        return {"logits": logits, "length": ids.shape[1], "number": 1 if ids.shape[1] < 2 else 5}

    model = toy(Toy, leave)
    served = compiled(model)
    with kvpass.cached(served):
        for shape in ((2, 9), (2, 1), (1, 9)):
            found, wanted = served(tokens(*shape)), model(tokens(*shape))
            assert (found["length"], found["number"]) == (wanted["length"], wanted["number"])


class Writing(Toy):
    """Counts its calls where no version tells."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0
        self.known: dict[str, int] = defaultdict(int)
        self.register_buffer("count", torch.ones(()))

    def forward(self, ids: Tensor) -> Any:
        logits = self.head(self.body(ids))
        if self.kind == "data":
            self.count.data.mul_(2)
            return logits * self.count
        if self.kind == "dict":
            self.known["calls"] += 1
            return logits * self.known["calls"]
        self.calls += 1
        return self.uncompiled(logits)

    @torch.compiler.disable
    def uncompiled(self, logits: Tensor) -> Tensor:
        return logits * self.calls


@pytest.mark.parametrize("kind", ["data", "dict", "disabled"])
def test_writes_that_no_version_tells_of(kind: str) -> None:
    model, twin = toy(Writing, kind), toy(Writing, kind)
    served = compiled(model)
    with kvpass.cached(served):
        for length in (9, 10, 10):
            check(twin, served, tokens(2, length))
    assert (model.count, model.calls, model.known) == (twin.count, twin.calls, twin.known)
