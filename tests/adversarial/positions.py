"""Positions that nobody can prove: they jump at some lengths, or count from the end beyond one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.adversarial.masks import cut_if
from tests.adversarial.parts import DIM, HEAD_DIM, Attack, Build, causal, distances, length, masked, tiny

KLASS = "positions"
ROWS = 1024
Places = Callable[[Any], Tensor]


def _table() -> dict[str, Any]:
    return {"table": nn.Parameter(torch.zeros(ROWS, DIM))}


def _learned(model: Any, x: Tensor, places: Tensor) -> Tensor:
    return x + model.table[places]


def _embedded(model: Any, x: Tensor, places: Tensor) -> Tensor:
    return x + F.embedding(places, model.table)


def _sinusoid(model: Any, x: Tensor, places: Tensor) -> Tensor:
    angles = places[:, None].float() / 2.0 ** torch.arange(DIM // 2)
    return x + torch.cat([angles.sin(), angles.cos()], -1)


def placed(places: Places, form: Callable[..., Tensor] = _learned, **options: Any) -> Build:
    """A decoder whose positions, added behind the embedding, are `places(s)`."""

    def enter(model: Any, x: Tensor, ids: Tensor) -> Tensor:
        return form(model, x, places(ids.shape[1]))

    return tiny(enter=enter, parts=_table, **options)


def turn(x: Tensor, places: Tensor, base: Any = 100.0) -> Tensor:
    """Rotary on heads `[B, H, S, D]`."""
    rates = base ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = places[:, None].float() * rates
    first, second = x.chunk(2, -1)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def rotary(
    keys: Places, queries: Places = torch.arange, base: Callable[[Any], Any] = lambda s: 100.0, **options: Any
) -> Build:
    """A decoder with rotary at the places `keys(s)` and `queries(s)`, of the frequencies that `base(s)` gives."""

    def attend(model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        s = q.shape[2]
        q, k = turn(q, queries(s), base(s)), turn(k, keys(s), base(s))
        return F.scaled_dot_product_attention(2 * q, k, v, is_causal=True)

    return tiny(attend=attend, **options)


def complexly(keys: Places) -> Build:
    """Rotary by complex numbers."""

    def spin(x: Tensor, places: Tensor) -> Tensor:
        angles = places[:, None].float() * 0.3 ** torch.arange(HEAD_DIM // 2)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten(-2)

    def attend(model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        s = q.shape[2]
        return F.scaled_dot_product_attention(2 * spin(q, torch.arange(s)), spin(k, keys(s)), v, is_causal=True)

    return tiny(attend=attend)


def entering(change: Callable[[Tensor, Any], Tensor]) -> Build:
    """A decoder whose embedded tokens are changed by `change(x, s)`."""
    return tiny(enter=lambda model, x, ids: change(x, ids.shape[1]))


def querying(change: Callable[[Tensor, Any], Tensor]) -> Build:
    """A decoder whose queries are changed by `change(q, s)`."""

    def attend(model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return F.scaled_dot_product_attention(2 * change(q, q.shape[2]), k, v, is_causal=True)

    return tiny(attend=attend)


def _sorted_places(s: Any) -> Tensor:
    sign = 1 - 2 * (length(s) // 80 == 5).long()
    return torch.argsort(torch.arange(s) * sign)


def _clamped_from_end(s: Any) -> Tensor:
    return (torch.arange(s) - (length(s) - 90).clamp(min=0)).clamp(min=0)


def _interpolated(s: Any) -> Tensor:
    return torch.arange(s) * (90.0 / length(s).clamp(min=90))


def _ntk(s: Any) -> Tensor:
    grown = (length(s).float() / 90).clamp(min=1.0)
    return 100.0 * grown ** (HEAD_DIM / (HEAD_DIM - 2))


def _ntk_by_size(s: Any) -> Any:
    return 100.0 * (torch.sym_max(s, 90) / 90) ** (HEAD_DIM / (HEAD_DIM - 2))


def _ntk_branch(s: Any) -> Any:
    return 100.0 * (s / 90) ** 1.3 if s > 90 else 100.0


def _switched(s: Any) -> Tensor:
    return torch.where(length(s) > 90, 20.0, 100.0)


def _from_table(start: Callable[[Any], Any]) -> Build:
    def enter(model: Any, x: Tensor, ids: Tensor) -> Tensor:
        s = ids.shape[1]
        return x + torch.narrow(model.table, 0, start(s), s)

    return tiny(enter=enter, parts=_table)


def _rolled_table(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    s = ids.shape[1]
    return x + model.table.roll(s // 90, 0)[:s]


def _rolled_mask(s: Any) -> Tensor:
    return torch.roll(cut_if(lambda s: length(s) % 61 == 0)(s), 0, 0)


def _unread_mask(change: Callable[[Tensor], Tensor]) -> Places:
    """A mask that is cut at multiples of 61, behind an op that changes nothing and that few can read."""
    return lambda s: change(cut_if(lambda s: length(s) % 61 == 0)(s))


class AsksForPositions(nn.Module):
    """Takes position ids, and is off by one against those of its own at some lengths."""

    def __init__(self, band: int) -> None:
        super().__init__()
        self.inner = tiny(parts=_table)()
        self.band = band

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is None:
            s = input_ids.shape[1]
            position_ids = (torch.arange(s) + s // self.band).expand_as(input_ids)
        inner = self.inner
        inner.enter = lambda model, x, ids: x + model.table[position_ids]
        return inner(input_ids)


ARANGE: Places = torch.arange
BAND = (400, 450)
MULTIPLES = (61, 122)
# Name: places by the length, and lengths at which they are not 0, 1, 2, ...
PLACES: dict[str, tuple[Places, tuple[int, ...]]] = {
    "zero at multiples": (lambda s: torch.arange(s) * (length(s) % 60 != 7), (67, 127)),
    "counted by cumsum": (lambda s: torch.ones(s).long().cumsum(0) - 1 + (length(s) == 90), (90,)),
    "by flip": (lambda s: s - 1 - torch.arange(s).flip(0) + (length(s) // 80 == 5), BAND),
    "by where": (lambda s: torch.where(length(s) % 61 == 0, torch.arange(s) + 2, torch.arange(s)), MULTIPLES),
    "offset by a size": (lambda s: torch.arange(s) + s // 90, (90, 180)),
    "offset in arange": (lambda s: torch.arange(s // 90, s + s // 90), (90, 180)),
    "offset beyond 100": (lambda s: torch.arange(s) + 3 * (length(s) > 100), (101, 140)),
    "sorted the other way in a band": (_sorted_places, BAND),
    "from the end beyond 90": (_clamped_from_end, (95, 130)),
    "modulo at multiples": (lambda s: torch.arange(s) % (8 + 5000 * (s % 61)), MULTIPLES),
    "clamped by the length": (lambda s: torch.minimum(torch.arange(s), length(s) // 2 + 40), (100,)),
    "doubled by a bit": (lambda s: torch.arange(s) << ((length(s) >> 7) & 1), (128, 200)),
    "last token alone": (lambda s: torch.where(torch.arange(s) == s - 1, s // 90 + s - 1, torch.arange(s)), (95, 120)),
    "by a cumulative product": (
        lambda s: torch.arange(s) + (torch.full((8,), 1.05).cumprod(0)[-1] < length(s) / 200),
        (300,),
    ),
    "by an overflow of a byte": (lambda s: torch.arange(s).to(torch.int8).long() % 512, (130, 200)),
    "by searchsorted": (lambda s: torch.searchsorted(torch.arange(s) + (length(s) == 90), torch.arange(s)), (90,)),
    "by a triangle": (lambda s: torch.ones(s, s).tril().sum(-1).long() - 1 + (length(s) // 80 == 5), BAND),
    "by linspace": (lambda s: torch.linspace(0, s - 1 + s // 90, s).round().long(), (95, 180)),
}
FORMS: tuple[tuple[str, Build, Build, tuple[int, ...]], ...] = (
    ("embedding by where", placed(PLACES["by where"][0], _embedded), placed(ARANGE, _embedded), MULTIPLES),
    ("sinusoid in a band", placed(PLACES["by flip"][0], _sinusoid), placed(ARANGE, _sinusoid), BAND),
    ("sinusoid interpolated beyond 90", placed(_interpolated, _sinusoid), placed(ARANGE, _sinusoid), (95, 180)),
    ("sinusoid scaled by sizes", placed(lambda s: torch.arange(s) / (1 + s // 90), _sinusoid),
     placed(ARANGE, _sinusoid), (95, 180)),
    ("rotary keys by where", rotary(PLACES["by where"][0]), rotary(ARANGE), MULTIPLES),
    ("rotary keys zero at multiples", rotary(PLACES["zero at multiples"][0]), rotary(ARANGE), (67, 127)),
    ("rotary queries off by a size", rotary(ARANGE, PLACES["offset by a size"][0]), rotary(ARANGE), (95, 185)),
    ("rotary complex by where", complexly(PLACES["by where"][0]), complexly(ARANGE), MULTIPLES),
    ("rotary NTK beyond 90", rotary(ARANGE, base=_ntk), rotary(ARANGE), (130, 200)),
    ("rotary NTK by a size", rotary(ARANGE, base=_ntk_by_size), rotary(ARANGE), (130, 200)),
    ("rotary NTK by a branch", rotary(ARANGE, base=_ntk_branch), rotary(ARANGE), (130, 200)),
    ("rotary switched beyond 90", rotary(ARANGE, base=_switched), rotary(ARANGE), (91, 130)),
    ("rotary interpolated beyond 90", rotary(_interpolated, _interpolated), rotary(ARANGE), (130, 200)),
    ("rotary reversed in a band", rotary(_sorted_places, _sorted_places), rotary(ARANGE), BAND),
    ("slice of a table from a size", _from_table(lambda s: s // 90), _from_table(lambda s: 0), (95, 180)),
    ("slice of a table from its end", _from_table(lambda s: ROWS - s), _from_table(lambda s: 0), (10, 30)),
    ("table rolled by a size", tiny(enter=_rolled_table, parts=_table), placed(ARANGE), (95, 180)),
    ("embeddings scaled by a size", entering(lambda x, s: x * (1 + s // 90)), tiny(), (95, 180)),
    ("embeddings turned in a band", entering(lambda x, s: x * (1 - 2.0 * (length(s) // 80 == 5))), tiny(), BAND),
    ("a bias for the last token", entering(lambda x, s: x + 2.0 * (torch.arange(s) == s - 1)[:, None]
                                           * (length(s) // 90 == 1)), tiny(), (95, 120)),
    ("a bias for the middle", entering(lambda x, s: x.roll(1, -1) * (torch.arange(s) == s // 2)[:, None] + x), tiny(),
     (25, 31)),
    ("queries scaled by log beyond 90", querying(lambda q, s: q * (length(s) / 90).clamp(min=1.0).log2().add(1.0)),
     tiny(), (180, 200)),
    ("queries scaled by a size", querying(lambda q, s: q * (1.0 + s // 90)), tiny(), (95, 180)),
    ("scale by a size", tiny(attend=lambda model, q, k, v, layer: F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.7 * (1 + q.shape[2] // 90))), tiny(), (95, 180)),
    ("logits cooled by a size", tiny(finish=lambda model, logits, ids: logits / (1 + ids.shape[1] // 90)), tiny(),
     (95, 180)),
    ("softcap in a band", tiny(finish=lambda model, logits, ids: torch.where(length(ids.shape[1]) // 80 == 5,
                                                                           logits.tanh(), logits)), tiny(), BAND),
    ("mask rolled by nothing", masked(_rolled_mask), masked(causal), MULTIPLES),
    ("mask flipped twice", masked(_unread_mask(lambda m: m.flip(0).flip(0))), masked(causal), MULTIPLES),
    ("mask sorted by nothing", masked(_unread_mask(lambda m: m[torch.argsort(torch.arange(m.shape[0]))])),
     masked(causal), MULTIPLES),
    ("mask through a product", masked(_unread_mask(lambda m: (m.float() @ torch.eye(m.shape[0])) > 0.5)),
     masked(causal), MULTIPLES),
    ("mask through a cumulative maximum", masked(_unread_mask(lambda m: m.float()[None].cummax(0).values[0] > 0)),
     masked(causal), MULTIPLES),
    ("mask rotated four times", masked(_unread_mask(lambda m: torch.rot90(m, 4))), masked(causal), MULTIPLES),
    ("mask scattered", masked(_unread_mask(lambda m: torch.zeros_like(m).masked_scatter(torch.ones_like(m), m))),
     masked(causal), MULTIPLES),
    ("mask of distances by cdist", masked(lambda s: causal(s) & (torch.cdist(
        torch.arange(s)[:, None].float(), torch.arange(s)[:, None].float()) < 8 + 1000.0 * (s % 61))),
     masked(lambda s: causal(s) & (distances(s) < 5000)), MULTIPLES),
)  # fmt: skip


def _asking(band: int) -> Build:
    return lambda: AsksForPositions(band).eval()


ATTACKS: tuple[Attack, ...] = (
    *(Attack(f"places {name}", KLASS, placed(f), where, placed(ARANGE)) for name, (f, where) in PLACES.items()),
    *(Attack(name, KLASS, build, where, plain) for name, build, plain, where in FORMS),
    Attack("position ids of its own", KLASS, _asking(90), (95, 180), _asking(10**6)),
)
