"""Legitimate decoders that look like attacks: what refuses them all would pass the table and be of no use."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.adversarial.captures import HandsOn, Remembers, hooked, made
from tests.adversarial.masks import SLOPES
from tests.adversarial.operands import MIXES
from tests.adversarial.parts import DIM, HEAD_DIM, Attack, Build, causal, distances, masked, scored, tiny, window
from tests.adversarial.positions import placed, rotary

KLASS = "control"
NEAR, FAR = (12, 40), (90, 130, 260)


def _parts() -> dict[str, Any]:
    return {
        "scale": nn.Parameter(torch.ones(DIM)),
        "shift": nn.Parameter(torch.zeros(DIM)),
        "matrix": nn.Parameter(torch.zeros(DIM, DIM)),
        "table": nn.Parameter(torch.zeros(41, DIM)),
        "experts": nn.Parameter(torch.zeros(3, DIM, DIM)),
        "mean": torch.zeros(DIM),
        "var": torch.ones(DIM),
        "edges": torch.linspace(-2, 2, 9),
        "gate": nn.Parameter(torch.tensor(0.6)),
    }


def weighted(name: str) -> Build:
    """The attack of that name with a parameter for the mean of the tokens."""
    return tiny(leave=lambda model, x, ids: MIXES[name](model, x, model.gate), parts=_parts)


def _window_of_buffer(model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    s = q.shape[2]
    return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=model.mask[:s, :s])


def _by_token(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    """Another scale for one id: of each token by itself."""
    return torch.where((ids == 7)[..., None], 2 * x.roll(1, -1), x)


def _grown(model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    """Queries scaled by the logarithm of their own place."""
    places = torch.arange(q.shape[2])
    scale = 1 + 0.2 * torch.log(1.0 + places // 32)
    return F.scaled_dot_product_attention(2 * q * scale[:, None], k, v, is_causal=True)


def _counted_twice(s: Any) -> Tensor:
    """An honest causal mask by cumulative sums, and a length that cancels."""
    i = torch.ones(s).cumsum(0)
    return (i[:, None] + s - i[None, :]) >= s


def _normalised(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    weight = F.softplus(model.scale) * torch.linspace(0.5, 1.5, DIM)
    return F.layer_norm(x, (DIM,), weight / weight.mean(), model.shift - model.shift.mean())


def _chunks(size: int) -> Any:
    def mask(s: Any) -> Tensor:
        i = torch.arange(s)
        return (i[:, None] // size == i[None, :] // size) & causal(s)

    return mask


def _two_windows(s: Any) -> Tensor:
    return causal(s) & (distances(s) < torch.tensor([100, 8])[:, None, None])


def _if_short(s: Any) -> Tensor:
    """A branch that makes no difference."""
    d = distances(s)
    return d >= 0 if s < 64 else (d >= 0) & (d < s)


def _bias_of_distance(model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    d = distances(q.shape[2])
    bias = torch.where(d >= 0, model.shift[d.clamp(0, DIM - 1)], -torch.inf)
    return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=bias)


BUFFER = {"mask": torch.ones(300, 300, dtype=torch.bool).tril().triu(-99)}
DECODERS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "causal": (masked(causal), FAR),
    "window of 100": (masked(window(100)), FAR),
    "window of 8": (masked(window(8)), FAR),
    "windows of 100 and 8": (masked(_two_windows), FAR),
    "window of 100 in a buffer": (tiny(attend=_window_of_buffer, parts=lambda: BUFFER), FAR),
    "chunks of 64": (masked(_chunks(64)), FAR),
    "ALiBi": (masked(lambda s: torch.where(causal(s), -SLOPES * distances(s), -torch.inf)), FAR),
    "causal by sums and a length that cancels": (masked(_counted_twice), FAR),
    "causal by sizes": (masked(lambda s: distances(s) > -1 + 0 * s), FAR),
    "causal mask flipped twice": (masked(lambda s: causal(s).flip(0).flip(0)), FAR),
    "causal mask rolled by nothing": (masked(lambda s: torch.roll(causal(s), 0, 0)), FAR),
    "mask cut to its length": (masked(lambda s: causal(s)[:s, :s]), FAR),
    "a branch without effect": (masked(_if_short), (12, 60)),
    "scores scaled by a constant": (scored(lambda scores, s: scores * 0.5), NEAR),
    "scores capped": (scored(lambda scores, s: 5 * torch.tanh(scores / 5)), NEAR),
    "bias by distance": (tiny(attend=_bias_of_distance, parts=_parts), FAR),
    "learned positions": (placed(torch.arange), FAR),
    "positions by cumsum": (placed(lambda s: torch.ones(s).long().cumsum(0) - 1), FAR),
    "positions flipped twice": (placed(lambda s: s - 1 - torch.arange(s).flip(0)), FAR),
    "positions clamped": (placed(lambda s: torch.arange(s).clamp(max=50)), FAR),
    "positions modulo 16": (placed(lambda s: torch.arange(s) % 16), FAR),
    "rotary": (rotary(torch.arange), FAR),
    "rotary from 5": (rotary(lambda s: torch.arange(s) + 5, lambda s: torch.arange(s) + 5), FAR),
    "queries scaled by their place": (tiny(attend=_grown), FAR),
    "embeddings of one id changed": (tiny(leave=_by_token), NEAR),
    "layer_norm weights computed from parameters": (tiny(leave=_normalised, parts=_parts), NEAR),
    "hook": (hooked(lambda x: x * 1.5), NEAR),
    "hook before": (hooked(lambda x: x * 1.5, True), NEAR),
    "two layers": (tiny(layers=2), NEAR),
    "log_softmax": (tiny(finish=lambda model, logits, ids: logits.log_softmax(-1)), NEAR),
    "channels sorted": (tiny(leave=lambda model, x, ids: x.sort(-1).values), NEAR),
    "channels normalised": (tiny(leave=lambda model, x, ids: x / x.std(-1, keepdim=True)), NEAR),
    "heads of a token mixed": (
        tiny(leave=lambda model, x, ids: x.unflatten(-1, (2, HEAD_DIM)).mean(2).repeat(1, 1, 2)), NEAR),
    "torch.cond by a parameter": (weighted("condition of torch.cond"), NEAR),
    "gate of a parameter by item": (weighted("full of an item"), NEAR),
}  # fmt: skip
WEIGHTED = (
    "layer_norm weight", "rms_norm weight", "group_norm weight", "batch_norm mean", "batch_norm variance",
    "conv1d kernel", "conv1d depthwise kernel", "prelu weight", "linear weight", "addmm input", "where condition",
    "masked_fill value", "clamp bounds", "lerp weight", "bucket bounds", "index by a gate", "attention sink",
    "slots of memory", "grid of experts", "module norm called with weights",
)  # fmt: skip

CONTROLS: tuple[Attack, ...] = (
    *(Attack(name, KLASS, build, where) for name, (build, where) in DECODERS.items()),
    *(Attack(f"{name}, of a parameter", KLASS, weighted(name), NEAR) for name in WEIGHTED),
    Attack("a length handed on in an attribute", KLASS, made(HandsOn), FAR),
    Attack("the longest length, kept for nothing", KLASS, made(Remembers, False), (12, 40)),
)
