"""transformers' generate over kvpass's cache gives what it gives over its own, in all of its own loops."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor

import kvpass
from kvpass import generation
from kvpass.generation import engine_of, rows_of
from tests.parity.harness import SEED
from tests.parity.test_families import FAMILIES

transformers = pytest.importorskip("transformers")
zoo = pytest.importorskip("kvpass.models.zoo")

pytestmark = pytest.mark.sampled(6)

SERVED = ("llama", "gpt2", "mistral", "bloom", "gemma2", "qwen3")
EXACT = 1e-4  # of scores, relative to the largest
CONFIG = kvpass.CacheConfig(block_size=8, num_blocks=160)


def model_of(family: str) -> Any:
    model, vocab_size = zoo.tiny(family, seed=SEED, **FAMILIES[family])
    model.generation_config = transformers.GenerationConfig(eos_token_id=3, pad_token_id=0, bos_token_id=1)
    return model, vocab_size


@pytest.fixture(scope="module", params=SERVED)
def model(request: pytest.FixtureRequest) -> Any:
    found, found.vocab = model_of(request.param)
    return kvpass.patch(found, CONFIG)


def ids_of(model: Any, *shape: int) -> Tensor:
    return torch.randint(4, model.vocab, shape, generator=torch.Generator().manual_seed(7))


def both(model: Any, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """What generate gives by itself, and through kvpass."""
    found = []
    for run in (type(model).generate.__get__(model), model.generate):
        torch.manual_seed(seed)
        found.append(run(**copy.deepcopy(options)))
    return found[0], found[1]


class Streamer:
    def __init__(self) -> None:
        self.put_tokens: list[list[int]] = []
        self.ended = False

    def put(self, tokens: Tensor) -> None:
        self.put_tokens.append(tokens.flatten().tolist())

    def end(self) -> None:
        self.ended = True


class StopsAt(transformers.StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 17)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 20, "do_sample": False},
    "greedy, processors": {
        "max_new_tokens": 16, "do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2,
        "min_new_tokens": 12,
    },
    "sampling": {"max_new_tokens": 20, "do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "several samples": {"max_new_tokens": 12, "do_sample": True, "num_return_sequences": 3},
    "beams": {"max_new_tokens": 12, "num_beams": 4, "do_sample": False, "length_penalty": 0.7},
    "beams drawn": {"max_new_tokens": 10, "num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "criteria": {"max_new_tokens": 30, "do_sample": False, "stopping_criteria": [StopsAt()]},
}  # fmt: skip


def test_every_loop_gives_the_same_tokens(model: Any) -> None:
    for name, options in WAYS.items():
        wanted, got = both(model, input_ids=ids_of(model, 2, 9), **options)
        assert torch.equal(wanted, got), name


def test_padded_batches_outputs_and_streams(model: Any) -> None:
    ids = ids_of(model, 3, 11)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, :1] = 0
    ids = torch.where(mask.bool(), ids, 0)
    options: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 14}
    assert torch.equal(*both(model, do_sample=False, **options))
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    wanted, got = both(model, do_sample=True, **options)
    assert type(wanted) is type(got) and torch.equal(wanted.sequences, got.sequences)
    for name in ("scores", "logits"):
        for one, other in zip(wanted[name], got[name], strict=True):
            assert (one - other).nan_to_num().abs().max() <= EXACT * one.nan_to_num(0, 0, 0).abs().max(), name
    streamers = [Streamer(), Streamer()]
    for run, streamer in zip((type(model).generate.__get__(model), model.generate), streamers, strict=True):
        run(ids_of(model, 1, 5), max_new_tokens=8, do_sample=False, streamer=streamer)
    assert streamers[0].put_tokens == streamers[1].put_tokens and streamers[1].ended
    engine_of(model).check_integrity()
    assert engine_of(model).stats().blocks_used == 0


@pytest.mark.slow
def test_only_what_is_new_is_computed() -> None:
    found, found.vocab = model_of("llama")
    found.generation_config.eos_token_id = None
    kvpass.patch(found, CONFIG).generate(ids_of(found, 2, 30), max_new_tokens=20, do_sample=False)
    stats = engine_of(found).stats()
    assert stats.prefill_tokens + stats.decode_tokens == 2 * (30 + 19)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(1.1)
    assert torch.equal(*both(found, input_ids=ids_of(found, 2, 30), max_new_tokens=10, do_sample=False))


@pytest.mark.slow
def test_an_engine_goes_with_its_model_and_not_with_a_copy() -> None:
    found, _ = model_of("llama")
    kvpass.patch(found, CONFIG)
    engine = weakref.ref(engine_of(found))
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert other.__dict__[generation.PLACE] == generation.Door(CONFIG)
    del found, other
    gc.collect()
    assert engine() is None


def tokenizer_of(vocab: int) -> Any:
    words = {f"w{i}": i for i in range(vocab)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w2"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w3")


def letters_of(vocab: int) -> Any:
    """A tokenizer of single letters, and of other bytes behind them."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: (not letter.isascii(), letter))
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters[:vocab])}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner)


def test_strings_that_end_a_text(model: Any) -> None:
    tokenizer = letters_of(model.vocab)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    for first in range(4, model.vocab):
        options["input_ids"] = torch.tensor([[first, 5, 9, 7]])
        whole = type(model).generate(model, **options)[0]
        letters = [text for text in map(tokenizer.decode, whole[4:-1]) if text.isascii()]
        if letters:
            break
    options |= {"stop_strings": letters[:1], "tokenizer": tokenizer}
    plain, served = both(model, **options)
    assert torch.equal(plain, served) and len(served[0]) < len(whole)
    with pytest.raises(kvpass.InputError, match="pass tokenizer"):
        model.generate(**{**options, "tokenizer": None})


@pytest.mark.slow
def test_a_pipeline_of_a_patched_model() -> None:
    found, found.vocab = model_of("llama")
    tokenizer = tokenizer_of(found.vocab)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    plain = transformers.pipeline("text-generation", model=copy.deepcopy(found), tokenizer=tokenizer)
    patched = transformers.pipeline("text-generation", model=kvpass.patch(found, CONFIG), tokenizer=tokenizer)
    assert plain("w5 w9 w7", **options) == patched("w5 w9 w7", **options)
    assert engine_of(found).stats().steps > 0


def test_what_cannot_be_served_is_refused(model: Any) -> None:
    ids = ids_of(model, 2, 6)
    right = torch.ones_like(ids)
    right[0, -1] = 0
    cases: dict[str, dict[str, Any]] = {
        "output_attentions": {"input_ids": ids, "output_attentions": True, "return_dict_in_generate": True},
        "ends in padding": {"input_ids": ids, "attention_mask": right},
        "inputs_embeds": {"inputs_embeds": model.get_input_embeddings()(ids).detach()},
    }
    for why, options in cases.items():
        with pytest.raises(kvpass.InputError, match=why):
            model.generate(max_new_tokens=4, do_sample=False, **options)
    with pytest.raises(kvpass.InputError, match="patch it before"):
        kvpass.patch(model, kvpass.CacheConfig(num_blocks=3))
    with pytest.raises(kvpass.InputError, match="no generate to be patched"):
        kvpass.patch(torch.nn.Linear(2, 2))
    assert engine_of(model).stats().blocks_used == 0


def test_rows_are_what_is_not_padded() -> None:
    ids = torch.tensor([[0, 0, 5], [7, 8, 9]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    assert rows_of(ids, mask) == [(5,), (7, 8, 9)] and rows_of(ids, None) == [(0, 0, 5), (7, 8, 9)]
    assert rows_of(ids, mask, torch.tensor([[1, 1, 0], [0, 1, 2]])) == [(5,), (7, 8, 9)]
    for given, why in (
        ((ids, mask * 2), "more than ones and zeros"),
        ((ids, mask[:, :2]), "has shape"),
        ((ids, mask.flip(-1)), "ends in padding"),
        ((ids, None, torch.tensor([[1, 2, 3]])), "do not count"),
    ):
        with pytest.raises(kvpass.InputError, match=why):
            rows_of(*given)
