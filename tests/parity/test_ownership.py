"""The engine works on the model's own weights, and leaves the model as it found it."""

import copy
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

import kvpass
from tests.decoders import heads
from tests.decoders.catalogue import DECODERS
from tests.decoders.skeleton import VOCAB, one_layer_around
from tests.parity.harness import CONFIG, SEED, assert_tokens_equal, original_logits, ragged_prompts

NAMES = (
    "GPT-2 with a tril buffer slice",
    "GQA by repeat_interleave",
    "nn.MultiheadAttention without weights",
    "experts, dense",
    "one block run three times",
    "keys and values shared across layers",
)

ONE_LAYER = one_layer_around(heads.RepeatInterleave)


def storages(module: nn.Module) -> dict[int, int]:
    """Address and size in bytes of every storage that the module's parameters and buffers live in."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def same_values(tensor: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor holds the values of a parameter, in whatever order."""
    if tensor.numel() != parameter.numel() or tensor.dtype != parameter.dtype:
        return False
    return torch.equal(tensor.flatten().sort().values, parameter.flatten().sort().values)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", NAMES)
def test_no_second_copy_of_a_weight(name: str) -> None:
    model = DECODERS[name](SEED)
    engine = kvpass.compile(model, CONFIG)
    used = storages(engine.module)
    for path, parameter in model.named_parameters():
        assert parameter.untyped_storage().data_ptr() in used, f"{path} is not the one that the engine computes with"
    own = storages(model)
    added = [
        t for t in (*engine.module.parameters(), *engine.module.buffers()) if t.untyped_storage().data_ptr() not in own
    ]
    for path, parameter in model.named_parameters():
        copies = [tensor.shape for tensor in added if same_values(tensor, parameter)]
        assert not copies, f"the engine has a copy of {path}, {copies}"


@pytest.mark.slow
def test_no_second_copy_of_a_weight_in_a_family() -> None:
    zoo = pytest.importorskip("kvpass.models.zoo", reason="needs transformers")
    model, _ = zoo.tiny("llama", seed=SEED, hidden_size=256, intermediate_size=512)
    engine = kvpass.compile(model, CONFIG)
    own, used = storages(model), storages(engine.module)
    assert {p.untyped_storage().data_ptr() for p in model.parameters()} <= used.keys()
    assert sum(size for address, size in used.items() if address not in own) < 0.01 * sum(own.values())


def test_tied_embeddings_stay_tied() -> None:
    model = DECODERS["GPT-2 with a tril buffer slice"](SEED)
    original = copy.deepcopy(model)
    engine = kvpass.compile(model, CONFIG)
    assert model.lm_head.weight is model.wte.weight
    address = model.wte.weight.untyped_storage().data_ptr()
    shape = model.wte.weight.shape
    tables = {p.data_ptr() for p in engine.module.parameters() if p.shape == shape}
    assert tables == {address}
    assert_tokens_equal(original, engine, ragged_prompts(VOCAB))


@pytest.mark.slow
def test_engine_follows_a_change_of_the_weights() -> None:
    model = DECODERS["GQA by repeat_interleave"](SEED)
    engine = kvpass.compile(model, CONFIG)
    with torch.no_grad():
        model.head.weight.neg_()
        model.layers[1].mixer.o.weight.mul_(0.5)
    engine.clear_prefix_cache()
    assert_tokens_equal(copy.deepcopy(model), engine, ragged_prompts(VOCAB))


@pytest.mark.slow
def test_engine_outlives_the_model() -> None:
    model = DECODERS["GPT-2 with a tril buffer slice"](SEED)
    original = copy.deepcopy(model)
    engine = kvpass.compile(model, CONFIG)
    del model
    gc.collect()
    assert_tokens_equal(original, engine, ragged_prompts(VOCAB))


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", NAMES[:3])
def test_model_is_left_as_it_was(name: str) -> None:
    model = DECODERS[name](SEED)
    ids = torch.tensor([ragged_prompts(VOCAB)[1]])
    logits = original_logits(model, ids)
    before = [(sorted(vars(module)), module.training) for module in model.modules()]
    gradients = {path: parameter.requires_grad for path, parameter in model.named_parameters()}
    weights = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    kvpass.compile(model, CONFIG).generate([[1, 2, 3]], max_new_tokens=4)
    assert [(sorted(vars(module)), module.training) for module in model.modules()] == before
    assert {path: parameter.requires_grad for path, parameter in model.named_parameters()} == gradients
    assert all(torch.equal(tensor, weights[path]) for path, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(original_logits(model, ids), logits)


@pytest.mark.slow
def test_model_still_trains_afterwards() -> None:
    model = DECODERS["GPT-2 with a tril buffer slice"](SEED)
    kvpass.compile(model, CONFIG).generate([[1, 2, 3]], max_new_tokens=4)
    model.train()
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.sampled(8)
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_same_tokens_whatever_the_gradient_mode(
    mode: Callable[[], AbstractContextManager[object]], frozen: bool
) -> None:
    model = ONE_LAYER(SEED).requires_grad_(not frozen)
    original = copy.deepcopy(model)
    with mode():
        engine = kvpass.compile(model, CONFIG)
        assert_tokens_equal(original, engine, ragged_prompts(VOCAB))
    # compiled in one mode, used in another
    assert_tokens_equal(original, engine, ragged_prompts(VOCAB, seed=3))
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.slow
def test_two_engines_of_one_model_do_not_disturb_each_other() -> None:
    model = DECODERS["GQA by repeat_interleave"](SEED)
    original = copy.deepcopy(model)
    first, second = (
        kvpass.compile(model, CONFIG),
        kvpass.compile(model, kvpass.CacheConfig(block_size=4, num_blocks=99)),
    )
    prompts = ragged_prompts(VOCAB)
    stream = first.stream(prompts, max_new_tokens=16)
    begun = [next(stream) for _ in range(6)]
    assert_tokens_equal(original, second, prompts)
    outputs: list[list[int]] = [[] for _ in prompts]
    for index, token in [*begun, *stream]:
        outputs[index].append(token)
    assert outputs == second.generate(prompts, max_new_tokens=16)
