"""The shipped decoder: its checkpoint loads, is as good as its card says, looks back and never ahead."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from kvpass.models.eval_pydecoder import (
    REREAD,
    SLICE_WINDOWS,
    WINDOW,
    perplexity,
    perplexity_of_rereading,
    read_held_out,
)
from kvpass.models.pydecoder import (
    CHECKPOINT,
    END_OF_TEXT,
    PyDecoder,
    PyDecoderConfig,
    load,
    load_tokenizer,
    save,
)

MEGABYTE = 10**6


@pytest.fixture(scope="module")
def model() -> PyDecoder:
    return load(CHECKPOINT)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(CHECKPOINT)


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    return read_held_out(CHECKPOINT)[0]


@pytest.fixture(scope="module")
def metrics() -> dict[str, float]:
    figures: dict[str, float] = json.loads((CHECKPOINT / "metrics.json").read_text(encoding="utf-8"))
    return figures


def tiny_config() -> PyDecoderConfig:
    return PyDecoderConfig(vocab_size=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48)


@pytest.mark.parametrize(
    "text",
    ["def f(x):\n\treturn x  # \u00e9\u4e2d\U0001f600\n", "", "   \n\n\r\n \x00\x7f", "class A:\n    pass\n" * 50],
    ids=["unicode", "empty", "blanks-and-controls", "long"],
)
def test_tokenizer_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_end_of_text_is_one_token_with_id_zero(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(END_OF_TEXT).ids == [0]
    assert tokenizer.get_vocab_size() == PyDecoderConfig.from_file(CHECKPOINT / "config.json").vocab_size


def test_the_shipped_files_keep_their_size_limits() -> None:
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 16 * MEGABYTE
    assert (CHECKPOINT / "heldout.txt").stat().st_size <= MEGABYTE


def test_checkpoint_loads_in_eval_mode_and_float32(model: PyDecoder) -> None:
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_bfloat16_keeps_the_rotary_frequencies_in_float32() -> None:
    half = load(CHECKPOINT, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.inv_freq.dtype == torch.float32
    assert half(torch.zeros(1, 3, dtype=torch.int64)).dtype == torch.bfloat16


def test_held_out_slice_has_the_perplexity_on_record(
    model: PyDecoder, held_out: torch.Tensor, metrics: dict[str, float]
) -> None:
    measured = perplexity(model, held_out[: SLICE_WINDOWS * WINDOW + 1], WINDOW)
    assert measured == pytest.approx(metrics["slice_perplexity"], rel=2e-3)


def test_the_card_states_the_figures_on_record(metrics: dict[str, float]) -> None:
    card = (CHECKPOINT / "MODEL_CARD.md").read_text(encoding="utf-8")
    for name in (name for name in metrics if name.startswith("perplexity")):
        assert f"{metrics[name]:.2f}" in card, f"{name} = {metrics[name]:.2f} is not in MODEL_CARD.md"
    assert f"{metrics['bits_per_byte']:.3f}" in card


def test_a_short_memory_shows_in_the_figures(metrics: dict[str, float]) -> None:
    assert metrics["perplexity"] < metrics["perplexity_context_16"] < metrics["perplexity_context_1"]
    assert metrics["perplexity_window_2048"] < 1.05 * metrics["perplexity"]


def test_a_later_token_moves_no_earlier_logit(model: PyDecoder, held_out: torch.Tensor) -> None:
    ids = held_out[:96].repeat(2, 1)
    ids[1, 64:] = (ids[1, 64:] + 1) % model.config.vocab_size
    with torch.no_grad():
        first, second = model(ids)
    torch.testing.assert_close(first[:64], second[:64])
    assert (first[64] - second[64]).abs().max() > 0.1


def test_spoiling_one_early_token_changes_later_logits(model: PyDecoder, held_out: torch.Tensor) -> None:
    ids = held_out[:256].repeat(2, 1)
    ids[1, 8] = (ids[1, 8] + 1) % model.config.vocab_size
    with torch.no_grad():
        first, second = model(ids)
    moved = (first - second).abs().amax(-1)
    assert (moved[9:] > 1e-4).all()


def test_shuffling_the_history_raises_the_perplexity_strongly(model: PyDecoder, held_out: torch.Tensor) -> None:
    """A passage is read twice; the second reading keeps its own tokens, only the first reading is shuffled."""
    ids = held_out[: 8 * REREAD]
    kept = perplexity_of_rereading(model, ids, REREAD)
    assert perplexity_of_rereading(model, ids, REREAD, shuffled=True) > 2 * kept


def test_saving_and_loading_gives_the_same_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = PyDecoder(tiny_config()).eval()
    save(model, tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 64, (2, 11))
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(ids), model(ids))


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="num_kv_heads=3"):
        PyDecoderConfig(num_heads=8, num_kv_heads=3)
