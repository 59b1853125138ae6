"""Weights that change while requests run or blocks are kept elsewhere: neither a table row, each a scene of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import kvpass
from tests.adversarial.judge import BLOCK, apart
from tests.adversarial.parameters import Separate, separate
from tests.adversarial.parts import ordinary

SAMPLING = kvpass.Sampling(ignore_eos=True, logprobs=41)


def config(**options: object) -> kvpass.CacheConfig:
    return kvpass.CacheConfig(**{"block_size": BLOCK, "num_blocks": 8, **options})  # type: ignore[arg-type]


def flip_values(model: nn.Module) -> None:
    """Another model: what was cached of values is of no use."""
    assert isinstance(model, Separate)
    with torch.no_grad():
        model.v.weight.mul_(-1.5)


@torch.no_grad()
def wrong_steps(model: nn.Module, prompt: list[int], out: list[int], logprobs: list[kvpass.TokenLogprobs]) -> list[int]:
    """The new tokens whose probabilities are not those that the model gives now, after all that is before them."""
    wrong = []
    for step, found in enumerate(logprobs):
        row = model(torch.tensor([prompt + out[:step]]))[0, -1].log_softmax(-1)
        top = dict(found.top)
        if not apart(torch.tensor([top.get(i, torch.nan) for i in range(len(row))]), row) <= 1e-3:
            wrong.append(step)
    return wrong


def served(engine: kvpass.Engine, prompt: list[int], tokens: int = 2) -> tuple[list[int], list[kvpass.TokenLogprobs]]:
    handle = engine.submit(prompt, tokens, SAMPLING)
    return handle.result(), handle.logprobs


def in_mid_stream() -> Iterator[str]:
    """Changed after the third token of a request."""
    model = separate()()
    engine = kvpass.compile(model, config())
    prompt = ordinary(20)
    handle = engine.submit(prompt, 8, SAMPLING)
    for number, _ in enumerate(handle):
        if number == 2:
            assert not wrong_steps(model, prompt, handle.tokens, handle.logprobs)
            done = handle.num_tokens
            flip_values(model)
    late = [step for step in wrong_steps(model, prompt, handle.tokens, handle.logprobs) if step > done]
    yield from (f"token {step} after the change" for step in late)


def behind_a_prefix(**options: object) -> Iterator[str]:
    """Changed between two requests of one prompt, the blocks of the first being kept on the host or on disk."""
    model = separate()()
    engine = kvpass.compile(model, config(**options))
    prompts = [[(token + shift) % 40 + 1 for token in ordinary(60)] for shift in range(4)]
    for prompt in prompts:  # more than the pool holds
        served(engine, prompt)
    flip_values(model)
    for number, prompt in reversed(list(enumerate(prompts))):  # the newest are still there
        out, logprobs = served(engine, prompt)
        yield from (f"prompt {number}, token {step}" for step in wrong_steps(model, prompt, out, logprobs))


def for_a_later_engine(folder: Path, changes: bool = True) -> Iterator[str]:
    """Changed before blocks are written to disk, under the name of what the weights were."""
    stored = config(disk=folder, disk_memory="16MiB", host_memory="64KiB")
    prompts = [[(token + shift) % 40 + 1 for token in ordinary(40)] for shift in range(30)]
    model = separate()()
    engine = kvpass.compile(model, stored)
    if changes:
        flip_values(model)
    for prompt in prompts:
        served(engine, prompt)
    engine.close()
    model = separate()()
    engine = kvpass.compile(model, stored)
    for number, prompt in enumerate(prompts):
        out, logprobs = served(engine, prompt)
        yield from (f"prompt {number}, token {step}" for step in wrong_steps(model, prompt, out, logprobs))
    if not changes and not engine.stats().tiers.read:
        yield "nothing was read"


def with_samples() -> Iterator[str]:
    """Changed while one of two queued requests is under way."""
    model = separate()()
    engine = kvpass.compile(model, config(max_sequences=1))
    first, second = engine.submit(ordinary(20), 4, SAMPLING), engine.submit(ordinary(18), 4, SAMPLING)
    next(iter(first))
    flip_values(model)
    out = second.result()
    yield from (f"token {step}" for step in wrong_steps(model, ordinary(18), out, second.logprobs))
