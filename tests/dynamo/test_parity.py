"""Families and plain decoders compiled with `backend="kvpass"`: outside of a scope, and within both, as they are."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import kvpass
from tests.decoders.catalogue import DECODERS
from tests.decoders.skeleton import VOCAB
from tests.parity.harness import SEED, original_logits
from tests.parity.test_families import FAMILIES

zoo = pytest.importorskip("kvpass.models.zoo", reason="needs transformers")

pytestmark = pytest.mark.sampled(16, 4)

SERVED = ("llama", "gpt2", "mistral", "gemma2", "qwen3", "bloom", "gpt_neox", "deepseek_v3")
PLAIN = (
    "einsum, tril of ones", "window by distance, float mask", "channels first, 1x1 convolutions",
    "latent by einsum, low-rank queries", "position table with an offset", "sinks as gates", "experts, looped",
    "position_ids required",
)  # fmt: skip
OPTIONS = {"num_blocks": 96, "block_size": 8, "on_refusal": "error"}
EXACT = 1e-4  # of logits, relative to the largest


def tokens(vocab: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(seed))


def check(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= EXACT * wanted.abs().max()


class Pair:
    """A model, and itself compiled; both give logits `[B, S, V]` for token ids `[B, S]`."""

    def __init__(self, name: str) -> None:
        if name in FAMILIES:
            self.model, self.vocab = zoo.tiny(name, seed=SEED, **FAMILIES[name])
        else:
            self.model, self.vocab = DECODERS[name](SEED), VOCAB
        self.scoped: Any = torch.compile(self.model, backend="kvpass", options=OPTIONS)

    def compiled(self, ids: Tensor, start: int = 0) -> Tensor:
        """As who has a cache calls a model, with the tokens from `start` on."""
        new = ids[:, start:]
        arguments = {}
        if "position_ids" in self._demanded():
            arguments = {"position_ids": torch.arange(start, ids.shape[1]).expand_as(new)}
        with torch.no_grad():
            found = self.scoped(new, **arguments)
        return found if isinstance(found, Tensor) else found.logits

    def _demanded(self) -> list[str]:
        parameters = inspect.signature(self.model.forward).parameters
        return [name for name, parameter in parameters.items() if parameter.default is parameter.empty]

    def original(self, ids: Tensor) -> Tensor:
        """Without any cache."""
        return original_logits(self.model, ids)


@pytest.fixture(scope="module", params=[*SERVED, *PLAIN])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


def test_outside_of_scopes_it_is_the_model(pair: Pair) -> None:
    ids = tokens(pair.vocab, 2, 7)
    check(pair.compiled(ids), pair.original(ids))


def test_an_unchanged_loop_chooses_the_same_tokens(pair: Pair) -> None:
    for batch in (1, 3):
        ids = wanted = tokens(pair.vocab, batch, 21)
        with kvpass.cached(pair.scoped) as cache:
            for _ in range(12):
                logits, original = pair.compiled(ids), pair.original(wanted)[:, -1:]
                check(logits, original)
                ids = torch.cat((ids, logits[:, -1].argmax(-1, keepdim=True)), 1)
                wanted = torch.cat((wanted, original[:, -1].argmax(-1, keepdim=True)), 1)
            stats = cache.stats()
        assert torch.equal(ids, wanted)
        assert (stats.left_alone, stats.graphs, stats.recompiles) == (0, 1, 0)
        assert stats.engine is not None and stats.engine.running == batch


def test_rows_part_go_back_and_change(pair: Pair) -> None:
    ids = tokens(pair.vocab, 2, 19)
    texts = [ids, ids[[0, 0, 1]], torch.cat((ids[[0, 0, 1]], tokens(pair.vocab, 3, 1)), 1), ids[:, :11], ids[:1], ids]
    with kvpass.cached(pair.scoped, rows="all"):
        for text in texts:
            check(pair.compiled(text), pair.original(text))
    with kvpass.cached(pair.scoped):
        for text in texts:
            check(pair.compiled(text), pair.original(text)[:, -1:])


def test_tokens_are_appended_forked_cut_and_reordered(pair: Pair) -> None:
    ids = tokens(pair.vocab, 3, 30)
    with kvpass.incremental(pair.scoped) as cache:
        for start, end in ((0, 9), (9, 10), (10, 11), (11, 17)):
            check(pair.compiled(ids[:, :end], start), pair.original(ids[:, :end])[:, start:])
        assert cache.lengths == (17, 17, 17)
        cache.reorder([2, 0, 0])
        moved = ids[[2, 0, 0]]
        check(pair.compiled(moved[:, :18], 17), pair.original(moved[:, :18])[:, 17:])
        cache.truncate(12)
        check(pair.compiled(moved[:, :20], 12), pair.original(moved[:, :20])[:, 12:])
        (twin,) = cache.fork(0)
        cache.rows([twin, 1])
        moved = moved[[0, 1]]
        check(pair.compiled(moved[:, :22], 20), pair.original(moved[:, :22])[:, 20:])
        assert cache.lengths == (20, 22, 20, 22)
