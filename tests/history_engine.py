"""An engine over a module that computes its logits from what it reads back through the block tables."""

import random

import numpy as np
import torch

from kvpass.config import CacheConfig
from kvpass.engine.engine import Engine
from kvpass.types import CachePlan, CacheSpec

VOCABULARY = 40
LOGITS = np.random.default_rng(0).standard_normal((997, VOCABULARY), dtype=np.float32)
POWERS = np.array([pow(31, i, 997) for i in range(4096)])


def logits_of(history):
    """Logits after the tokens ``history``: any other token or order gives other ones."""
    return LOGITS[int((np.asarray(history, dtype=np.int64) + 1) @ POWERS[: len(history)] % 997)]


class HistoryModule:
    """Keeps tokens as keys and positions as values, and knows of the past only what it finds in its blocks."""

    device = torch.device("cpu")
    takes_trees = True

    def __init__(self):
        self.steps = 0
        self.trees = 0
        self.before_step = lambda step: None
        self.poison = None

    def __call__(self, step, caches):
        assert torch.is_inference_mode_enabled()
        self.steps += 1
        ((keys, values),) = caches
        size = keys.shape[2]
        (written,), (tables,) = step.slot_mapping.numpy(), step.block_tables.numpy()
        flat_keys, flat_values = keys.view(-1).numpy(), values.view(-1).numpy()
        flat_keys[written] = step.token_ids.numpy()
        flat_values[written] = step.positions.numpy()
        self.before_step(step)
        sequences = torch.searchsorted(step.query_start, step.logits_index, right=True) - 1
        rows = []
        for row, sequence in zip(step.logits_index.tolist(), sequences.tolist(), strict=True):
            places = self.visible(step, row, sequence)
            slots = tables[sequence][places // size] * size + places % size
            assert np.array_equal(flat_values[slots], np.arange(int(step.positions[row]) + 1))
            rows.append(logits_of(flat_keys[slots]))
            if self.poison == flat_keys[slots[0]]:
                rows[-1] = rows[-1] * np.nan
        return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, VOCABULARY)

    def visible(self, step, row, sequence):
        """Places of the tokens that a row sees: earlier ones, and of its step those before it or its ancestors."""
        start, end = step.query_start[sequence : sequence + 2].tolist()
        earlier = int(step.seq_lens[sequence]) - (end - start)
        if step.tree_mask is None:
            return np.arange(earlier + row - start + 1)
        self.trees += 1
        shown = step.tree_mask[row, : end - start]
        assert shown[row - start] and not shown[row - start + 1 :].any()
        return np.concatenate((np.arange(earlier), earlier + shown.nonzero().flatten().numpy()))


def naive(prompt, count, stop_ids=()):
    """Greedy continuation without any cache."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and not (len(tokens) > len(prompt) and tokens[-1] in stop_ids):
        tokens.append(int(logits_of(tokens).argmax()))
    return tokens[len(prompt) :]


def make_engine(max_length=None, eos=(), block_size=4, vocabulary=VOCABULARY, **options):
    plan = CachePlan(
        (CacheSpec("only", 1, 1, 1, "float32", "float32"),),
        block_size,
        vocabulary,
        max_length,
        "learned positions" if max_length else "",
    )
    options.setdefault("num_blocks", 64)
    config = CacheConfig(block_size=block_size, **options)
    engine = Engine(HistoryModule(), plan, config, report=None, eos_token_ids=eos)
    for keys, values in engine.caches:
        keys.fill_(float("nan"))
        values.fill_(float("nan"))
    return engine


def ragged(count, seed=0, prefix=9):
    numbers = random.Random(seed)
    shared = [numbers.randrange(VOCABULARY) for _ in range(prefix)]
    return [
        shared[: numbers.choice((0, prefix))] + [numbers.randrange(VOCABULARY) for _ in range(numbers.randint(1, 20))]
        for _ in range(count)
    ]


def check_idle(engine):
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.blocks_used, stats.running, stats.waiting) == (0, 0, 0)
    assert stats.blocks_free + stats.blocks_cached == stats.blocks_total
    assert not (engine._loop.requests or engine._loop._submitted or engine._loop._cancelled)
