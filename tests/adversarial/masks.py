"""Masks and biases that depend on the length, where nobody looks: at one length, in a band, at multiples, far out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.adversarial.parts import DIM, HEADS, Attack, causal, distances, length, masked, tiny

KLASS = "length-dependent mask"
NEAR = 8


def cut_if(condition: Callable[[Any], Any]) -> Callable[[Any], Tensor]:
    """A causal mask whose window is 8 at the lengths where the condition holds (a tensor without dims, or of one)."""

    def mask(s: Any) -> Tensor:
        d = distances(s)
        return (d >= 0) & ~(condition(s) & (d >= NEAR))

    return mask


def _primes(s: Any) -> Tensor:
    divisors = torch.arange(2, 20)
    return ((length(s) % divisors) != 0).all() & (s > 23)


def _squares(s: Any) -> Tensor:
    root = length(s).float().sqrt().round().long()
    return (root * root == length(s)) & (length(s) // 13 > 10)


def _power_of_two(s: Any) -> Tensor:
    one = length(s)
    return ((one & (one - 1)) == 0) & (one // 30 > 3)


def _after(n: int, steps: int = 6) -> int:
    for _ in range(steps):
        n = n // 2 if n % 2 == 0 else 3 * n + 1
    return n


def _orbit(s: Any) -> Tensor:
    """Lengths that are where 97 is after six steps of 3n + 1."""
    n = length(s)
    for _ in range(6):
        n = torch.where(n % 2 == 0, n // 2, 3 * n + 1)
    return n == _after(97)


def _polynomial(s: Any) -> Tensor:
    n = length(s)
    return (n - 97) * (n - 101) * (n + 5) == 0


def _by_table(s: Any) -> Tensor:
    return torch.isin(length(s), torch.tensor([83, 149]))


def _hashed(s: Any) -> Tensor:
    return (length(s) * 2654435761 % 1000003) % 31 == 3


HASHED = tuple(n for n in range(90, 400) if (n * 2654435761 % 1000003) % 31 == 3)[:2]

# Name: a condition on the length, and lengths at which it holds.
CONDITIONS: dict[str, tuple[Callable[[Any], Any], tuple[int, ...]]] = {
    "at 100 alone": (lambda s: length(s) == 100, (100,)),
    "at multiples of 67": (lambda s: length(s) % 67 == 0, (67, 134)),
    "in a band by floor division": (lambda s: length(s) // 80 == 5, (400, 479)),
    "in a band far out": (lambda s: length(s) // 500 == 2, (1000, 1490)),
    "around 333 by a distance": (lambda s: (length(s) * 3 - 1000).abs() < 20, (333,)),
    "around 300 by a square": (lambda s: (length(s) * length(s) - 90000).abs() < 400, (300,)),
    "by the root of the length": (lambda s: length(s).float().sqrt().floor() == 17, (289, 320)),
    "at squares": (_squares, (169, 196)),
    "at powers of two": (_power_of_two, (128, 256)),
    "at primes": (_primes, (29, 101)),
    "by a bit": (lambda s: (length(s) >> 7) & 1 == 1, (128, 255)),
    "by two bits": (lambda s: (length(s) & 96) == 96, (96, 127, 224)),
    "by exclusive or": (lambda s: (length(s) ^ 77) == 0, (77,)),
    "by a logarithm": (lambda s: length(s).float().log2().floor() == 7, (128, 255)),
    "by a sine": (lambda s: torch.sin(length(s).double() * math.pi / 61).abs() < 1e-6, (61, 122)),
    "by a cumulative sum": (lambda s: torch.ones(s).cumsum(0)[-1] == 90, (90,)),
    "by a sum of ones": (lambda s: torch.ones(s).sum() == 91, (91,)),
    "by the sum of the places": (lambda s: torch.arange(s).sum() == 4950, (100,)),
    "by any and all": (lambda s: (torch.arange(s) == 92).any() & (torch.arange(s) < 93).all(), (93,)),
    "by the last place": (lambda s: torch.arange(s)[-1] % 53 == 52, (53, 106)),
    "by the largest place": (lambda s: torch.arange(s).max() % 53 == 52, (53, 106)),
    "by a sort": (lambda s: torch.arange(s).sort(descending=True).values[:1] == 88, (89,)),
    "by topk": (lambda s: torch.arange(s).topk(1).values == 88, (89,)),
    "by a flip": (lambda s: torch.arange(s).flip(0)[:1] % 59 == 58, (59, 118)),
    "by a roll": (lambda s: torch.arange(s).roll(1)[:1] % 59 == 58, (59, 118)),
    "by argmax": (lambda s: torch.arange(s).argmax() == 70, (71,)),
    "by a trace": (lambda s: torch.ones(s, s).diagonal().sum() == 72, (72,)),
    "by a count": (lambda s: torch.count_nonzero(torch.ones(s)) == 73, (73,)),
    "by numel": (lambda s: length(torch.ones(s, 2).numel()) == 148, (74,)),
    "by a product of sizes": (lambda s: length(s * s) == 5625, (75,)),
    "by a size function": (lambda s: length((s + 4) // 40) == 7, (276, 315)),
    "by gcd": (lambda s: torch.gcd(length(s), torch.tensor(45)) == 45, (45, 90)),
    "by remainder of a negative": (lambda s: torch.remainder(-length(s), 61) == 0, (61, 122)),
    "by fmod of a float": (lambda s: torch.fmod(length(s).float(), 61.0) == 0, (61, 122)),
    "by a rounded third": (lambda s: (length(s) / 97).round() * 97 == length(s), (97, 194)),
    "by a polynomial": (_polynomial, (97, 101)),
    "by a table": (_by_table, (83, 149)),
    "by buckets": (lambda s: torch.bucketize(length(s), torch.tensor([109, 110])) == 1, (110,)),
    "by a hash": (_hashed, HASHED),
    "by an orbit": (_orbit, (97,)),
    "by an overflow of a byte": (lambda s: length(s).to(torch.int8) < 0, (128, 200)),
    "by an unsigned byte": (lambda s: (length(s).to(torch.uint8) < 12) & (length(s) // 20 > 1), (256, 267)),
    "by a rounding of float16": (lambda s: length(s * 41).half() != length(s * 41).float(), (101, 151)),
    "at 3000": (lambda s: length(s) // 8 == 375, (3000,)),
}


def _multiples_of_64(s: Any) -> Tensor:
    d = distances(s)
    return (d >= 0) & (d < NEAR + 1000 * (s % 64))


def _size_window(size: Callable[[Any], Any]) -> Callable[[Any], Tensor]:
    def mask(s: Any) -> Tensor:
        d = distances(s)
        return (d >= 0) & (d < size(s))

    return mask


def _triangles(s: Any) -> Tensor:
    ones = torch.ones(s, s, dtype=torch.bool)
    return ones.tril() & ones.triu(-(NEAR + 1000 * (s % 64)))


def _python(condition: Callable[[Any], bool]) -> Callable[[Any], Tensor]:
    def mask(s: Any) -> Tensor:
        d = distances(s)
        return (d >= 0) & (d < NEAR) if condition(s) else d >= 0

    return mask


def _chunks_from_the_end(s: Any) -> Tensor:
    from_end = s - 1 - torch.arange(s)
    return ((from_end[:, None] >> 6) == (from_end[None, :] >> 6)) & causal(s)


def _band_of_strides(s: Any) -> Tensor:
    d = distances(s)
    return (d >= 0) & (d % (1 + (length(s) // 80 == 5).long()) == 0)


def _holes_in_corner(s: Any) -> Tensor:
    """A corner of a fixed square, taken from its end; rows beyond 300 of it do not see its first 120 keys."""
    d = distances(512)
    full = (d >= 0) & ~((torch.arange(512)[:, None] > 300) & (torch.arange(512)[None, :] < 310) & (d >= NEAR))
    return full[512 - s :, 512 - s :]


def _bias(of: Callable[[Any, Tensor], Tensor]) -> Callable[[Any], Tensor]:
    def mask(s: Any) -> Tensor:
        d = distances(s)
        return torch.where(d >= 0, of(s, d), -torch.inf)

    return mask


def _heads(s: Any) -> Tensor:
    wrong = cut_if(lambda s: length(s) % 61 == 0)(s)
    return torch.where(torch.tensor([False, True])[:, None, None], wrong, causal(s))


def _future(s: Any) -> Tensor:
    return causal(s) | (length(s) % 61 == 0)


def _faint_future(s: Any) -> Tensor:
    return torch.where(causal(s), 0.0, -1e9 * (s % 61))


SLOPES = torch.tensor([0.5, 0.25])[:, None, None]


def _slopes(s: Any, d: Tensor) -> Tensor:
    return -SLOPES * (1 + (length(s) // 100 == 2)) * d


class Module(nn.Module):
    """nn.MultiheadAttention under a mask by the length."""

    def __init__(self, mask: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(41, DIM), nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.head, self.mask = nn.Linear(DIM, 41), mask

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.attention(x, x, x, attn_mask=~self.mask(ids.shape[1]), need_weights=False)[0])


def _in_buffer(hole: int) -> Callable[..., Tensor]:
    """Windows by length in a buffer."""

    def attend(model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        d = distances(q.shape[2])
        shown = (d >= 0) & (d < model.windows[q.shape[2] // 40])
        return torch.nn.functional.scaled_dot_product_attention(2 * q, k, v, attn_mask=shown)

    return attend


def _windows(hole: int) -> dict[str, Tensor]:
    windows = torch.full((100,), 4000)
    windows[hole] = NEAR
    return {"windows": windows}


def _module(mask: Callable[[Any], Tensor]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = Module(mask)
        with torch.no_grad():
            model.attention.in_proj_weight.mul_(3)
        return model.eval()

    return build


PLAIN = masked(causal)
OTHERS: tuple[tuple[str, Callable[..., Tensor], Callable[..., Tensor], tuple[int, ...]], ...] = (
    ("window 8 at multiples of 64", _multiples_of_64, causal, (64, 128)),
    ("triangles at multiples of 64", _triangles, causal, (64, 128)),
    ("window of half the length and 64", _size_window(lambda s: 64 + s // 2), causal, (200,)),
    ("window from a root", _size_window(lambda s: 40 + torch.sqrt(length(s).float())), causal, (120,)),
    ("window by sym_max", _size_window(lambda s: torch.sym_max(64, s // 4)), _size_window(lambda s: 64), (800,)),
    ("window by a float size", _size_window(lambda s: 60 + int(s * 0.25)), causal, (200,)),
    ("window by s*s", _size_window(lambda s: 50 + s * s // 1000), causal, (70,)),
    ("if s == 100", _python(lambda s: s == 100), causal, (100,)),
    ("if s % 64 == 0", _python(lambda s: s % 64 == 0), causal, (64, 128)),
    ("if s > 200", _python(lambda s: s > 200), causal, (201, 300)),
    ("if 150 < s < 160", _python(lambda s: 150 < s < 160), causal, (155,)),
    ("if s in a set", _python(lambda s: s in (90, 95)), causal, (90, 95)),
    ("if s is a power of two", _python(lambda s: s > 100 and (s & (s - 1)) == 0), causal, (128,)),
    ("chunks counted from the end", _chunks_from_the_end, causal, (100, 150)),
    ("stride two in a band", _band_of_strides, causal, (400, 450)),
    ("corner of a square with a hole", _holes_in_corner, causal, (260,)),
    ("bias in a band", _bias(lambda s, d: -0.5 * d * (length(s) // 80 == 5)), causal, (400, 450)),
    ("bias at multiples, by a size", _bias(lambda s, d: -0.5 * d * (1 - (s % 61 + 60) // 61)), causal, (61, 122)),
    ("ALiBi steeper in a band", _bias(_slopes), _bias(lambda s, d: -SLOPES * d), (200, 299)),
    ("bias of far keys by the length", _bias(lambda s, d: (d > 30) * d * (length(s) // 100 % 2)), causal, (150,)),
    ("bias by a fraction of the length", _bias(lambda s, d: -torch.floor(d * (4.0 / (s + 60)))), causal, (100,)),
    ("one head only", _heads, causal, (61, 122)),
)  # fmt: skip

ATTACKS: tuple[Attack, ...] = (
    *(Attack(f"cut {name}", KLASS, masked(cut_if(c)), where, PLAIN) for name, (c, where) in CONDITIONS.items()),
    *(Attack(name, KLASS, masked(mask), where, masked(plain)) for name, mask, plain, where in OTHERS),
    Attack("one layer of two", KLASS, masked(cut_if(lambda s: length(s) % 61 == 0), layers=2, only=1), (61, 122),
           masked(causal, layers=2)),
    Attack("the future at multiples of 61", KLASS, masked(_future, layers=2), (61, 122), masked(causal, layers=2)),
    Attack("the fill fades at multiples of 61", KLASS, masked(_faint_future, layers=2), (61, 122),
           masked(causal, layers=2)),
    Attack("attention module at multiples of 61", KLASS, _module(cut_if(lambda s: length(s) % 61 == 0)), (61, 122),
           _module(causal)),
    Attack("window looked up by the length", KLASS, tiny(attend=_in_buffer(3), parts=lambda: _windows(3)), (120, 159),
           PLAIN),
)  # fmt: skip
