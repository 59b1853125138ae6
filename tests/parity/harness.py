"""What every parity test compares with: the original model, run over the whole sequence again for each new token."""

import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kvpass.config import CacheConfig
from kvpass.types import Sampling

SEED = 6  # of the weights; at some seeds a decoder repeats itself, whatever the prompt
NEW_TOKENS = 16
TIE = 1e-4  # logits this close to the best may be told apart either way
MOVED = 1e-2  # a logit that moves by this much shows a change of the history
PROMPT_LENGTHS = (3, 18, 44, 60)
SHARED_PREFIX = 33
COMPARED = 0.75  # share of the tokens that must be compared before a tie ends a prompt

CONFIG = CacheConfig(block_size=16, num_blocks=64)

Prompts = list[list[int]]


class Generates(Protocol):
    """The part of `kvpass.Engine` that the harness needs."""

    def generate(self, prompts: Prompts, max_new_tokens: int, sampling: Sampling) -> Prompts: ...


def ragged_prompts(vocab_size: int, seed: int = 0, lengths: Sequence[int] = PROMPT_LENGTHS) -> Prompts:
    """Prompts of unequal length; those longer than `SHARED_PREFIX` begin with the same tokens."""
    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, vocab_size) for _ in range(count)]

    prefix = tokens(SHARED_PREFIX)
    return [prefix + tokens(n - SHARED_PREFIX) if n > SHARED_PREFIX else tokens(n) for n in lengths]


@torch.no_grad()
def original_logits(model: nn.Module, token_ids: Tensor) -> Tensor:
    """Logits `[B, S, V]` of the model as its author calls it; prefix by prefix where it returns the last ones alone."""
    logits = last_logits(model, token_ids)
    if logits.size(1) == token_ids.size(1):
        return logits
    return torch.cat([last_logits(model, token_ids[:, : n + 1]) for n in range(token_ids.size(1))], dim=1)


@torch.no_grad()
def last_logits(model: nn.Module, token_ids: Tensor) -> Tensor:
    """Logits `[B, S or 1, V]` of the model as its author calls it, whatever it asks for and returns."""
    parameters = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {}
    positions = parameters.get("position_ids")
    if positions is not None and positions.default is inspect.Parameter.empty:
        arguments["position_ids"] = torch.arange(token_ids.size(1)).expand(token_ids.shape)
    if "use_cache" in parameters:
        arguments["use_cache"] = False
    output = model(token_ids, **arguments)
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        return output["logits"]
    return output[0] if isinstance(output, tuple) else output.logits


@dataclass(frozen=True, eq=False)
class Continuation:
    """A greedy continuation of one prompt: the tokens, and the logits `[n, V]` each was chosen from."""

    tokens: list[int]
    logits: Tensor


_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], Continuation]] = WeakKeyDictionary()


def naive_generate(model: nn.Module, prompt: list[int], n: int) -> Continuation:
    """Greedy loop with no cache of any kind; what it gave is kept for the next test of the same model."""
    known = _KNOWN.setdefault(model, {})
    if (*prompt, n) not in known:
        known[(*prompt, n)] = _naive_loop(model, prompt, n)
    return known[(*prompt, n)]


def _naive_loop(model: nn.Module, prompt: list[int], n: int) -> Continuation:
    tokens, rows = list(prompt), []
    for _ in range(n):
        rows.append(last_logits(model, torch.tensor([tokens]))[0, -1].float())
        tokens.append(int(rows[-1].argmax()))
    return Continuation(tokens[len(prompt) :], torch.stack(rows))


def assert_tokens_equal(model: nn.Module, engine: Generates, prompts: Prompts, n: int = NEW_TOKENS) -> Prompts:
    """Assert that the engine gives the naive loop's tokens, and return the engine's.

    A token that differs is forgiven where the original holds it for as likely as the best (a tie); what comes after it
    has another history and is not compared.
    """
    outputs = engine.generate(prompts, max_new_tokens=n, sampling=Sampling(ignore_eos=True))
    assert len(outputs) == len(prompts)
    compared = 0
    for number, (prompt, got) in enumerate(zip(prompts, outputs, strict=True)):
        assert len(got) == n, f"prompt {number}: {len(got)} tokens instead of {n}"
        compared += _compare(got, naive_generate(model, prompt, n), f"prompt {number} ({len(prompt)} tokens)")
    assert compared >= COMPARED * n * len(prompts), f"ties left only {compared} tokens to compare"
    return outputs


def _compare(got: list[int], want: Continuation, where: str) -> int:
    """Number of equal tokens before a tie or the end; fails on a difference that is no tie."""
    for step, (token, expected) in enumerate(zip(got, want.tokens, strict=True)):
        if token != expected:
            behind = (want.logits[step].max() - want.logits[step, token]).item()
            assert behind < TIE, (
                f"{where}: new token {step} is {token}, the original gives {expected}, {behind:.4f} ahead\n"
                f"got  {got}\nwant {want.tokens}"
            )
            return step
    return len(got)


def seen_history(model: nn.Module, prompt: list[int]) -> int:
    """How many tokens before the last one move the last logits by more than `MOVED` when they are replaced."""
    spoiled = torch.tensor([prompt] * len(prompt))
    untouched = last_logits(model, spoiled[-1:])[0, -1]
    spoiled.diagonal().add_(7).remainder_(max(prompt))
    moved = (last_logits(model, spoiled[:-1])[:, -1] - untouched).abs().amax(-1)
    return int((moved > MOVED).sum())


def assert_not_blind(model: nn.Module, prompts: Prompts, seen: float, n: int = NEW_TOKENS) -> None:
    """Assert that a broken cache would show: the history moves the logits, and one spoiled token the continuation.

    Args:
        model: the original.
        prompts: those that the parity test uses.
        seen: share of the longest prompt's tokens that must move its last logits; small for windowed attention.
        n: new tokens.
    """
    longest = max(prompts, key=len)
    count = seen_history(model, longest)
    assert count >= max(1, seen * (len(longest) - 1)), f"only {count} tokens of {len(longest)} move the logits"
    spoiled = [[*prompt[:-2], (prompt[-2] + 7) % max(longest), prompt[-1]] for prompt in prompts]
    sound, other = ([naive_generate(model, prompt, n).tokens for prompt in group] for group in (prompts, spoiled))
    changed = sum(a != b for a, b in zip(sound, other, strict=True))
    assert 2 * changed >= len(prompts), f"a spoiled token changed {changed} of {len(prompts)} continuations"
    assert len(set(map(tuple, sound))) == len(prompts), "different prompts give the same tokens"


def allocated_bytes_per_token(engine: Any) -> float:
    """Bytes of an engine's cache tensors, per token that they have room for."""
    slots = engine.caches[0][0].shape[0] * engine.plan.block_size
    return sum(t.numel() * t.element_size() for pair in engine.caches for t in pair) / slots
