"""What a model may be called with in a scope, and what it gives."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvpass
from tests.dynamo.toys import VOCAB, Given, Losing, Masked, Toy, check, compiled, tokens, toy


def test_an_argument_that_is_no_token_is_left_alone() -> None:
    model = toy(Losing)
    served = compiled(model)
    ids = tokens(2, 9)
    with kvpass.cached(served) as cache:
        check(model, served, ids)
        with pytest.warns(kvpass.KvpassWarning, match="given targets"), torch.no_grad():
            logits, loss = served(ids, targets=ids)
        torch.testing.assert_close(loss, model(ids, ids)[1])
        assert logits.shape == (2, 9, VOCAB)
        check(model, served, ids)
        assert cache.stats().left_alone == 1


def test_other_outputs_cannot_be_used() -> None:
    model = toy(Toy, lambda model, logits, ids: {"logits": logits, "hidden": logits * 2, "length": ids.shape[1]})
    served = compiled(model)
    with torch.no_grad(), kvpass.cached(served):
        for ids in (tokens(2, 9), tokens(1, 4)):
            check(model, served, ids)
            found = served(ids)
            assert found["length"] == ids.shape[1]
            with pytest.raises(kvpass.InputError, match="no other output"):
                found["hidden"] + 1


def test_a_forward_that_returns_the_last_row() -> None:
    for leave in (lambda m, logits, ids: logits[:, -1], lambda m, logits, ids: logits[:, [-1]]):
        model = toy(Toy, leave)
        served = compiled(model)
        for scope in (kvpass.cached(served), kvpass.cached(served, rows="all")):
            with torch.no_grad(), scope:
                for ids in (tokens(2, 9), tokens(1, 10)):
                    torch.testing.assert_close(served(ids), model(ids), rtol=1e-3, atol=1e-4)


def test_padded_batches() -> None:
    model = toy(Masked)
    served = compiled(model)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    with kvpass.cached(served) as cache:
        check(model, served, ids, attention_mask=torch.ones_like(mask))
        with pytest.warns(kvpass.KvpassWarning, match="counts padding as positions"):
            check(model, served, ids, attention_mask=mask)
        assert cache.stats().left_alone == 1
    with torch.no_grad():
        nn.init.zeros_(model.places.weight)  # without positions padding does not count
    behind = mask.flip(1)
    with torch.no_grad(), kvpass.cached(served) as cache:
        check(model, served, ids, attention_mask=mask)
        with pytest.raises(kvpass.InputError, match="ends in padding"):
            served(ids, attention_mask=behind)
        with pytest.raises(kvpass.InputError, match="between its tokens"):
            served(ids, attention_mask=torch.tensor([1, 0, 1] * 3).expand(2, 9))
        with pytest.raises(kvpass.InputError, match="more than ones and zeros"):
            served(ids, attention_mask=mask * 2)
        assert cache.stats().left_alone == 0
    with torch.no_grad(), kvpass.cached(served, rows="all"):
        found, wanted = served(ids, attention_mask=behind), model(ids, attention_mask=behind)
        torch.testing.assert_close(found * behind[..., None], wanted * behind[..., None], rtol=1e-3, atol=1e-4)
    with torch.no_grad(), kvpass.incremental(served) as cache:
        found = served(ids, attention_mask=mask)
        assert cache.lengths == (9, 5)
        torch.testing.assert_close(found[1, 4:], model(ids[1:, 4:])[0], rtol=1e-3, atol=1e-4)
        ids = torch.cat((ids, tokens(2, 1)), 1)
        found = served(ids[:, -1:])
        torch.testing.assert_close(found[1], model(ids[1:, 4:])[0, -1:], rtol=1e-3, atol=1e-4)


def seen(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


GIVEN = {
    "booleans": lambda b, s: seen(s),
    "ones": lambda b, s: seen(s).long()[None, None],
    "added": lambda b, s: torch.zeros(b, 1, s, s).masked_fill(~seen(s), float("-inf")),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("made", GIVEN)
def test_a_causal_mask_of_the_caller(made: str) -> None:
    model = toy(Given)
    served = compiled(model)
    with kvpass.cached(served) as cache:
        for batch, length in ((2, 9), (1, 10), (3, 11), (1, 12), (1, 1)):
            check(model, served, tokens(batch, length), mask=GIVEN[made](batch, length))
        assert cache.stats().left_alone == 0
        wide = seen(9)
        wide[2, 5] = True  # a token that sees a later one
        with pytest.warns(kvpass.KvpassWarning, match="has shape"):
            check(model, served, tokens(2, 9), mask=wide)
    with pytest.raises(kvpass.RefusedError, match="a mask of whole sequences"), kvpass.incremental(served):
        served(tokens(2, 9), GIVEN[made](2, 9))


@pytest.mark.parametrize(("dtype", "options"), [(torch.bfloat16, {}), (torch.float32, {"dtype": "int8"})])
def test_narrow_formats(dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = toy().to(dtype)
    served = compiled(model, **options, on_refusal="error")
    ids = tokens(2, 12)
    with torch.no_grad(), kvpass.cached(served), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for length in range(7, 12):
            found, wanted = served(ids[:, :length])[:, -1].float(), model(ids[:, :length])[:, -1].float()
            assert found.dtype is torch.float32 and (found - wanted).abs().max() <= 0.05 * wanted.abs().max()
