"""Scopes of a compiled model: what they refuse, what they leave alone, and that nothing is lost on the way."""

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvpass
from kvpass.dynamo.graph_engines import engines_of
from tests.dynamo.toys import OPTIONS, VOCAB, Chatty, Toy, check, compiled, is_free, tokens, toy


class Averaging(Toy):
    """Each token sees the mean of all of them."""

    def forward(self, ids: Tensor) -> Any:
        x = self.body(ids)
        return self.head(x + x.mean(1, keepdim=True))


@pytest.fixture(scope="module")
def plain() -> tuple[nn.Module, Any]:
    model = toy()
    return model, compiled(model)


def test_a_model_that_was_not_compiled_by_the_backend() -> None:
    for served in (toy(), torch.compile(toy(), backend="eager"), lambda ids: ids):
        with pytest.raises(kvpass.InputError, match=r"torch\.compile\(model, backend=\"kvpass\"\)"):
            kvpass.cached(served)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"dtyp": "int8"}, "'dtyp' is unknown"), ({"on_refusal": "no"}, "on_refusal"), ({"inner": "none"}, "inner"),
     ({"dtype": "int3"}, "dtype"), ({"inner": "kvpass"}, "inner")],
)  # fmt: skip
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    served = torch.compile(toy(), backend="kvpass", options=options)
    with pytest.raises(kvpass.ConfigError, match=words):
        kvpass.cached(served)
    with pytest.raises(Exception, match=words):  # Dynamo wraps it
        served(tokens(1, 3))


def test_training_mode(plain: tuple[nn.Module, Any]) -> None:
    model, served = plain
    model.train()
    with pytest.raises(kvpass.InputError, match="training mode"), kvpass.cached(served):
        pass
    model.eval()
    with kvpass.cached(served):
        check(model, served, tokens(1, 5))
        model.train()
        with pytest.raises(kvpass.InputError, match="training mode"):
            served(tokens(1, 5))
        model.eval()
        check(model, served, tokens(1, 6))
    assert is_free(model)


def test_a_scope_is_entered_once_and_not_within_another(plain: tuple[nn.Module, Any]) -> None:
    model, served = plain
    scope = kvpass.cached(served)
    with scope:
        with pytest.raises(kvpass.InputError, match="in a scope of this model already"), kvpass.incremental(served):
            pass
        check(model, served, tokens(2, 5))
    with pytest.raises(kvpass.InputError, match="entered once"), scope:
        pass
    with pytest.raises(kvpass.InputError, match="not entered"):
        kvpass.incremental(served).truncate(3)
    with pytest.raises(kvpass.InputError, match="rows='first'"):
        kvpass.cached(served, rows="first")  # type: ignore[arg-type]


def test_a_scope_belongs_to_its_thread(plain: tuple[nn.Module, Any]) -> None:
    model, served = plain
    found: list[Any] = []

    def elsewhere(cache: Any) -> None:
        with torch.no_grad():
            found.append(served(tokens(1, 5)).shape)
        try:
            cache.stats()
        except kvpass.InputError as error:
            found.append(str(error))

    with kvpass.cached(served) as cache:
        check(model, served, tokens(1, 5))
        thread = threading.Thread(target=elsewhere, args=(cache,))
        thread.start()
        thread.join()
    assert found[0] == (1, 5, VOCAB) and "another thread" in found[1]


def test_what_is_no_token_or_too_long_is_refused_and_nothing_is_lost(plain: tuple[nn.Module, Any]) -> None:
    model, served = plain
    with kvpass.cached(served):
        check(model, served, tokens(2, 9))
        with pytest.raises(kvpass.InputError, match="token 99 is none of the model's"):
            served(torch.full((1, 3), 99))
        with pytest.raises(kvpass.InputError, match="longest may have 64"):
            served(tokens(1, 70))
        check(model, served, tokens(2, 9))
    with kvpass.incremental(served) as cache:
        served(tokens(2, 9))
        for batch, words in ((3, "3 rows, and the scope 2"), (1, "1 rows, and the scope 2")):
            with pytest.raises(kvpass.InputError, match=words):
                served(tokens(batch, 1))
        for wrong in (lambda: cache.rows([2]), lambda: cache.fork(-1), lambda: cache.reorder([0, 2])):
            with pytest.raises(kvpass.InputError, match="there"):
                wrong()
        with pytest.raises(kvpass.InputError, match="cannot be cut to 10"):
            cache.truncate(10)
        with pytest.raises(kvpass.InputError, match="twice"):
            cache.rows([0, 0])
        assert cache.lengths == (9, 9)
        with pytest.raises(kvpass.InputError, match="longest may have 64"):
            served(tokens(2, 60))
        assert cache.lengths == (9, 9)
    assert is_free(model)


def test_blocks_are_given_back_by_an_exception_as_well(plain: tuple[nn.Module, Any]) -> None:
    model, served = plain
    with pytest.raises(KeyError), kvpass.cached(served):
        check(model, served, tokens(3, 17))
        raise KeyError
    assert is_free(model)
    with torch.no_grad():
        assert served(tokens(3, 17)).shape == (3, 17, VOCAB)


def test_a_pool_that_is_too_small() -> None:
    model = toy()
    served = compiled(model, num_blocks=6)
    with kvpass.cached(served):
        check(model, served, tokens(1, 20))
        with pytest.raises(kvpass.InputError, match="the pool allow no more"):
            served(tokens(1, 30))
        check(model, served, tokens(3, 15))  # one after the other
    assert is_free(model)


def test_a_graph_break_is_left_alone_and_said_once() -> None:
    model = toy(Chatty)
    served = compiled(model)
    with kvpass.cached(served) as cache:
        with pytest.warns(kvpass.KvpassWarning, match="several graphs"):
            check(model, served, tokens(1, 5))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check(model, served, tokens(2, 6))
        stats = cache.stats()
    assert (stats.calls, stats.left_alone, stats.engine) == (2, 2, None)
    with pytest.raises(kvpass.RefusedError, match="several graphs"), kvpass.incremental(served):
        served(tokens(1, 5))
    strict = compiled(model, on_refusal="error")
    with pytest.raises(kvpass.RefusedError, match="several graphs"), kvpass.cached(strict):
        strict(tokens(1, 5))


def test_what_cannot_be_proven_is_left_alone() -> None:
    model = toy(Averaging)
    served = compiled(model)
    with kvpass.cached(served), pytest.warns(kvpass.KvpassWarning, match="cannot prove"):
        check(model, served, tokens(2, 9))
    strict = compiled(model, on_refusal="error")
    with pytest.raises(kvpass.RefusedError, match="cannot prove"), kvpass.cached(strict):
        strict(tokens(2, 9))


def one_row(model: Any, logits: Tensor, ids: Tensor) -> Tensor:
    """Another function for a batch of one."""
    return -logits if ids.shape[0] == 1 else logits


def longer(model: Any, logits: Tensor, ids: Tensor) -> Tensor:
    """Another function for long sequences."""
    return -logits if ids.shape[1] > 20 else logits


def first_token(model: Any, logits: Tensor, ids: Tensor) -> Tensor:
    """Another function where the first token is even."""
    return -logits if int(ids[0, 0]) % 2 else logits


@pytest.mark.sampled(3)
@pytest.mark.parametrize("leave", [one_row, longer, first_token])
def test_a_forward_that_branches_is_served_right_or_left_alone(leave: Any) -> None:
    model = toy(Toy, leave)
    served = compiled(model)
    with warnings.catch_warnings(), kvpass.cached(served):
        warnings.simplefilter("ignore", kvpass.KvpassWarning)
        for batch, length in ((2, 5), (1, 5), (1, 6), (2, 19), (2, 22), (1, 30), (3, 1)):
            for seed in range(2):
                check(model, served, tokens(batch, length, seed=seed))


def test_a_hook_of_the_model_counts() -> None:
    model = toy()
    model.register_forward_hook(lambda module, args, output: output * 2)
    served = compiled(model)
    with kvpass.cached(served) as cache:
        for ids in (tokens(2, 9), tokens(1, 4)):
            check(model, served, ids)
        assert cache.stats().left_alone == 0


@pytest.mark.slow
@pytest.mark.slow
def test_weights_that_change_within_a_scope() -> None:
    model: Any = toy()
    served = compiled(model)
    ids = tokens(2, 9)
    with kvpass.cached(served):
        check(model, served, ids)
        with torch.no_grad():
            model.qkv.weight.mul_(1.5)
        check(model, served, torch.cat((ids, tokens(2, 1)), 1))
        model.head = nn.Linear(model.head.in_features, VOCAB).eval()
        check(model, served, ids)
        model.scales.mul_(3)
        check(model, served, ids)
        model.scales = torch.full_like(model.scales, 0.5)
        check(model, served, ids)
    assert len(engines_of(model).found) == 1 and is_free(model)


@pytest.mark.slow
def test_two_models_and_four_threads() -> None:
    models = [toy(seed=seed) for seed in range(2)]
    served = [compiled(model) for model in models]
    with kvpass.cached(served[0]), kvpass.incremental(served[1]):
        ids = tokens(2, 9)
        for length in range(5, 9):
            check(models[0], served[0], ids[:, :length])
            with torch.no_grad():
                found = served[1](ids[:, :5] if length == 5 else ids[:, length - 1 : length])
                wanted = models[1](ids[:, :length])
            torch.testing.assert_close(found[:, -1], wanted[:, -1], rtol=1e-3, atol=1e-4)
    faults: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            with kvpass.cached(served[seed % 2]):
                for length in range(3, 30):
                    check(models[seed % 2], served[seed % 2], tokens(2, 30, seed=seed)[:, :length])
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert all(is_free(model) for model in models)


def test_nothing_is_compiled_anew_while_serving(plain: tuple[nn.Module, Any]) -> None:
    model, served = plain
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad(), kvpass.cached(served) as cache:
        served(tokens(2, 9))
        served(tokens(1, 10))
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for call in range(1000):
            batch, length = (int(torch.randint(1, most, (), generator=generator)) for most in (5, 40))
            ids = tokens(batch, length, seed=call % 7)
            if call % 100 == 0:
                check(model, served, ids)
            else:
                served(ids)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
        assert (cache.stats().recompiles, cache.stats().left_alone) == (0, 0)


def test_compiled_in_place_and_copied() -> None:
    model = toy()
    model.compile(backend="kvpass", options=OPTIONS)
    twin = copy.deepcopy(toy())
    with kvpass.cached(model) as cache:
        for ids in (tokens(2, 9), tokens(1, 4)):
            check(twin, model, ids)
        assert cache.stats().left_alone == 0
    assert engines_of(copy.deepcopy(model)).found == {}


class Moody(Toy):
    """Another graph for each mood."""

    def forward(self, ids: Tensor, mood: str = "a") -> Any:
        return super().forward(ids) * ord(mood)


@pytest.mark.slow
@pytest.mark.slow
def test_an_engine_whose_rows_wait_is_kept_while_others_are_made() -> None:
    model = toy(Moody)
    one, other = compiled(model), compiled(model)
    with kvpass.cached(one) as cache:
        check(model, one, tokens(2, 9))
        with kvpass.cached(other):
            for mood in "bcdefg":
                check(model, other, tokens(2, 9), mood=mood)
        check(model, one, torch.cat((tokens(2, 9), tokens(2, 1)), 1))
        stats = cache.stats()
        assert (stats.left_alone, stats.graphs) == (0, 1) and stats.engine is not None
        assert stats.engine.decode_tokens == 2  # the rows went on where they stood
    assert len(engines_of(model).found) <= 6
