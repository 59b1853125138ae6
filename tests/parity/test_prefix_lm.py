"""Models whose first tokens see one another: a prefix is computed in one step, and every token is the original's."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvpass
from kvpass.fx_passes.lowering.prefix_steps import show_prefix
from kvpass.types import StepInputs
from tests.decoders.prefix import Prefix
from tests.decoders.skeleton import VOCAB, Decoder, decoder_around, in_turn
from tests.parity.harness import SEED, assert_tokens_equal, ragged_prompts

CONFIG = kvpass.CacheConfig(block_size=4, num_blocks=48, max_batch_tokens=14, max_sequences=8)
PROMPTS = ragged_prompts(VOCAB, lengths=(5, 9, 13, 44))
ELEVEN = "added, of eleven"


class OneLayer(nn.Module):
    """Heads of 16, as k4v2 needs them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(VOCAB, 32), nn.Linear(32, 96), nn.Linear(32, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(ids)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        i = torch.arange(ids.size(1))
        mask = (i <= i[:, None]) | (i < 5)
        return self.head(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def engine_of(spelling: str, config: kvpass.CacheConfig = CONFIG, **options: object) -> kvpass.Engine:
    return kvpass.compile(decoder_around(partial(Prefix, spelling))(SEED), config, **options)


@pytest.fixture(scope="module")
def engine() -> kvpass.Engine:
    return engine_of("compared")


def test_the_tokens_are_those_of_the_original(engine: kvpass.Engine) -> None:
    model = decoder_around(Prefix)(SEED)
    first = assert_tokens_equal(model, engine, PROMPTS)
    assert assert_tokens_equal(model, engine, PROMPTS) == first
    assert engine.stats().prefix_hit_tokens == 0  # what the prefix holds depends on all of it
    engine.check_integrity()
    assert {site.mask for site in engine.report.sites} == {"causal behind a prefix of 5"}
    assert all(site.evidence.startswith("proven for every length") for site in engine.report.sites)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("spelling", ["a buffer", ELEVEN])
def test_other_spellings(spelling: str) -> None:
    prompts = ragged_prompts(VOCAB, lengths=(11, 13, 20, 44))
    short = replace(CONFIG, num_blocks=18)  # so that some are preempted
    assert_tokens_equal(decoder_around(partial(Prefix, spelling))(SEED), engine_of(spelling, short), prompts)


def test_samples_and_trees_of_drafts(engine: kvpass.Engine) -> None:
    wanted = engine.generate(PROMPTS, 12)
    engine.speculate(kvpass.PromptLookup(branches=2))
    assert engine.generate(PROMPTS, 12) == wanted
    engine.speculate(None)
    assert [sample.result() for sample in engine.submit(PROMPTS[3], 12, n=2).samples] == [wanted[3], wanted[3]]
    engine.check_integrity()


@pytest.mark.slow
@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3"])
def test_lossy_formats(engine: kvpass.Engine, dtype: str) -> None:
    quantised = engine_of("compared", replace(CONFIG, dtype=dtype))
    given, wanted = (each.generate(PROMPTS, 4) for each in (quantised, engine))
    assert [len(tokens) for tokens in given] == [len(tokens) for tokens in wanted] == [4] * len(PROMPTS)
    verification = quantised.report.verification
    assert verification is not None and verification.passed


@pytest.mark.slow
def test_bad_input(engine: kvpass.Engine) -> None:
    with pytest.raises(kvpass.InputError, match="a prompt has to have at least 5"):
        engine.generate([[1, 2, 3]], 4)
    with pytest.raises(kvpass.ConfigError, match="give at least 11"):
        engine_of(ELEVEN, replace(CONFIG, max_batch_tokens=8))
    with pytest.raises(kvpass.RefusedError, match="causal alone"):
        engine_of("compared", replace(CONFIG, forgetting=kvpass.AttentionSinks(window=16)))
    with pytest.raises(kvpass.RefusedError, match="a cache in k4v2 stores blocks as a whole"):
        kvpass.compile(OneLayer().eval(), replace(CONFIG, block_size=16, dtype="k4v2"))


def test_a_model_with_two_prefixes_is_refused() -> None:
    model = Decoder(in_turn(Prefix, partial(Prefix, ELEVEN))).eval()
    with pytest.raises(kvpass.RefusedError, match="prefixes of 5 and 11 tokens"):
        kvpass.compile(model, CONFIG)


def test_what_the_tokens_of_a_step_see() -> None:
    """A whole prompt of four, two tokens of a sequence that is past its prefix, and a whole one of two."""
    step = StepInputs(
        token_ids=torch.zeros(8, dtype=torch.long),
        positions=torch.tensor([0, 1, 2, 3, 7, 8, 0, 1]),
        slot_mapping=torch.arange(8)[None],
        block_tables=torch.zeros(1, 3, 3, dtype=torch.long),
        seq_lens=torch.tensor([4, 9, 2]),
        query_start=torch.tensor([0, 4, 6, 8]),
        logits_index=torch.arange(8),
    )
    shown = show_prefix(step, 3).tree_mask
    assert shown is not None
    assert shown.int().tolist() == [
        [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0],
    ]  # fmt: skip
    later = replace(step, seq_lens=torch.tensor([8, 9, 6]))
    assert show_prefix(later, 3) is later
    with pytest.raises(kvpass.InputError, match="compute them in one step"):
        show_prefix(replace(step, seq_lens=torch.tensor([6, 9, 2])), 3)
