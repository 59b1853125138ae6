"""Sequences that forget their middle, against a loop that sees exactly the tokens that the definition leaves."""

import numpy as np
import pytest
import torch
from torch import nn

import kvpass
from kvpass import AttentionSinks, CacheConfig
from kvpass.engine.engine import Engine
from kvpass.errors import ConfigError, RefusedError
from kvpass.models.pydecoder import PyDecoder, PyDecoderConfig
from kvpass.runtime.pool.block_pool import BlockPool
from kvpass.runtime.schedule.scheduler import Scheduler
from kvpass.runtime.sequences.sequence import Sequence
from kvpass.types import CachePlan, CacheSpec, Sampling
from tests.history_engine import VOCABULARY, check_idle, logits_of, ragged
from tests.speculating import Branching, always_speculate

SIZE = 4
SINKS = AttentionSinks(window=10, sinks=3, every=6)


def visible(position, eviction=SINKS, size=SIZE):
    """Positions that the token at ``position`` sees, by the definition."""
    since = position // eviction.every * eviction.every - eviction.window
    first = max(0, since) // size * size
    sinks = -(-eviction.sinks // size) * size
    return [p for p in range(position + 1) if first <= sinks or p < sinks or p >= first]


def seen_logits(tokens, positions):
    """Logits that depend on which tokens are seen, where they stand, and their order."""
    return logits_of([(17 * tokens[p] + p) % 1009 for p in positions])


def naive(prompt, count):
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(int(seen_logits(tokens, visible(len(tokens) - 1)).argmax()))
    return tokens[len(prompt) :]


class SeeingModule:
    """Keeps tokens as keys and positions as values; a row sees all that stands before it in its blocks."""

    device = torch.device("cpu")

    def __call__(self, step, caches):
        ((keys, values),) = caches
        flat_keys, flat_values = keys.view(-1).numpy(), values.view(-1).numpy()
        slots = step.slot_mapping[0].numpy()
        flat_keys[slots], flat_values[slots] = step.token_ids.numpy(), step.positions.numpy()
        starts, lengths = step.query_start.tolist(), step.seq_lens.tolist()
        rows = []
        for row in step.logits_index.tolist():
            sequence = next(n for n in range(len(lengths)) if starts[n] <= row < starts[n + 1])
            places = np.arange(lengths[sequence] - (starts[sequence + 1] - row) + 1)
            table = step.block_tables[0, sequence].numpy()
            found = table[places // SIZE] * SIZE + places % SIZE
            positions = flat_values[found].astype(int)
            assert positions[-1] == step.positions[row] and (np.diff(positions) > 0).all()
            tokens = dict(zip(positions.tolist(), flat_keys[found].astype(int).tolist(), strict=True))
            rows.append(seen_logits(tokens, positions.tolist()))
        return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, VOCABULARY)


def make_engine(num_blocks, forgetting=SINKS, **options):
    plan = CachePlan((CacheSpec("only", 1, 1, 1, "float32", "float32"),), SIZE, VOCABULARY)
    config = CacheConfig(block_size=SIZE, num_blocks=num_blocks, forgetting=forgetting, **options)
    return Engine(SeeingModule(), plan, config, report=None)


@pytest.mark.parametrize("max_batch_tokens", [3, 2048])
@pytest.mark.parametrize("num_blocks", [10, 200])
def test_tokens_are_the_same_alone_in_chunks_preempted_and_in_any_mix(num_blocks, max_batch_tokens):
    prompts = [*ragged(6, prefix=20), [5] * 50]
    engine = make_engine(num_blocks, max_batch_tokens=max_batch_tokens, max_sequences=4)
    assert engine.generate(prompts, 40) == [naive(prompt, 40) for prompt in prompts]
    check_idle(engine)
    if num_blocks == 10:
        assert engine.stats().preemptions > 0


def test_generation_goes_on_beyond_the_pool():
    engine = make_engine(num_blocks=8)
    most = 0
    for _ in engine.stream([[1, 2, 3]], 300):
        most = max(most, engine.stats().blocks_used)
        engine.check_integrity()
    # Sinks, window and stride: 4 + 10 + 6 tokens, and what is begun of two blocks.
    assert 5 <= most <= 8 < 300 / SIZE
    assert engine.generate([[1, 2, 3]], 300) == [naive([1, 2, 3], 300)]


def test_forked_sequences_share_blocks_and_neither_takes_one_from_the_other():
    pool = BlockPool(64, SIZE)
    scheduler = Scheduler(pool, None, 64, 8, forgetting=SINKS)
    first = Sequence([3] * 19, 40, Sampling(), 0)
    scheduler.add(first)
    shared, twins = 0, []
    while scheduler.num_running or scheduler.num_waiting:
        step = scheduler.schedule()
        scheduler.commit(step, [[sequence.num_output % 7] for sequence in step.sampled])
        scheduler.check_integrity()
        shared = max(shared, pool.num_shared)
        if first.num_output == 3 and not twins:
            twins = scheduler.fork(first, [1, 2])
    assert shared > 2 and [twin.num_output for twin in twins] == [40, 40]
    assert (pool.num_used, pool.num_free) == (0, 64)


@pytest.mark.parametrize(
    ("eviction", "message"),
    [
        (64, "forgetting=64 is no way to forget tokens"),
        (AttentionSinks(window=0), "window=0 of kvpass.AttentionSinks"),
        (AttentionSinks(window=8, sinks=0), "sinks=0 of kvpass.AttentionSinks"),
        (AttentionSinks(window=8, every=1.5), "every=1.5 of kvpass.AttentionSinks"),
    ],
)
def test_what_cannot_be_forgotten_is_named(eviction, message):
    with pytest.raises(ConfigError, match=message):
        CacheConfig(forgetting=eviction)
    with pytest.raises(ConfigError, match="sequences that forget share no prefixes"):
        CacheConfig(forgetting=SINKS, host_memory="1MiB")


class WithDistances(nn.Module):
    """One attention with ALiBi."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, ids):
        x = self.embed(ids)
        at = torch.arange(ids.shape[1])
        far = (at[None, :] - at[:, None]).float() * 0.5
        scores = (x @ x.transpose(1, 2) + far).masked_fill(at[None, :] > at[:, None], -torch.inf)
        return self.head(scores.softmax(-1) @ x)


def test_a_mask_by_distance_is_refused():
    with pytest.raises(RefusedError, match="tokens can be forgotten only where every mask is causal alone"):
        kvpass.compile(WithDistances().eval(), CacheConfig(num_blocks=8, forgetting=SINKS), verify=False)


def test_a_compiled_model_sees_what_the_original_sees_with_the_middle_hidden():
    torch.manual_seed(0)
    sizes = dict(d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24)
    model = PyDecoder(PyDecoderConfig(vocab_size=40, **sizes)).eval()
    engine = kvpass.compile(model, CacheConfig(num_blocks=8, block_size=SIZE, forgetting=SINKS), verify=False)
    handle = engine.submit([1, 2, 3], 60, Sampling(temperature=3.0, seed=1, logprobs=0))
    sequence = torch.tensor([[1, 2, 3, *handle.result()]])
    # With one layer, keys and values depend on their own token alone: hiding the middle is leaving it out of attention.
    hidden = torch.full((63, 63), -torch.inf)
    for position in range(63):
        hidden[position, visible(position)] = 0.0
    found = [entry.logprob for entry in handle.logprobs]
    expected, whole = (
        torch.log_softmax(logits[0, 2:-1], -1).gather(1, sequence[0, 3:, None])[:, 0]
        for logits in (logits_with_mask(model, sequence, hidden), model(sequence).detach())
    )
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-4)
    assert (expected - whole).abs().max() > 1e-2, "nothing was forgotten"
    # Trees of drafts, in sequences that forget.
    prompts, drawn = [[1, 2, 3], [4] * 20], Sampling(temperature=3.0, seed=1)
    plain = engine.generate(prompts, 60, drawn)
    always_speculate(engine, Branching(zip(prompts, plain, strict=True), mistakes=0.5, max_draft=2))
    assert engine.generate(prompts, 60, drawn) == plain
    assert engine.stats().drafted_trees > 5


def logits_with_mask(model, ids, mask):
    """The model's logits, its SDPA given ``mask`` instead of being causal."""
    attend = torch.nn.functional.scaled_dot_product_attention

    def masked(query, key, value, attn_mask=None, is_causal=False, **options):
        return attend(query, key, value, attn_mask=mask, **options)

    torch.nn.functional.scaled_dot_product_attention = masked
    try:
        with torch.no_grad():
            return model(ids)
    finally:
        torch.nn.functional.scaled_dot_product_attention = attend
