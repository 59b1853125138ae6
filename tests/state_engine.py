"""An engine over a module that knows of earlier tokens only what it has put into its recurrent states."""

import numpy as np
import torch

from kvpass.config import CacheConfig
from kvpass.engine.engine import Engine
from kvpass.types import CachePlan, CacheSpec, StateSpec

VOCABULARY = 40
LOGITS = np.random.default_rng(1).standard_normal((997, VOCABULARY), dtype=np.float32)
STATES = (StateSpec("hash", (), torch.int64), StateSpec("moments", (2, 3), torch.float32))
CACHES = (CacheSpec("unread", 1, 1, 1, "float32", "float32"),)


def advance(history, token):
    return (history * 31 + token + 1) % 997


def logits_of(tokens):
    history = 0
    for token in tokens:
        history = advance(history, token)
    return LOGITS[history]


def naive(prompt, count):
    """Greedy continuation without any state."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_of(tokens).argmax()))
    return tokens[len(prompt) :]


class StateModule:
    """Hashes its tokens into one state and counts them in the other; the count tells whether each was fed once."""

    device = torch.device("cpu")

    def __init__(self):
        self.before_return = lambda step: None
        self.poison = None

    def __call__(self, step, caches):
        hashes, moments = step.states
        slots = step.state_slots.tolist()
        assert len(set(slots)) == len(slots) == len(step.seq_lens)
        starts = step.query_start.tolist()
        rows = torch.empty(len(step.token_ids), VOCABULARY)
        for slot, start, end in zip(slots, starts, starts[1:], strict=False):
            # Not a trace of an earlier owner: a sequence that begins finds zeros, and one that goes on its own count.
            history, first = int(hashes[slot]), int(step.positions[start])
            assert moments[slot].tolist() == [[first] * 3] * 2 and (first or history == 0)
            for row, token in enumerate(step.token_ids[start:end].tolist(), start):
                history = advance(history, token)
                rows[row] = torch.from_numpy(LOGITS[history]) if token != self.poison else torch.nan
            hashes[slot] = history
            moments[slot] += end - start
        self.before_return(step)
        return rows[step.logits_index]


def make_plan(caches=CACHES, states=STATES, block_size=4):
    return CachePlan(caches, block_size, VOCABULARY, states=states)


def make_engine(caches=CACHES, states=STATES, **options):
    if "memory" not in options:
        options.setdefault("num_blocks", 128)
    config = CacheConfig(block_size=4, **options)
    engine = Engine(StateModule(), make_plan(caches, states), config, report=None)
    for state in engine._loop.states:
        state.fill_(77)
    return engine


def slots_used(engine):
    return engine._scheduler._holdings._slots.num_used


def check_idle(engine):
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.blocks_used, stats.running, stats.waiting, slots_used(engine)) == (0, 0, 0, 0)


def step_all(engine):
    """Step to the end, and look at every invariant after each step; gives the number of steps."""
    steps = 0
    while engine.step():
        engine.check_integrity()
        assert slots_used(engine) == engine.stats().running
        steps += 1
    check_idle(engine)
    return steps
