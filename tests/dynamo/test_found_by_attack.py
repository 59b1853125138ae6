"""What an attacker who read the scopes got wrong: each is served right, left alone, or refused."""

import gc
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvpass
from kvpass.dynamo.graph_engines import engines_of
from tests.dynamo.toys import DIM, HEADS, Bare, Masked, Toy, check, compiled, is_free, tokens, toy

pytestmark = pytest.mark.slow  # found once, mended once


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", kvpass.KvpassWarning)
        yield


def test_the_same_rows_after_the_weights_have_changed() -> None:
    model: Any = toy()
    served, ids = compiled(model), tokens(2, 20)
    with kvpass.cached(served):
        check(model, served, ids)
        model.qkv.weight.mul_(1.5)
        check(model, served, ids)
        check(model, served, ids[:1])
        model.qkv.weight.mul_(0.7)
        check(model, served, torch.cat((ids[:1], tokens(2, 20, seed=4))))
    with kvpass.incremental(served) as cache:
        served(ids)
        model.qkv.weight.mul_(1.5)
        cache.truncate(19)
        torch.testing.assert_close(served(ids[:, 19:]), model(ids)[:, 19:], rtol=1e-3, atol=1e-4)


def test_autocast_is_left_alone_and_mixes_nothing() -> None:
    model = toy()
    served, ids = compiled(model), tokens(2, 20)
    with kvpass.cached(served) as cache, torch.autocast("cpu", torch.bfloat16):
        served(ids[:, :12])
        assert cache.stats().left_alone == 1
    with kvpass.cached(served):
        check(model, served, ids[:, :13])
    engine = kvpass.compile(toy(), kvpass.CacheConfig(num_blocks=16, block_size=4))
    prompt = ids[:1, :9].tolist()
    plain = engine.generate(prompt, 8)
    engine.clear_prefix_cache()
    with torch.autocast("cpu", torch.bfloat16):
        assert engine.generate(prompt, 8) == plain


def test_padding_is_tried_on_long_texts_on_both_sides() -> None:
    model: Any = toy(Masked)
    model.places.weight[:16] = 0  # the first positions are all alike
    served = compiled(model)
    for length, pad in ((9, 3), (30, 3)):
        ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.int64)
        mask[1, :pad] = 0
        with kvpass.cached(served) as cache:
            check(model, served, ids, attention_mask=mask)
            assert cache.stats().left_alone == 1
        with kvpass.cached(served, rows="all"):
            behind = mask.flip(1)
            found, wanted = served(ids, attention_mask=behind), model(ids, attention_mask=behind)
            torch.testing.assert_close(found * behind[..., None], wanted * behind[..., None], rtol=1e-3, atol=1e-4)
            check(model, served, ids, attention_mask=mask)


class Deaf(Toy):
    """Takes a mask, and looks at its positions alone."""

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Any:
        b, s = ids.shape
        x = self.embed(ids) + self.places(position_ids)
        q, k, v = self.qkv(x).view(b, s, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        a = F.scaled_dot_product_attention(3 * q, k, v, is_causal=True)
        return self.head(x + a.transpose(1, 2).reshape(b, s, DIM))


def test_a_mask_that_nobody_looks_at() -> None:
    model = toy(Deaf)
    served, ids, mask = compiled(model), tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with kvpass.cached(served):
        check(model, served, ids, attention_mask=mask, position_ids=positions)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("where", ["model", "part", "before"])
def test_hooks_that_come_later(where: str) -> None:
    model: Any = toy()
    served = compiled(model)
    with kvpass.cached(served):
        check(model, served, tokens(2, 9))
        if where == "before":
            model.register_forward_pre_hook(lambda module, args: (args[0].flip(1),))
        else:
            hooked = model if where == "model" else model.qkv
            hooked.register_forward_hook(lambda module, args, output: output * 2)
        check(model, served, tokens(2, 10))
        check(model, served, tokens(2, 9))


def at_five_rows(model: Any, logits: Tensor, ids: Tensor) -> Tensor:
    return -logits if ids.shape[0] == 5 else logits


def at_some_length(model: Any, logits: Tensor, ids: Tensor) -> Tensor:
    return -logits if ids.shape[1] == int(5.1 * 10) else logits


@pytest.mark.parametrize("leave", [at_five_rows, at_some_length])
def test_branches_on_one_number(leave: Any) -> None:
    model = toy(Toy, leave)
    served = compiled(model)
    with kvpass.cached(served):
        for batch, length in ((5, 9), (5, 5), (4, 4), (2, 51), (51, 2), (1, 51)):
            check(model, served, tokens(batch, length))


def test_a_branch_on_the_length_of_the_whole_sequence() -> None:
    limit = [2550]
    model = toy(Bare, lambda m, logits, ids: -logits if ids.shape[1] > limit[0] else logits)
    served, text = compiled(model, num_blocks=800), tokens(1, 2560)
    with kvpass.incremental(served):
        served(text[:, :2000])
        served(text[:, 2000:2550])
        with pytest.raises(kvpass.RefusedError, match="another function for sequences of 2560"):
            served(text[:, 2550:])


def test_what_is_returned_is_of_the_call() -> None:
    def leave(model: Any, logits: Tensor, ids: Tensor) -> Any:
        return {"logits": logits, "ids": ids, "kind": "one" if ids.shape[1] < 2 else "many"}

    model = toy(Toy, leave)
    served = compiled(model)
    with kvpass.cached(served):
        for shape in ((1, 4), (1, 1), (2, 5)):
            found, wanted = served(tokens(*shape)), model(tokens(*shape))
            assert torch.equal(found["ids"], wanted["ids"]) and found["kind"] == wanted["kind"]
            torch.testing.assert_close(found["logits"][:, -1], wanted["logits"][:, -1], rtol=1e-3, atol=1e-4)


class Doubling(Toy):
    """Its buffer, or its attribute, is another after each call."""

    def __init__(self, in_buffer: bool) -> None:
        super().__init__()
        self.in_buffer, self.number = in_buffer, 1.0
        self.register_buffer("count", torch.ones(()))

    def forward(self, ids: Tensor) -> Any:
        logits = self.head(self.body(ids)) * self.count * self.number
        if self.in_buffer:
            self.count.mul_(2)
        else:
            self.number = self.number * 2
        return logits


@pytest.mark.parametrize("in_buffer", [True, False])
def test_the_state_of_a_model_is_its_own(in_buffer: bool) -> None:
    model, twin = toy(Doubling, in_buffer), toy(Doubling, in_buffer)
    served = compiled(model)
    with kvpass.cached(served):
        for length in (9, 10, 10):
            check(twin, served, tokens(2, length))
    assert model.count == twin.count and model.number == twin.number


class Output(Toy):
    """Modules of these names are in many models."""

    def __init__(self) -> None:
        super().__init__()
        self.output, self.inputs, self.traced = nn.Linear(DIM, 37), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, ids: Tensor) -> Any:
        return self.output(self.traced(self.inputs(self.body(ids))))


def test_names_of_modules_are_free() -> None:
    model = toy(Output)
    served = compiled(model, on_refusal="error")
    with kvpass.cached(served):
        check(model, served, tokens(2, 9))


def test_one_bad_call_spoils_nothing() -> None:
    model = toy()
    served, ids = compiled(model), tokens(2, 20)
    with kvpass.incremental(served) as cache:
        served(ids[:, :9])
        with pytest.raises((kvpass.KvpassError, RuntimeError)):
            served(ids[:, 9:10].short())
        torch.testing.assert_close(served(ids[:, 9:10]), model(ids[:, :10])[:, 9:], rtol=1e-3, atol=1e-4)
        with torch.compiler.set_stance("force_eager"), pytest.raises(kvpass.RefusedError, match="no graph"):
            served(ids[:, 10:11])
        torch.testing.assert_close(served(ids[:, 10:11]), model(ids[:, :11])[:, 10:], rtol=1e-3, atol=1e-4)
        assert cache.lengths == (11, 11)
        for wrong in (lambda: cache.rows([1.5]), lambda: cache.truncate(1.5)):  # type: ignore[list-item, arg-type]
            with pytest.raises(kvpass.InputError):
                wrong()
        cache.reorder(torch.tensor([[[1, 0]]]))
    assert is_free(model)


def test_what_a_hook_keeps_is_left_alone() -> None:
    model: Any = toy()
    kept: list[Tensor] = []
    model.qkv.register_forward_hook(lambda module, args, output: kept.append(output))
    served = compiled(model)
    with kvpass.cached(served):
        check(model, served, tokens(2, 4))
        check(model, served, tokens(2, 5))
    check(model, served, tokens(2, 4))
    assert all(type(tensor) is Tensor for tensor in kept)


def test_a_tensor_made_in_inference_mode() -> None:
    model: Any = toy()
    with torch.inference_mode():
        model.scales = torch.full_like(model.scales, 2.0)
    served = compiled(model)
    with kvpass.cached(served):
        check(model, served, tokens(2, 9))


def test_a_scope_that_is_left_in_another_thread() -> None:
    model = toy()
    served = compiled(model)

    def generator() -> Iterator[Any]:
        with kvpass.cached(served):
            yield served(tokens(2, 9))

    open_scope = generator()
    next(open_scope)
    thread = threading.Thread(target=open_scope.close)  # type: ignore[attr-defined]
    thread.start()
    thread.join()
    assert is_free(model) and served(tokens(1, 5)).shape == (1, 5, 37)
    with kvpass.cached(served):
        check(model, served, tokens(2, 9))


def test_a_model_is_freed_with_its_pool() -> None:
    model = toy()
    served = compiled(model)
    with kvpass.cached(served):
        served(tokens(2, 9))
    gone = weakref.ref(model)
    del model, served
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


def test_threads_that_all_begin_at_once() -> None:
    model = toy()
    served = compiled(model)
    faults: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            scope = kvpass.cached(served) if seed % 2 else kvpass.incremental(served)
            with torch.no_grad(), scope:
                found = served(tokens(2, 9, seed=seed))[:, -1]
                torch.testing.assert_close(found, model(tokens(2, 9, seed=seed))[:, -1], rtol=1e-3, atol=1e-4)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and is_free(model)


@pytest.mark.slow
def test_pools_do_not_pile_up() -> None:
    def leave(model: Any, logits: Tensor, ids: Tensor) -> Tensor:
        return logits * model.factor

    model: Any = toy(Toy, leave)
    for factor in range(1, 8):
        model.factor = float(factor)
        served = compiled(model)
        with kvpass.cached(served):
            check(model, served, tokens(2, 9))
    assert len(engines_of(model).found) <= 5
