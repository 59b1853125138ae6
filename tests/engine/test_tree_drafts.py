"""Trees of drafts give the tokens of plain decoding, and leave every row of the cache in its place."""

import pytest

import kvpass
from kvpass.engine import step_loop
from kvpass.errors import ConfigError, InputError
from kvpass.runtime.sequences.draft_tree import DraftTree
from kvpass.types import AttentionSinks, Sampling
from tests.history_engine import check_idle, make_engine, naive, ragged
from tests.speculating import Branching, always_speculate, counts_of_a_twins_drafts


@pytest.fixture
def moved(monkeypatch):
    """Counts the rows that are moved, of all engines."""
    rows = []

    def count(step, tokens, block_size):
        found = find(step, tokens, block_size)
        rows.extend([] if found is None else found[0, 0].tolist())
        return found

    find = step_loop.rows_to_move
    monkeypatch.setattr(step_loop, "rows_to_move", count)
    return rows


@pytest.mark.parametrize("mistakes", [0.0, 0.4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_blocks": 12},
        {"max_batch_tokens": 7, "max_sequences": 3},
        {"prefix_sharing": False},
        {"block_size": 1, "num_blocks": 128},
        {"num_blocks": 12, "host_memory": "1MiB"},
    ],
    ids=["plain", "preempted", "chunked", "unshared", "blocks of one", "swapped"],
)
def test_tokens_are_those_of_plain_decoding(options, mistakes, moved):
    prompts = ragged(9)
    expected = [naive(prompt, 15) for prompt in prompts]
    engine = always_speculate(make_engine(**options), Branching(zip(prompts, expected, strict=True), mistakes))
    for _ in range(2):
        assert engine.generate(prompts, 15) == expected
        check_idle(engine)
    counts = engine._scheduler.counts
    assert engine.module.trees > 20 and counts.drafted_trees and moved
    assert counts.accepted_tokens > 20
    if options.get("num_blocks") == 12:
        assert counts.preemptions > 0


def test_seeds_give_the_same_tokens_in_any_mix(moved):
    prompts = ragged(8)
    samplings = [Sampling(temperature=1.5, top_k=index % 3 * 10, seed=index % 4) for index in range(8)]
    alone = [make_engine().generate([p], 12, s)[0] for p, s in zip(prompts, samplings, strict=True)]
    for options in ({}, {"num_blocks": 12, "max_batch_tokens": 7}):
        engine = always_speculate(make_engine(**options), Branching(zip(prompts, alone, strict=True), 0.3))
        assert engine.generate(prompts, 12, samplings) == alone
        assert engine._scheduler.counts.accepted_tokens > 0
    assert moved


def test_a_step_that_fails_with_a_tree_in_it_is_undone():
    prompts = ragged(6)
    expected = [naive(prompt, 12) for prompt in prompts]
    engine = always_speculate(make_engine(num_blocks=24), Branching(zip(prompts, expected, strict=True), 0.3))
    handles = [engine.submit(prompt, 12, n=2) for prompt in prompts]

    failures = []

    def fail(step):
        if step.tree_mask is not None and engine.module.steps > 2 * len(failures) + 2 and len(failures) < 2:
            failures.append(engine.module.steps)
            raise RuntimeError("no luck")

    engine.module.before_step = fail
    for _ in range(2):
        with pytest.raises(RuntimeError):
            handles[0].result()
        engine.check_integrity()
    assert [[sample.result() for sample in handle.samples] for handle in handles] == [[e, e] for e in expected]
    check_idle(engine)


def test_prompt_lookup_with_branches_gives_the_same_tokens():
    prompts = [[1, 2, 3, 3, 1, 2, 4, 4, 9, 1, 2, 5, 6, 1, 2], list(range(20)), [7, 7, 8] * 4]
    engine = always_speculate(make_engine(), kvpass.PromptLookup((2, 1), branches=3))
    assert engine.generate(prompts, 30) == [naive(prompt, 30) for prompt in prompts]
    assert engine.stats().drafted_trees > 0
    assert not engine.drafter._indexes
    check_idle(engine)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("options", [{}, {"num_blocks": 12, "max_batch_tokens": 7}], ids=["plain", "tight"])
def test_another_engine_drafts_trees(temperature, options):
    """Its first path is right every time."""
    counts = counts_of_a_twins_drafts(temperature, options, branches=3)
    assert counts.drafted_trees > 0
    assert counts.accepted_tokens > 0.9 * counts.drafted_tokens / 3 > 0


class Proposes:
    cheap, max_draft, branches = True, 4, 2

    def __init__(self, draft):
        self.draft = draft

    def propose(self, sequences, counts):
        return [self.draft for _ in sequences]

    def forget(self, sequence):
        pass


@pytest.mark.parametrize(
    "draft",
    [
        DraftTree([1, 1], [-1, -1]),
        DraftTree([1, 2], [-1, 1]),
        DraftTree([1, 2], [-1]),
        DraftTree([1, 2, 3], [-1, -1, -1]),
        DraftTree([1, 2, 3, 4, 5], [-1, 0, 1, 2, 3]),
        DraftTree([1, 40], [-1, -1]),
    ],
    ids=["twins", "its own parent", "no parent", "too wide", "too deep", "no token"],
)
def test_a_tree_that_cannot_be_is_named(draft):
    engine = always_speculate(make_engine(), Proposes(draft))
    handle = engine.submit([1, 2], 8)
    with pytest.raises(InputError, match="the drafter proposed"):
        handle.result()
    engine.speculate(None)
    assert handle.result() == naive([1, 2], 8)
    check_idle(engine)


def test_a_module_that_takes_no_trees_is_refused():
    engine = make_engine()
    engine.module.takes_trees = False
    engine.speculate(kvpass.PromptLookup(branches=1))
    for drafter in (kvpass.PromptLookup(branches=2), kvpass.DraftEngine(make_engine(), branches=2)):
        with pytest.raises(ConfigError, match="takes no trees of drafts"):
            engine.speculate(drafter)
    for drafter in (kvpass.PromptLookup, lambda **options: kvpass.DraftEngine(make_engine(), **options)):
        with pytest.raises(ConfigError, match="branches=0"):
            drafter(branches=0)


def test_sequences_that_forget_may_have_trees():
    forgetting = AttentionSinks(window=400)
    prompts = ragged(4)
    expected = [naive(prompt, 15) for prompt in prompts]
    engine = make_engine(forgetting=forgetting)
    always_speculate(engine, Branching(zip(prompts, expected, strict=True), 0.3))
    assert engine.generate(prompts, 15) == expected
    assert engine._scheduler.counts.drafted_trees > 0
