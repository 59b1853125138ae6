"""What a cache format costs in quality: every format against a cache in float32, on the same tokens.

All formats read the same sequences through their own paged module and their own cache (:mod:`kvpass.quality.replay`),
so the differences are those of the cache and of nothing else. Text says how much is lost on average; tasks of recall
and copying say what text hides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kvpass.compiler import Recompiler
from kvpass.config import CacheConfig
from kvpass.engine.engine import Engine
from kvpass.errors import InputError
from kvpass.kernels.formats.cache_formats import cache_bytes_per_token
from kvpass.quality.measure import count_agreeing
from kvpass.quality.replay import Samples, replay
from kvpass.types import CachePlan, Sampling

CacheDtype: TypeAlias = str | Mapping[str, Any]  # what CacheConfig(dtype=...) takes
REFERENCE = "float32"
GENERATED = "generated"
GREEDY = Sampling(ignore_eos=True)
DRAWN = Sampling(temperature=1.0, ignore_eos=True)
CHUNK = 32  # tokens of a sequence in one step
STEP_TOKENS = 512  # of all sequences together
CALIBRATED = 2  # sequences that fp8 caches are calibrated with


@dataclass(frozen=True)
class Scores:
    """How the scored tokens of some samples were predicted with one cache.

    Attributes:
        tokens: how many there are.
        perplexity: per token.
        kl: mean Kullback-Leibler divergence, in nats, from the distribution with a float32 cache to this one.
        agreement: share of them whose likeliest token is that with a float32 cache.
        accuracy: share of them that are the likeliest token themselves.
    """

    tokens: int
    perplexity: float
    kl: float
    agreement: float
    accuracy: float


@dataclass(frozen=True)
class FormatQuality:
    """What was found for one format of the cache.

    Attributes:
        format: its name, or what stands for it in tables.
        bytes_per_token: bytes that a token takes in all caches, scales included.
        bits_per_element: the same for each number that is stored.
        scores: by name of the samples.
        greedy_in_common: tokens that the greedy continuations of all prompts have in common with those of a float32
            cache before their first difference, as a share of all; None where nothing was continued.
    """

    format: str
    bytes_per_token: int
    bits_per_element: float
    scores: dict[str, Scores] = field(default_factory=dict)
    greedy_in_common: float | None = None


def compare(
    engines: Sequence[Engine],
    samples: Samples,
    chunk: int = CHUNK,
) -> list[Scores]:
    """Scores of each engine; the first is what all are compared with.

    Args:
        engines: engines of one model that differ in the formats of their caches.
        samples: what they read.
        chunk: tokens of a sequence in one step, each computed from what the cache holds of those before.

    Raises:
        InputError: if nothing in the samples is scored.
    """
    if samples.tokens == 0:
        raise InputError(f"no token of {samples.name} is scored: give more text")
    sums = torch.zeros(len(engines), 4, dtype=torch.float64)
    for part in samples.split(max(1, STEP_TOKENS // chunk)):
        for targets, logits in replay(engines, part, chunk):
            log_probs = logits[0].double().log_softmax(-1)
            sums += torch.stack([_sums(targets.to(each.device), log_probs, each) for each in logits])
    means = sums / samples.tokens
    means[:, 0] = means[:, 0].exp()
    return [Scores(samples.tokens, *row) for row in means.tolist()]


def _sums(targets: Tensor, reference: Tensor, logits: Tensor) -> Tensor:
    """Loss, KL divergence, agreeing and right tokens: float64 ``[4]``, sums over R tokens.

    Args:
        targets: int64 ``[R]``.
        reference: log probabilities with a float32 cache, float64 ``[R, V]``.
        logits: those of the cache in question, ``[R, V]``.
    """
    log_probs = logits.double().log_softmax(-1)
    likeliest = logits.argmax(-1)
    return torch.stack(
        (
            -log_probs.gather(1, targets[:, None]).sum(),
            torch.where(reference == -math.inf, 0.0, reference.exp() * (reference - log_probs)).sum(),
            (likeliest == reference.argmax(-1)).double().sum(),
            (likeliest == targets).double().sum(),
        )
    ).cpu()


def evaluate(
    model: nn.Module,
    formats: Mapping[str, CacheDtype],
    samples: Sequence[Samples],
    prompts: Tensor | None = None,
    new_tokens: int = 256,
    chunk: int = CHUNK,
    stage: Callable[[str], object] = lambda text: None,
) -> list[FormatQuality]:
    """Measure the cache formats of a model.

    Args:
        model: as for :func:`kvpass.compile`.
        formats: what ``CacheConfig(dtype=...)`` takes, by the name that it has in the result.
        samples: known sequences that every format reads.
        prompts: int64 ``[N, S]``; continued freely by every format with its own greedy tokens, and with tokens drawn
            by the float32 cache, which then are read by every format as the samples ``"generated"``.
        new_tokens: tokens that are added to each prompt.
        chunk: tokens of a sequence in one step.
        stage: called with what comes next.

    Returns:
        one row for each format, in their order.

    Raises:
        ConfigError: if a format does not exist, before anything is computed.
    """
    blocks = 1
    if prompts is not None:
        blocks = prompts.shape[0] * -(-(prompts.shape[1] + new_tokens) // CacheConfig().block_size)
    configs = {name: CacheConfig(dtype=dtype, num_blocks=blocks) for name, dtype in formats.items()}
    stage("capture the model")
    recompiler = Recompiler(model)
    # What is lossy is measured below; the exact one is verified.
    reference = recompiler.compile(CacheConfig(dtype=REFERENCE, num_blocks=blocks))
    engines = []
    for name, config in configs.items():
        stage(f"rewrite with {name}")
        exact = config.dtype == REFERENCE
        engines.append(
            reference if exact else recompiler.compile(config, verify=False, examples=calibration_text(samples))
        )
    in_common: list[float | None] = [None] * len(engines)
    if prompts is not None:
        stage("continue prompts")
        samples = [*samples, _drawn(reference, prompts, new_tokens)]
        greedy = _continue(reference, prompts, new_tokens)
        for index, engine in enumerate(engines):
            agreeing, compared = count_agreeing(_continue(engine, prompts, new_tokens), greedy)
            in_common[index] = agreeing / compared
    scores: list[dict[str, Scores]] = [{} for _ in engines]
    for each in samples:
        stage(f"read {each.tokens} tokens of {each.name}")
        others = [engine for engine in engines if engine is not reference]
        found = compare([reference, *others], each, chunk)
        by_engine = dict(zip((reference, *others), found, strict=True))
        for row, engine in zip(scores, engines, strict=True):
            row[each.name] = by_engine[engine]
    return [
        FormatQuality(name, bytes_per_token(engine.plan), bits_per_element(engine.plan), row, common)
        for name, engine, row, common in zip(formats, engines, scores, in_common, strict=True)
    ]


def calibration_text(samples: Sequence[Samples]) -> Tensor | None:
    """Token ids ``[B, S]`` that fp8 caches are calibrated with: a few of the sequences; None where there are none."""
    return samples[0].input_ids[:CALIBRATED] if samples else None


def bytes_per_token(plan: CachePlan) -> int:
    """Bytes that one token takes in all caches of a plan, scales included."""
    return sum(map(cache_bytes_per_token, plan.caches))


def bits_per_element(plan: CachePlan) -> float:
    """Bits that each number in the caches takes on average, its share of the scales included."""
    return 8 * bytes_per_token(plan) / max(1, count_numbers(plan))


def count_numbers(plan: CachePlan) -> int:
    """Numbers that are stored of one token in all caches of a plan."""
    return sum(spec.num_kv_heads * (spec.key_dim + spec.value_dim) for spec in plan.caches)


def _continue(engine: Engine, prompts: Tensor, new_tokens: int, sampling: Sampling | None = None) -> list[list[int]]:
    """New tokens of each prompt: greedy ones, or drawn with seeds of their own."""
    drawn = [replace(sampling, seed=index) for index in range(len(prompts))] if sampling else GREEDY
    engine.clear_prefix_cache()
    return engine.generate(prompts.tolist(), new_tokens, drawn)


def _drawn(engine: Engine, prompts: Tensor, new_tokens: int) -> Samples:
    """Texts that the engine writes by itself; its new tokens are scored.

    Drawn and not greedy, since small models repeat themselves when greedy, and a repetition is easy to agree on.
    """
    written = _continue(engine, prompts, new_tokens, DRAWN)
    ids = torch.cat((prompts, torch.tensor(written)), dim=1)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    scored[:, prompts.shape[1] :] = True
    return Samples(GENERATED, ids, scored)
