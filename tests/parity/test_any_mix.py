"""A request gets its own tokens, alone or in any mix: shared, chunked, preempted, swapped, sampled n times, drafted.

One export for each family; the engines differ in their pools and schedules alone.
"""

import copy
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import nn

import kvpass
from kvpass.compiler import Recompiler
from tests.parity.harness import SEED, Prompts, assert_tokens_equal, ragged_prompts
from tests.speculating import Branching, Guesses, always_speculate

zoo = pytest.importorskip("kvpass.models.zoo", reason="needs transformers")

CONFIG = kvpass.CacheConfig(block_size=8, num_blocks=128)
DRAWN = [kvpass.Sampling(temperature=1.0, top_p=0.9, seed=seed, ignore_eos=True) for seed in range(4)]
FAMILIES = ("gpt2", "mistral", "llama")  # learned positions; a window of 24 tokens; rotary, grouped heads


@dataclass(frozen=True, eq=False)
class Family:
    """A model, its paged module, and what its prompts go on with."""

    model: nn.Module
    compiled: kvpass.Engine
    prompts: Prompts

    def engine(self, **options: object) -> kvpass.Engine:
        """An engine of its own over the module."""
        config = replace(CONFIG, **options)
        return kvpass.Engine(self.compiled.module, self.compiled.plan, config, self.compiled.report)


@cache
def capture(name: str) -> tuple[nn.Module, Recompiler, Prompts]:
    """A model of the family and one export of it."""
    model, vocab_size = zoo.tiny(name, seed=SEED)
    return copy.deepcopy(model), Recompiler(model), ragged_prompts(vocab_size)


def family_of(name: str, dtype: str = "auto") -> Family:
    model, captured, prompts = capture(name)
    return Family(model, captured.compile(replace(CONFIG, dtype=dtype), verify=False), prompts)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return family_of(request.param)


@dataclass(frozen=True, eq=False)
class OneByOne:
    """An engine that is asked for each prompt by itself: alone, or all at once while others come and go."""

    engine: kvpass.Engine
    alone: bool
    n: int = 1

    def generate(self, prompts: Prompts, max_new_tokens: int, sampling: kvpass.Sampling) -> Prompts:
        if self.alone:
            return [self.engine.submit(prompt, max_new_tokens, sampling).result() for prompt in prompts]
        handles = [self.engine.submit(prompt, max_new_tokens, sampling, n=self.n) for prompt in prompts]
        passing = self.engine.submit(prompts[0][:2], 3)
        next(iter(handles[0]))
        passing.cancel()
        for handle in handles:
            assert [sample.result() for sample in handle.samples] == [handle.result()] * self.n
        return [handle.result() for handle in handles]


def drafting_for(family: Family, kind: str) -> object:
    if kind == "lookup":
        return kvpass.PromptLookup((2, 1), max_draft=4)
    if kind == "engine":
        return kvpass.DraftEngine(family.engine(), max_draft=3)
    if kind == "branching engine":
        return kvpass.DraftEngine(family.engine(), max_draft=3, branches=2)
    plain = family.engine().generate(family.prompts, 16, kvpass.Sampling(ignore_eos=True))
    guesses = Branching if kind == "branching guesses" else Guesses
    return guesses(zip(family.prompts, plain, strict=True), mistakes=0.3, vocabulary=family.compiled.plan.vocab_size)


TIGHT = {"num_blocks": 12, "max_sequences": 4}
MIXES = {
    "unshared": {"prefix_sharing": False},
    "shared": {},
    "preempted": TIGHT,
    "preempted and swapped": {"host_memory": "16MiB", **TIGHT},
    "chunked, unshared": {"max_batch_tokens": 7, "prefix_sharing": False, **TIGHT},
}


@pytest.mark.sampled(30, 3)
@pytest.mark.parametrize("mix", MIXES)
def test_greedy_tokens_are_those_of_the_model(family: Family, mix: str) -> None:
    engine = family.engine(**MIXES[mix])
    for _ in range(2):
        assert_tokens_equal(family.model, engine, family.prompts)
        engine.check_integrity()
    if "preempted" in mix and any(spec.window is None for spec in engine.plan.caches):
        assert engine.stats().preemptions > 0
        assert ("swapped" in mix) == (engine._scheduler.counts.restored_tokens > 0)
    assert ("unshared" in mix) == (engine.stats().prefix_hit_tokens == 0)
    assert_tokens_equal(family.model, OneByOne(engine, alone=True), family.prompts)
    assert_tokens_equal(family.model, OneByOne(engine, alone=False, n=2), family.prompts)
    engine.check_integrity()


@pytest.mark.sampled(32, 3)
@pytest.mark.parametrize(
    ("kind", "mix"),
    [
        ("lookup", "shared"),
        ("engine", "preempted"),
        ("guesses", "chunked, unshared"),
        ("branching engine", "shared"),
        ("branching guesses", "preempted"),
    ],
)
def test_drafted_tokens_are_those_of_the_model(family: Family, kind: str, mix: str) -> None:
    engine = always_speculate(family.engine(**MIXES[mix]), drafting_for(family, kind))
    assert_tokens_equal(family.model, OneByOne(engine, alone=False, n=2), family.prompts)
    engine.check_integrity()
    assert engine._scheduler.counts.drafted_tokens > 0
    if kind != "lookup":
        assert engine._scheduler.counts.accepted_tokens > 0
    assert ("branching" in kind) == (engine.stats().drafted_trees > 0)


@pytest.mark.sampled(3)
def test_seeds_keep_their_promise_in_any_mix(family: Family) -> None:
    alone = [family.engine().generate([p], 16, s)[0] for p, s in zip(family.prompts, DRAWN, strict=True)]
    assert len(set(map(tuple, alone))) == len(alone)
    for mix in ("preempted", "chunked, unshared"):
        engine = family.engine(**MIXES[mix])
        assert engine.generate(family.prompts, 16, DRAWN) == alone
        for kind in ("engine", "branching engine"):
            always_speculate(engine, drafting_for(family, kind))
            assert engine.generate(family.prompts, 16, DRAWN) == alone
        assert engine._scheduler.counts.accepted_tokens > 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_quantised_cache_with_sharing_gives_the_tokens_of_one_without(dtype: str) -> None:
    family = family_of("llama", dtype)
    expected = family.engine(dtype=dtype, prefix_sharing=False).generate(family.prompts, 16)
    for options in ({}, {"max_batch_tokens": 11}, TIGHT):
        engine = family.engine(dtype=dtype, **options)
        for _ in range(2):
            assert engine.generate(family.prompts, 16) == expected
        assert engine.stats().prefix_hit_tokens > 0
        for kind in ("guesses", "branching guesses"):
            drafter = drafting_for(family, kind)
            for prompt, tokens in zip(family.prompts, expected, strict=True):
                drafter.known[tuple(prompt)] = tokens
            always_speculate(engine, drafter)
            assert engine.generate(family.prompts, 16) == expected
        assert engine.stats().drafted_trees > 0


@pytest.mark.parametrize(
    ("mix", "beams", "penalty", "stopping"),
    [("shared", 4, 1.0, False), ("preempted and swapped", 3, 0.0, True), ("chunked, unshared", 2, 2.0, "never")],
)
def test_beams_are_those_of_transformers(
    family: Family, mix: str, beams: int, penalty: float, stopping: bool | str
) -> None:
    prompt = family.prompts[-1]
    free = family.engine().generate([prompt], 12, kvpass.Sampling(ignore_eos=True))[0]
    ends = [free[3], free[6]]  # what the likeliest outputs come to soon
    whole = family.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        max_new_tokens=12,
        length_penalty=penalty,
        early_stopping=stopping,
        eos_token_id=ends,
        pad_token_id=ends[0],
        return_dict_in_generate=True,
        output_scores=True,
    )
    expected = []
    for row in whole.sequences[:, len(prompt) :].tolist():
        length = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
        expected.append(row[:length])
    engine = family.engine(**MIXES[mix])
    found = engine.beam_search(
        prompt, 12, beams=beams, length_penalty=penalty, early_stopping=stopping, eos_token_ids=ends
    )
    assert [beam.tokens for beam in found] == expected
    torch.testing.assert_close(torch.tensor([beam.score for beam in found]), whole.sequences_scores)
    engine.check_integrity()
