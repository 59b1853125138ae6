"""A format for the keys and for the values of each layer, chosen by what it was measured to cost, under a budget.

First each part (the keys, or the values, of one cache) is narrowed alone, to each format in turn, and the KL divergence
from a float32 cache is measured. Then all parts begin in the widest format, and the step that loses least per byte
saved is taken until the budget is kept. What was chosen is measured as a whole: that losses add up is a guess.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kvpass.compiler import Recompiler
from kvpass.config import CacheConfig
from kvpass.engine.engine import Engine
from kvpass.errors import ConfigError
from kvpass.kernels.formats.cache_formats import find_format
from kvpass.quality.evaluate import CHUNK, REFERENCE, bytes_per_token, calibration_text, compare, count_numbers
from kvpass.quality.replay import Samples
from kvpass.types import CacheSpec

KINDS = ("keys", "values")
Cost = Mapping[str, tuple[int, float]]  # of one part, by format: bytes per token, and KL divergence in nats


@dataclass(frozen=True)
class Budget:
    """Most that a token may take in all caches: bytes, or bits for each number that is stored."""

    amount: float
    unit: str

    def bytes_per_token(self, numbers: int) -> float:
        """The budget for a token of which ``numbers`` numbers are stored."""
        return self.amount if self.unit == "bytes" else self.amount * numbers / 8


def parse_budget(text: str) -> Budget:
    """``"640"`` and ``"640bytes"`` are bytes per token, ``"4.5bits"`` bits per number stored.

    Raises:
        ConfigError: if the text is neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(bytes|bits|B|)\s*", text)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"budget={text!r} is no size of a token: write 640 for bytes per token, or 4.5bits")
    return Budget(float(match[1]), "bits" if match[2] == "bits" else "bytes")


def choose_formats(costs: Sequence[Cost], budget: float) -> list[str]:
    """The format of each part, so that all together take at most ``budget`` bytes per token.

    Greedy: of all ways to narrow one part further, the one that loses least KL per byte saved; at the end, what the
    last step saved too much is given back where that gains most.

    Args:
        costs: of each part the bytes and the loss in every format it may have.
        budget: bytes per token.

    Raises:
        ConfigError: if the narrowest formats take more.
    """
    chosen = [max(cost, key=lambda name: (cost[name][0], -cost[name][1])) for cost in costs]
    least = sum(min(size for size, _ in cost.values()) for cost in costs)
    if least > budget:
        raise ConfigError(
            f"a budget of {budget:g} bytes per token cannot be kept: the narrowest of the formats take {least}; give "
            f"narrower formats or a larger budget"
        )
    while _total(costs, chosen) > budget:
        part, name = min(_moves(costs, chosen, narrower=True), key=lambda move: _loss_per_byte(costs, chosen, move))
        chosen[part] = name
    while True:
        left = budget - _total(costs, chosen)
        wider = [
            (part, name)
            for part, name in _moves(costs, chosen, narrower=False)
            if costs[part][name][0] - costs[part][chosen[part]][0] <= left
            and costs[part][name][1] < costs[part][chosen[part]][1]
        ]
        if not wider:
            return chosen
        part, name = min(wider, key=lambda move: costs[move[0]][move[1]][1] - costs[move[0]][chosen[move[0]]][1])
        chosen[part] = name


@dataclass(frozen=True)
class TunedPart:
    """The keys, or the values, of one cache.

    Attributes:
        cache: name of the cache.
        kind: ``"keys"`` or ``"values"``.
        costs: bytes per token and measured loss in each format.
        chosen: the format chosen.
    """

    cache: str
    kind: str
    costs: Cost
    chosen: str


@dataclass(frozen=True)
class Tuning:
    """What was chosen for a model.

    Attributes:
        parts: keys and values of each cache in turn, in the order of the plan.
        budget: bytes per token that were allowed.
        bytes_per_token: bytes per token of what was chosen.
        predicted_kl: sum of the losses of all parts, each narrowed alone.
        kl: loss measured with all of them narrowed at once, mean over the scored tokens, in nats.
        agreement: share of scored tokens whose likeliest token is that with a float32 cache.
        dtype: what ``CacheConfig(dtype=...)`` takes.
    """

    parts: tuple[TunedPart, ...]
    budget: float
    bytes_per_token: int
    predicted_kl: float
    kl: float
    agreement: float
    dtype: Any


def tune(
    model: nn.Module,
    samples: Sequence[Samples],
    formats: Sequence[str],
    budget: Budget,
    chunk: int = CHUNK,
    stage: Callable[[str], object] = lambda text: None,
) -> Tuning:
    """Choose the formats of a model's caches.

    Args:
        model: as for :func:`kvpass.compile`.
        samples: what the loss is measured on.
        formats: formats that may be chosen.
        budget: most that a token may take.
        chunk: tokens of a sequence in one step.
        stage: called with what comes next.

    Raises:
        ConfigError: if a format does not exist or the budget cannot be kept, before anything is measured.
    """
    for name in formats:
        if name == "k4v2" or find_format(name).settles is not None:
            raise ConfigError(
                "keys and values are chosen apart, and k4v2 stores them together: leave it out of formats"
            )
    stage("capture the model")
    recompiler = Recompiler(model)

    def build(dtype: Any) -> Engine:
        return recompiler.compile(
            CacheConfig(dtype=dtype, num_blocks=1), verify=dtype == REFERENCE, examples=calibration_text(samples)
        )

    reference = build(REFERENCE)
    specs = reference.plan.caches
    names = [spec.name for spec in specs]
    cache_of = [names.index(site.cache) for site in reference.report.sites]

    def option(chosen: Sequence[str]) -> Any:
        pairs = list(zip(chosen[::2], chosen[1::2], strict=True))
        return dtype_option([pairs[cache] for cache in cache_of])

    allowed = budget.bytes_per_token(count_numbers(reference.plan))
    sizes = [_sizes(spec, kind, formats) for spec in specs for kind in KINDS]
    choose_formats([{name: (size, 0.0) for name, size in each.items()} for each in sizes], allowed)
    costs: list[Cost] = []
    for part, each in enumerate(sizes):
        stage(f"narrow the {KINDS[part % 2]} of {specs[part // 2].name}")
        lossy = [name for name in each if name != REFERENCE]
        alone = [[REFERENCE] * part + [name] + [REFERENCE] * (len(sizes) - part - 1) for name in lossy]
        losses = _losses(reference, [build(option(chosen)) for chosen in alone], samples, chunk) if lossy else []
        found = dict(zip(lossy, (kl for kl, _ in losses), strict=True))
        costs.append({name: (size, found.get(name, 0.0)) for name, size in each.items()})
    chosen = choose_formats(costs, allowed)
    stage("measure what was chosen")
    dtype = option(chosen)
    engine = build(dtype)
    ((kl, agreement),) = _losses(reference, [engine], samples, chunk)
    parts = tuple(
        TunedPart(specs[part // 2].name, KINDS[part % 2], cost, name)
        for part, (cost, name) in enumerate(zip(costs, chosen, strict=True))
    )
    predicted = sum(part.costs[part.chosen][1] for part in parts)
    return Tuning(parts, allowed, bytes_per_token(engine.plan), predicted, kl, agreement, dtype)


def dtype_option(pairs: Sequence[tuple[str, str]]) -> Any:
    """``CacheConfig(dtype=...)`` for the key and value format of each attention, in as few words as it takes."""
    ((default, _),) = Counter(pairs).most_common(1)
    exceptions = {index: _spelled(pair) for index, pair in enumerate(pairs) if pair != default}
    return {"default": _spelled(default), "layers": exceptions} if exceptions else _spelled(default)


def _spelled(pair: tuple[str, str]) -> Any:
    key, value = pair
    return key if key == value else {"key": key, "value": value}


def _sizes(spec: CacheSpec, kind: str, formats: Sequence[str]) -> dict[str, int]:
    """Bytes per token of one part in each format that it may have; a part that holds nothing stays as it is."""
    dim = spec.key_dim if kind == "keys" else spec.value_dim
    return (
        {name: find_format(name).bytes_per_token(spec.num_kv_heads, dim) for name in formats} if dim else {REFERENCE: 0}
    )


def _losses(
    reference: Engine, engines: Sequence[Engine], samples: Sequence[Samples], chunk: int
) -> list[tuple[float, float]]:
    """KL divergence and agreement of each engine, means over the scored tokens of all samples."""
    tokens = sum(each.tokens for each in samples)
    found = [compare([reference, *engines], each, chunk)[1:] for each in samples]
    return [
        (
            sum(score.kl * score.tokens for score in scores) / tokens,
            sum(score.agreement * score.tokens for score in scores) / tokens,
        )
        for scores in zip(*found, strict=True)
    ]


def _total(costs: Sequence[Cost], chosen: Sequence[str]) -> int:
    return sum(cost[name][0] for cost, name in zip(costs, chosen, strict=True))


def _moves(costs: Sequence[Cost], chosen: Sequence[str], narrower: bool) -> list[tuple[int, str]]:
    """Changes of one part to a format that takes fewer bytes, or more."""
    return [
        (part, name)
        for part, (cost, now) in enumerate(zip(costs, chosen, strict=True))
        for name, (size, _) in cost.items()
        if (size < cost[now][0] if narrower else size > cost[now][0])
    ]


def _loss_per_byte(costs: Sequence[Cost], chosen: Sequence[str], move: tuple[int, str]) -> float:
    part, name = move
    (size, loss), (size_now, loss_now) = costs[part][name], costs[part][chosen[part]]
    return (loss - loss_now) / (size_now - size)
