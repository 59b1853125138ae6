"""Masks that do not depend on the length, but are something else far out, or by the rounding and wrapping of numbers.

They may be served, if they are read for what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.adversarial.parts import DIM, Attack, causal, distances, masked, tiny
from tests.adversarial.positions import placed

KLASS = "far or by rounding"


def kept(condition: Callable[[Tensor, Tensor, Tensor], Any]) -> Callable[[Any], Tensor]:
    """A causal mask of the keys for which the condition on `(q - k, q, k)` holds."""

    def mask(s: Any) -> Tensor:
        d, i = distances(s), torch.arange(s)
        return (d >= 0) & condition(d, i[:, None], i[None, :])

    return mask


def seen(condition: Callable[[Tensor, Tensor, Tensor], Any]) -> Callable[[Any], Tensor]:
    """A causal mask, and besides the keys for which the condition holds."""

    def mask(s: Any) -> Tensor:
        d, i = distances(s), torch.arange(s)
        return (d >= 0) | condition(d, i[:, None], i[None, :])

    return mask


def added(bias: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Any], Tensor]:
    """A bias on `(q - k, q, k)`, under a causal mask."""

    def mask(s: Any) -> Tensor:
        d, i = distances(s), torch.arange(s)
        return torch.where(d >= 0, bias(d, i[:, None], i[None, :]).float(), -torch.inf)

    return mask


Plain = Callable[[Any], Tensor]
Within = kept(lambda d, q, k: d < 64)
# Name: the condition for a key to be kept, and a length at which it is no longer causal.
KEPT: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], int]] = {
    "window by two divisions": (lambda d, q, k: d // 20 // 20 < 1, 450),
    "window by a square": (lambda d, q, k: d * d < 40000, 250),
    "window by a shift": (lambda d, q, k: (d >> 4) < 13, 260),
    "window by a multiple": (lambda d, q, k: d * 3 < 700, 300),
    "window by a logarithm": (lambda d, q, k: (d + 1).float().log2() < 7.5, 250),
    "window by a root": (lambda d, q, k: d.float().sqrt() < 12.5, 200),
    "window by an underflow": (lambda d, q, k: torch.exp(-0.7 * d) > 0, 200),
    "window by a hyperbolic tangent": (lambda d, q, k: torch.tanh(d / 30.0) < 1, 350),
    "window by a power": (lambda d, q, k: 0.9**d > 1e-6, 180),
    "window by a sine": (lambda d, q, k: torch.sin(d * 0.01) >= 0, 400),
    "window by bits": (lambda d, q, k: (d & 128) == 0, 150),
    "blocks by exclusive or": (lambda d, q, k: ((q ^ k) >> 7) == 0, 160),
    "hole of queries": (lambda d, q, k: (q // 17 != 19) | (d < 8), 330),
    "hole of keys": (lambda d, q, k: k // 17 != 11, 210),
    "one far key": (lambda d, q, k: k - 11 * 11 != 0, 122),
    "far keys by a hash": (lambda d, q, k: (k * 7919 % 997) // 31 != 30, 200),
    "one far distance": (lambda d, q, k: d != 13 * 13, 200),
    "product of places": (lambda d, q, k: q * k // 400 < 60, 300),
    "sum of squares": (lambda d, q, k: (q * q + k * k) // 1000 < 100, 300),
    "int64 wraps": (lambda d, q, k: d * 2**56 >= 0, 200),
    "int32 wraps": (lambda d, q, k: d.int() * 2**24 >= 0, 200),
    "int16 wraps": (lambda d, q, k: d.short() * 256 >= 0, 200),
    "int8 wraps": (lambda d, q, k: d.to(torch.int8) >= 0, 200),
    "a shift wraps": (lambda d, q, k: (d << 56) >= 0, 200),
    "a power wraps": (lambda d, q, k: (d + 1) ** 9 > 0, 160),
    "a product of places wraps": (lambda d, q, k: (q * k) * 2**48 >= 0, 300),
    "byte of a place": (lambda d, q, k: q.to(torch.uint8) >= k.to(torch.uint8), 300),
    "float16 overflows": (lambda d, q, k: (d.half() * 600).isfinite(), 150),
    "float16 rounds": (lambda d, q, k: (d * 41).half() * 2 == d * 82, 100),
    "inf minus inf": (lambda d, q, k: (q.half() * 600 - k.half() * 600) >= 0, 150),
    "bfloat16 rounds": (lambda d, q, k: (d.bfloat16() == d), 400),
    "float32 swallows": (lambda d, q, k: (d.float() + 2.0**24) - 2.0**24 <= d * 2 - d * (d > 150), 200),
    "floor of a product": (lambda d, q, k: (d.float() * (1 / 61)).floor() * 61 >= d - d % 61, 100),
    "cast cuts a fraction": (lambda d, q, k: (0.05 - d * 0.001).int() >= 0 * d - (d > 900) * 1 - (d > 170) * -1, 200),
}  # fmt: skip
# Name: a mask, another reading of the same text, and a length at which they differ.
READINGS: dict[str, tuple[Plain, Plain, int]] = {
    "floor of a negative": (kept(lambda d, q, k: -d // 64 >= -1), kept(lambda d, q, k: d < 128), 120),
    "truncation of a negative": (
        kept(lambda d, q, k: torch.div(-d, 64, rounding_mode="trunc") >= -1), kept(lambda d, q, k: d <= 64), 120),
    "remainder of a negative": (
        kept(lambda d, q, k: torch.remainder(k - q, 128) >= 64),
        kept(lambda d, q, k: torch.fmod(k - q, 128) >= 64), 60),
    "fmod of a negative": (
        kept(lambda d, q, k: torch.fmod(k - q, 128) > -64),
        kept(lambda d, q, k: torch.remainder(k - q, 128) > -64), 100),
    "shift of a negative": (kept(lambda d, q, k: (-d) >> 6 >= -1), kept(lambda d, q, k: d < 128), 120),
    "and of a negative": (kept(lambda d, q, k: (-d & 127) != 64), causal, 80),
    "round half to even": (kept(lambda d, q, k: (d / 128).round() < 1), Within, 65),
    "round half to even, odd": (kept(lambda d, q, k: (d / 32).round() < 2), kept(lambda d, q, k: d <= 48), 49),
    "sum of booleans": (kept(lambda d, q, k: ((d >= 0) + (d < 64)) == 1), Within, 80),
    "product of booleans": (kept(lambda d, q, k: (d < 64) * (d >= 0) + (k < 3)), Within, 80),
    "exclusive or of booleans": (kept(lambda d, q, k: (d >= 0) ^ (d > 64)), causal, 80),
    "not of an int": (kept(lambda d, q, k: ~(d - 64) >= 0), causal, 80),
    "unsigned difference": (
        kept(lambda d, q, k: q.to(torch.uint8) - k.to(torch.uint8) < 200), kept(lambda d, q, k: d < 200), 300),
    "float division of ints": (kept(lambda d, q, k: d / 64 <= 1), Within, 65),
    "true of a fraction": (kept(lambda d, q, k: (1 - d / 100).to(torch.bool)), causal, 101),
    "true of an int": (kept(lambda d, q, k: (100 - d).bool()), causal, 101),
    "sign": (kept(lambda d, q, k: torch.sign(d - 64) < 1), Within, 65),
    "chained comparison": (kept(lambda d, q, k: (d < 64) == (d >= 0)), causal, 80),
}  # fmt: skip
BIASES: dict[str, tuple[Plain, Plain, int]] = {
    "bias overflows": (added(lambda d, q, k: -(d.float() ** 20)), added(lambda d, q, k: -d * 1e6), 200),
    "bias of a far distance": (added(lambda d, q, k: -(d // 150) * 3), causal, 200),
    "bias beyond a table": (added(lambda d, q, k: -(d // 2100) * 9), causal, 2300),
    "bias of a far place": (added(lambda d, q, k: (k // 17 == 11) * 4), causal, 210),
    "bias of one far pair": (added(lambda d, q, k: (q * k == 20022) * 9), causal, 143),
    "slopes that bend": (added(lambda d, q, k: -0.1 * d * (1 + d // 150)), added(lambda d, q, k: -0.1 * d), 200),
    "slopes that saturate": (
        added(lambda d, q, k: -0.05 * torch.minimum(d, 0 * d + 12 * 12)), added(lambda d, q, k: -0.05 * d), 300),
    "buckets of a logarithm": (added(lambda d, q, k: -((d + 1).float().log2() * 2).floor() * 0.4), causal, 100),
    "bias periodic in the place": (added(lambda d, q, k: torch.cos(k * 0.02) * 3), causal, 200),
    "bias of a query": (added(lambda d, q, k: (q // 17 == 11) * d * -0.5), causal, 200),
    "fill that is no fill": (
        lambda s: torch.where(causal(s), 0.0, -40.0 - 0.0 * distances(s)) + (distances(s) * -0.5).clamp(min=0),
        causal, 60),
}  # fmt: skip
AHEAD: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], int]] = {
    "one far key for all": (lambda d, q, k: k == 13 * 13, 200),
    "a pair of far keys ahead": (lambda d, q, k: (d == -1) & (k // 20 == 9), 200),
    "far block that sees itself": (lambda d, q, k: (q // 17 == 11) & (k // 17 == 11), 210),
    "ahead by a wrap": (lambda d, q, k: (d * 2**56 > 0) & (d < -140), 300),
    "ahead by an overflow": (lambda d, q, k: (q.half() * 600 >= k.half() * 600), 150),
    "all that is far ahead": (lambda d, q, k: d < -12 * 12, 200),
}  # fmt: skip
MASKED_ROWS = 1024


def _looked_up(table: Callable[[], Tensor]) -> Any:
    """A bias by distance from a buffer that is longer than what is probed."""

    def attend(model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        d = distances(q.shape[2])
        bias = torch.where(d >= 0, model.bias[d.clamp(0, MASKED_ROWS - 1)], -torch.inf)
        return torch.nn.functional.scaled_dot_product_attention(2 * q, k, v, attn_mask=bias)

    return tiny(attend=attend, parts=lambda: {"bias": table()})


def _one_step(at: int) -> Tensor:
    table = torch.zeros(MASKED_ROWS)
    table[at:] = -8.0
    return table


def _square(hole: bool) -> Any:
    """A mask cut from a buffer with a hole in its far corner."""

    def attend(model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        s = q.shape[2]
        return torch.nn.functional.scaled_dot_product_attention(2 * q, k, v, attn_mask=model.mask[:s, :s])

    def mask() -> Tensor:
        square = torch.ones(400, 400, dtype=torch.bool).tril()
        if hole:
            square[307:340, :300] = False
        return square

    return tiny(attend=attend, parts=lambda: {"mask": mask()})


def _far_row(value: float) -> Any:
    def parts() -> dict[str, Any]:
        table = torch.zeros(400, DIM)
        table[307] = value * torch.linspace(-1, 1, DIM)
        return {"places": table, "table": nn.Parameter(torch.zeros(1024, DIM))}

    return tiny(enter=lambda model, x, ids: x + model.places[: ids.shape[1]], parts=parts)


def _turned_round(s: Any) -> Tensor:
    i = torch.arange(s)
    return i ^ ((i // 17 == 11) * 1)


ATTACKS: tuple[Attack, ...] = (
    *(Attack(name, KLASS, masked(kept(f)), (n,), masked(causal)) for name, (f, n) in KEPT.items()),
    *(Attack(name, KLASS, masked(mask), (n,), masked(other)) for name, (mask, other, n) in READINGS.items()),
    *(Attack(name, KLASS, masked(mask), (n,), masked(other)) for name, (mask, other, n) in BIASES.items()),
    *(Attack(name, KLASS, masked(seen(f), layers=2), (n,), masked(causal, layers=2)) for name, (f, n) in AHEAD.items()),
    Attack("step in a long table", KLASS, _looked_up(lambda: _one_step(700)), (800,),
           _looked_up(lambda: _one_step(1023))),
    Attack("hole in a long square", KLASS, _square(True), (320,), _square(False)),
    Attack("one far row of a table", KLASS, _far_row(9.0), (308,), _far_row(0.0)),
    Attack("far places turned round", KLASS, placed(_turned_round), (190,), placed(torch.arange)),
    Attack("places that meet far out", KLASS, placed(lambda s: torch.arange(s) % 13**2), (200,), placed(torch.arange)),
)  # fmt: skip
