"""Sequences that keep what has received the most attention, against loops and dense attention that do the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import kvpass
from kvpass import AttentionSinks, CacheConfig, HeavyHitters
from kvpass.engine.engine import Engine
from kvpass.errors import ConfigError, VerificationError
from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.models.pydecoder import PyDecoder, PyDecoderConfig
from kvpass.types import CachePlan, CacheSpec, Sampling
from tests.engine.test_token_eviction import seen_logits
from tests.history_engine import VOCABULARY, check_idle, ragged
from tests.history_engine import make_engine as history_engine

SIZE = 4
HEAVY = HeavyHitters(recent=8, heavy=7, sinks=3, every=6)
NEEDLE = 39


def weights_of(tokens, positions):
    """Attention of the last of ``tokens`` to all of them: by what they are and where they stand, and to the needle."""
    found = np.array([np.sin(1.7 * token + 0.3 * at + tokens[-1]) for token, at in zip(tokens, positions, strict=True)])
    weights = np.exp(found + 6.0 * (np.array(tokens) == NEEDLE))
    return weights / weights.sum()


class Loop:
    """One token after the other, by the definition: what is seen of the past, and the attention of blocks."""

    def __init__(self, forgetting=HEAVY):
        self.forgetting = forgetting
        self.tokens, self.blocks, self.received = [], [], {}

    def append(self, token):
        """Positions that the next token sees, itself included."""
        at, rule = len(self.tokens), self.forgetting
        self.tokens.append(token)
        if at % rule.every == 0:
            sinks, newer = -(-rule.sinks // SIZE), max(0, at - rule.recent) // SIZE
            middle = [block for block in self.blocks if sinks <= block < newer]
            stay = sorted(middle, key=lambda block: -self.received[block])[: -(-rule.heavy // SIZE)]
            self.blocks = [block for block in self.blocks if block not in middle or block in stay]
        if at % SIZE == 0:
            self.blocks.append(at // SIZE)
            self.received[at // SIZE] = 0.0
        return [p for block in self.blocks for p in range(block * SIZE, block * SIZE + SIZE) if p <= at]

    def run(self, prompt, count):
        """Greedy continuation of ``prompt``."""
        for token in prompt:
            logits = self.step(token)
        for _ in range(count - 1):
            logits = self.step(int(logits.argmax()))
        return [*self.tokens[len(prompt) :], int(logits.argmax())]

    def step(self, token):
        seen = self.append(token)
        for at, weight in zip(seen, weights_of([self.tokens[p] for p in seen], seen), strict=True):
            self.received[at // SIZE] += weight
        return seen_logits(self.tokens, seen)


class WeighingModule:
    """Keeps tokens as keys and positions as values; a row attends to all that stands before it in its blocks."""

    device = torch.device("cpu")

    def forward_with_mass(self, step, caches):
        ((keys, values),) = caches
        flat_keys, flat_values = keys.view(-1).numpy(), values.view(-1).numpy()
        slots = step.slot_mapping[0].numpy()
        flat_keys[slots], flat_values[slots] = step.token_ids.numpy(), step.positions.numpy()
        starts, lengths, wanted = step.query_start.tolist(), step.seq_lens.tolist(), step.logits_index.tolist()
        logits, mass = {}, torch.zeros(step.block_tables.shape[1:], dtype=torch.float64)
        self.seen = []
        for n, table in enumerate(step.block_tables[0].numpy()):
            for row in range(starts[n], starts[n + 1]):
                places = np.arange(lengths[n] - (starts[n + 1] - row) + 1)
                found = table[places // SIZE] * SIZE + places % SIZE
                positions, tokens = flat_values[found].astype(int).tolist(), flat_keys[found].astype(int).tolist()
                assert positions == sorted(set(positions)) and positions[-1] == step.positions[row]
                for place, weight in zip(places, weights_of(tokens, positions), strict=True):
                    mass[n, place // SIZE] += weight
                logits[row] = seen_logits(dict(zip(positions, tokens, strict=True)), positions)
                self.seen.append(positions)
        rows = [logits[row] for row in wanted]
        return (torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, VOCABULARY)), mass

    def __call__(self, step, caches):
        return self.forward_with_mass(step, caches)[0]


def make_engine(num_blocks, forgetting=HEAVY, **options):
    plan = CachePlan((CacheSpec("only", 1, 1, 1, "float32", "float32"),), SIZE, VOCABULARY)
    config = CacheConfig(block_size=SIZE, num_blocks=num_blocks, forgetting=forgetting, **options)
    return Engine(WeighingModule(), plan, config, report=None)


@pytest.mark.parametrize("max_batch_tokens", [3, 2048])
@pytest.mark.parametrize("num_blocks", [10, 200])
def test_tokens_are_the_same_alone_in_chunks_preempted_and_in_any_mix(num_blocks, max_batch_tokens):
    prompts = [*ragged(5, prefix=20), [5] * 40]
    engine = make_engine(num_blocks, max_batch_tokens=max_batch_tokens, max_sequences=4)
    assert engine.generate(prompts, 30) == [Loop().run(prompt, 30) for prompt in prompts]
    check_idle(engine)
    if num_blocks == 10:
        assert engine.stats().preemptions > 0


def test_generation_goes_on_beyond_the_pool():
    engine, most = make_engine(num_blocks=10), 0
    for _ in engine.stream([[1, 2, 3]], 150):
        most = max(most, engine.stats().blocks_used)
        engine.check_integrity()
    # Sinks, two heavy blocks, and what a window of 8 and a stride of 6 may touch.
    assert 6 <= most <= 8
    assert engine.generate([[1, 2, 3]], 150) == [Loop().run([1, 2, 3], 150)]


def test_samples_share_blocks_and_each_gives_back_its_own_reference():
    engine, shared = make_engine(num_blocks=64), 0
    prompt = [3, 1, 4] * 7
    samples = engine.submit(prompt, 30, n=3).samples
    drawn = engine.submit(prompt, 30, Sampling(temperature=2.0, seed=1), n=3).samples
    while engine.step():
        engine.check_integrity()
        shared = max(shared, engine.stats().blocks_shared)
    assert shared > 2
    assert [sample.result() for sample in samples] == [Loop().run(prompt, 30)] * 3
    alone = [make_engine(64).submit(prompt, 30, Sampling(temperature=2.0, seed=1), n=k).samples[-1] for k in (1, 2, 3)]
    assert [sample.result() for sample in drawn] == [sample.result() for sample in alone]
    check_idle(engine)


def test_what_much_attention_goes_to_stays_where_a_window_loses_it():
    prompt = [*range(1, 18), NEEDLE, *range(9, 30)]
    last = {}
    for forgetting in (HEAVY, AttentionSinks(window=16, sinks=3, every=6)):
        engine = make_engine(32, forgetting)
        engine.generate([prompt], 60)
        last[type(forgetting)] = engine.module.seen[-1]
    assert prompt.index(NEEDLE) in last[HeavyHitters] and prompt.index(NEEDLE) not in last[AttentionSinks]
    assert len(last[HeavyHitters]) <= len(last[AttentionSinks])


@pytest.mark.parametrize("wrong", [{"recent": 0}, {"heavy": 0}, {"sinks": 1.5}, {"every": 0}])
def test_what_cannot_be_kept_is_named(wrong):
    with pytest.raises(ConfigError, match=rf"{next(iter(wrong))}=.* of kvpass.HeavyHitters is no whole number"):
        CacheConfig(forgetting=replace(HEAVY, **wrong))


def test_a_module_that_does_not_weigh_is_refused():
    with pytest.raises(ConfigError, match="HistoryModule does not say how much attention blocks receive"):
        history_engine(forgetting=HEAVY)


def test_drafts_are_refused():
    engine = make_engine(16)
    with pytest.raises(ConfigError, match="that of rejected drafts would count"):
        engine.speculate(kvpass.PromptLookup())
    engine.speculate(None)


# Times of forgetting far apart, so that blocks of about the same age compete.
SELDOM = HeavyHitters(recent=8, heavy=4, sinks=3, every=24)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    sizes = dict(d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48)
    model = PyDecoder(PyDecoderConfig(vocab_size=VOCABULARY, **sizes)).eval()
    with torch.no_grad():  # attention that prefers some tokens to others
        for name, parameter in model.named_parameters():
            parameter.mul_(30.0 if "q_proj" in name or "k_proj" in name else 1.0)
    return model


@pytest.fixture(scope="module")
def compiled(model):
    return kvpass.compile(model, CacheConfig(num_blocks=12, block_size=SIZE, forgetting=SELDOM))


def dense(model, ids, shown):
    """Logits of the model, each of whose attentions shows query q the keys ``shown[q]``; and all weights, summed."""
    total = torch.zeros(len(ids), len(ids), dtype=torch.float64)

    def attend(query, key, value, **options):
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scale = options.get("scale") or query.shape[-1] ** -0.5
        weights = (query @ key.transpose(2, 3) * scale).masked_fill(~shown, -torch.inf).softmax(-1)
        total.add_(weights.double().sum((0, 1)))
        return weights @ value

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        return model(torch.tensor([ids]))[0], total


@pytest.mark.slow
def test_a_compiled_model_keeps_the_blocks_that_dense_attention_finds_heaviest(model, compiled):
    """What blocks receive, and each token's chance, are those of dense attention with the same blocks hidden."""
    for seed in range(2):
        prompt = torch.randint(0, VOCABULARY, (17,), generator=torch.Generator().manual_seed(seed)).tolist()
        handle = compiled.submit(prompt, 40, Sampling(temperature=2.0, seed=seed, logprobs=0, ignore_eos=True))
        sequence, noted = handle._request.sequence, {}
        while compiled.step():
            compiled.check_integrity()
            noted[sequence.num_computed] = sequence.received.tolist()
        del noted[0]  # once it has ended
        ids = [*prompt, *handle.result()][:-1]
        loop, shown = Loop(SELDOM), torch.zeros(len(ids), len(ids), dtype=torch.bool)
        for at, token in enumerate(ids):
            if at and (at % SELDOM.every == 0 or at in noted):
                sums = dense(model, ids[:at], shown[:at, :at])[1].sum(0)
                received = {block: float(sums[block * SIZE : block * SIZE + SIZE].sum()) for block in loop.received}
                loop.received = received
            shown[at, loop.append(token)] = True
            if at in noted:
                there = [received[block] for block in loop.blocks if block * SIZE < at]
                assert noted[at] == pytest.approx(there, rel=1e-4, abs=1e-4)
        assert len(noted) > 30
        assert len(loop.received) - len(loop.blocks) >= 5, "nothing was forgotten"
        logits, _ = dense(model, ids, shown)
        expected = torch.log_softmax(logits[len(prompt) - 1 :], -1)
        wanted = expected.gather(1, torch.tensor(handle.result())[:, None])[:, 0]
        found = torch.tensor([entry.logprob for entry in handle.logprobs])
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        whole = dense(model, ids, torch.ones_like(shown).tril())[0]
        assert (torch.log_softmax(whole[len(prompt) - 1 :], -1) - expected).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.slow
def test_generation_goes_on_far_beyond_the_pool_of_a_compiled_model(compiled):
    before = compiled.stats().preemptions
    (tokens,) = compiled.generate([[1, 2, 3]], 120, Sampling(ignore_eos=True))
    assert len(tokens) == 120 > 12 * SIZE and compiled.stats().preemptions == before
    compiled.check_integrity()


@pytest.mark.slow
def test_steps_that_weigh_wrongly_are_found_out(model, compiled, monkeypatch):
    sound = PagedModule.forward_with_mass

    def spoilt(self, step, caches):
        logits, mass = sound(self, step, caches)
        return logits, mass if len(step.token_ids) > 1 else mass.flip(1)

    monkeypatch.setattr(PagedModule, "forward_with_mass", spoilt)
    with pytest.raises(VerificationError, match="steps that weigh attention differ"):
        kvpass.compile(model, CacheConfig(num_blocks=12, block_size=SIZE, forgetting=SELDOM))
