"""Text in, text out: the same tokens as by ids, pieces that join to the whole, and chat by a template."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kvpass
from kvpass.loading import LoadedModel, load_model
from kvpass.models import pydecoder

PROMPT = "def add(a, b):"


class Tiny(nn.Module):
    """One layer, for as many tokens as the tokenizer has."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab_size, 16), nn.Linear(16, vocab_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)[:, None]
        return self.head(nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0])


class Chatty:
    """The tokenizer of the shipped model as transformers has it: with a chat template, and decoding special tokens."""

    chat_template = "..."

    def __init__(self, loaded: LoadedModel) -> None:
        assert loaded.tokenizer is not None
        self.inner = loaded.tokenizer

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text).ids

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> list[int]:
        assert options == {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        if messages[0]["role"] == "robot":
            raise ValueError("robots do not speak")
        return self.encode("".join(f"# {m['role']}: {m['content']}\n" for m in messages) + "# assistant:")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("pydecoder")


@pytest.fixture(scope="module")
def engine(loaded: LoadedModel) -> Iterator[kvpass.Engine]:
    config = kvpass.CacheConfig(memory="16MiB")
    with kvpass.compile(loaded.model, config, tokenizer=Chatty(loaded), verify=False) as engine:
        yield engine


def test_the_text_is_that_of_the_tokens(engine: kvpass.Engine, loaded: LoadedModel) -> None:
    prompts = [PROMPT, "import "]
    found = engine.generate_text(prompts, 12)
    ids = [engine.tokenizer.encode(prompt) for prompt in prompts]
    assert [list(output.token_ids) for output in found] == engine.generate(ids, 12)
    for output, prompt in zip(found, ids, strict=True):
        whole = engine.tokenizer.decode([*prompt, *output.token_ids], skip_special_tokens=True)
        assert whole == engine.tokenizer.decode(prompt) + output.text
        assert (output.finish_reason, output.prompt_tokens, output.completion_tokens) == ("length", len(prompt), 12)
    assert str(engine.generate_text(PROMPT, 12)[0]) == found[0].text


def test_pieces_join_to_the_text_and_split_no_character(engine: kvpass.Engine) -> None:
    for seed in range(6):  # hot enough to draw bytes that are parts of characters
        options: dict[str, Any] = {"temperature": 6.0, "seed": seed, "ignore_eos": True}
        (whole,) = engine.generate_text("print('é", 40, **options)
        pieces = list(engine.stream_text("print('é", 40, **options))
        assert "".join(pieces) == whole.text and len(pieces) > 1
        assert not any(piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in pieces[:-1])


def test_samples_stop_and_logprobs(engine: kvpass.Engine) -> None:
    plain = engine.generate_text(PROMPT, 24)[0].text
    stop = plain[5:8]
    found = engine.generate_text(PROMPT, 24, n=3, stop=stop, logprobs=1)
    assert len(found) == 3
    for output in found:
        assert output.text == plain[: plain.index(stop)] and output.finish_reason == "stop"
        assert len(output.logprobs) == output.completion_tokens
    assert "".join(engine.stream_text(PROMPT, 24, stop=[stop])) == found[0].text
    drawn = [engine.generate_text(PROMPT, 8, kvpass.Sampling(temperature=1.0), seed=seed)[0] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_special_tokens_are_no_text(engine: kvpass.Engine, loaded: LoadedModel) -> None:
    assert loaded.tokenizer is not None
    end = loaded.tokenizer.token_to_id(pydecoder.END_OF_TEXT)
    forced = kvpass.Sampling(logit_bias={end: 1e9}, stop_token_ids=(end,))
    (output,) = engine.generate_text(PROMPT, 4, forced)
    assert (output.text, output.token_ids, output.finish_reason) == ("", (end,), "stop")


def test_chat_goes_by_the_template_and_reuses_what_was_said(engine: kvpass.Engine) -> None:
    messages = [{"role": "user", "content": "write a function that adds two numbers, and one that takes them apart"}]
    answer = engine.chat(messages, 16)
    ids = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert [list(answer.token_ids)] == engine.generate([ids], 16) and answer.prompt_tokens == len(ids)
    before = engine.stats().prefix_hit_tokens
    messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "thanks"}]
    assert "".join(engine.stream_chat(messages, 16)) == engine.chat(messages, 16).text
    assert engine.stats().prefix_hit_tokens > before


def test_leaving_a_stream_gives_everything_back(engine: kvpass.Engine) -> None:
    pieces = engine.stream_text(PROMPT, 100)
    next(pieces)
    pieces.close()
    assert engine.stats().running == engine.stats().waiting == 0
    engine.check_integrity()


def test_tokens_are_drawn_as_the_generation_config_says(loaded: LoadedModel) -> None:
    class Config:
        do_sample, temperature, top_p, top_k = True, 0.7, None, 50

    assert loaded.tokenizer is not None
    model = Tiny(loaded.tokenizer.get_vocab_size()).eval()
    model.generation_config = Config()  # type: ignore[assignment]
    engine = kvpass.compile(model, kvpass.CacheConfig(num_blocks=16), tokenizer=loaded.tokenizer, verify=False)
    assert engine.text_sampling == kvpass.Sampling(temperature=0.7, top_k=50)
    assert engine.generate_text(PROMPT, 4, temperature=0)[0].token_ids == tuple(
        engine.generate([engine.tokenizer.encode(PROMPT).ids], 4)[0]
    )


def test_what_cannot_be_used(engine: kvpass.Engine, loaded: LoadedModel) -> None:
    with pytest.raises(kvpass.InputError, match="for token ids call generate"):
        engine.generate_text([1, 2, 3])  # type: ignore[list-item]
    with pytest.raises(kvpass.InputError, match="has no tokens"):
        engine.generate_text("")
    with pytest.raises(kvpass.ConfigError, match="there is no option 'max_tokens'"):
        engine.stream_text(PROMPT, max_tokens=3)
    with pytest.raises(kvpass.ConfigError, match="temperature"):
        engine.chat([], temperature="hot")
    with pytest.raises(kvpass.InputError, match="does not take these messages: robots do not speak"):
        engine.chat([{"role": "robot", "content": "beep"}])
    assert engine.stats().running == engine.stats().waiting == 0
    small, config = Tiny(9).eval(), kvpass.CacheConfig(num_blocks=4)
    for tokenizer, why in ((None, "no tokenizer"), (lambda ids: "", "cannot encode")):
        other = kvpass.compile(small, config, tokenizer=tokenizer, verify=False)
        with pytest.raises(kvpass.InputError, match=why):
            other.generate_text(PROMPT)
    other = kvpass.compile(small, config, tokenizer=loaded.tokenizer, verify=False)
    with pytest.raises(kvpass.InputError, match="no chat template"):
        other.chat([{"role": "user", "content": "hello"}])


def test_a_folder_is_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shipped = load_model("pydecoder")
    assert shipped.tokenizer is not None
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=shipped.tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=shipped.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    with kvpass.load(tmp_path, kvpass.CacheConfig(num_blocks=16), verify=False) as engine:
        answer = engine.chat([{"role": "user", "content": "hello"}], 5)
        assert answer.prompt_tokens == len(shipped.tokenizer.encode("user: hello\n").ids)
        assert answer.completion_tokens == 5
    with pytest.raises(kvpass.InputError, match="there is no folder"):
        kvpass.load(tmp_path / "nowhere")
