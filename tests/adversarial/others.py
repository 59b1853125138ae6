"""The rest: shapes, dtypes, overflows, fills, padding by id, batches, pooling, chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.adversarial.parts import (
    DIM,
    HEAD_DIM,
    VOCAB,
    Attack,
    Build,
    Tiny,
    attend_causal,
    causal,
    distances,
    masked,
    ordinary,
    redrawn,
    sevens,
    tiny,
)
from tests.adversarial.positions import placed, turn

KLASS = "rest"
LENGTHS = (12, 30)
PLAIN = masked(causal)


def attending(change: Callable[..., Tensor], **options: Any) -> Build:
    """A decoder whose attention is `change(q, k, v)`."""
    return tiny(attend=lambda model, q, k, v, layer: change(q, k, v), **options)


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return 2 * q @ k.transpose(-2, -1) * HEAD_DIM**-0.5


def filled(fill: float, dtype: torch.dtype = torch.float32) -> Build:
    """Later keys get a finite number added."""

    def change(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        later = (~causal(q.shape[2])).to(dtype) * fill
        return (scores_of(q, k) + later).softmax(-1) @ v

    return attending(change, layers=2)


def multiplied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of later keys are multiplied by 0, not hidden."""
    return (scores_of(q, k) * causal(q.shape[2])).softmax(-1) @ v


def blind_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first five tokens see nothing: softmax over -inf alone, and zeros for its NaN."""
    seen = causal(q.shape[2]) & (torch.arange(q.shape[2]) > 4)[:, None]
    return scores_of(q, k).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0) @ v


def blind_by_minimum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with the smallest number, so that they see all, the later ones too."""
    seen = causal(q.shape[2]) & (torch.arange(q.shape[2]) > 4)[:, None]
    return scores_of(q, k).masked_fill(~seen, torch.finfo(torch.float32).min).softmax(-1) @ v


def strictly_earlier(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A token does not see itself, and the first sees nothing."""
    return scores_of(q, k).masked_fill(distances(q.shape[2]) < 1, -torch.inf).softmax(-1).nan_to_num(0.0) @ v


def padding(fill: Any, own: bool) -> Build:
    """Keys of one token id are hidden."""

    def enter(model: Any, x: Tensor, ids: Tensor) -> Tensor:
        model.hidden = (ids == 7)[:, None, None, :]
        return x

    def attend(model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        seen = causal(q.shape[2]) & ~model.hidden
        if own:
            seen = seen | (distances(q.shape[2]) == 0)
        return scores_of(q, k).masked_fill(~seen, fill).softmax(-1) @ v

    return tiny(enter=enter, attend=attend, layers=2)


def documents(model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    """A token sees its own document; a 7 begins one."""
    seen = causal(q.shape[2]) & (model.document[:, :, None] == model.document[:, None, :])[:, None]
    return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=seen)


def _number_documents(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    model.document = (ids == 7).cumsum(1)
    return x


def _ids_as_places(model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    seen = causal(q.shape[2]) & (model.ids[:, :, None] >= model.ids[:, None, :])[:, None]
    return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=seen | (distances(q.shape[2]) == 0))


def _keep_ids(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    model.ids = ids
    return x


def first_as_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(2 * (q + q[:, :, :1]), k, v, is_causal=True)


def first_as_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(2 * q, k + k[:, :, :1], v, is_causal=True)


def first_value_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.cat([causal(q.shape[2]), torch.ones(q.shape[2], 1, dtype=torch.bool)], 1)
    return F.scaled_dot_product_attention(
        2 * q, torch.cat([k, k[:, :, :1]], 2), torch.cat([v, v[:, :, :1]], 2), attn_mask=seen
    )


def only_newest_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last query for all."""
    return F.scaled_dot_product_attention(2 * q[:, :, -1:].expand_as(q), k, v, is_causal=True)


def prefix_of_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=causal(q.shape[2]) | (i < q.shape[2] // 8))


def upper_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Fewer keys than queries, causal from the upper left."""
    return F.scaled_dot_product_attention(2 * q, k[:, :, :25], v[:, :, :25], is_causal=True)


def squeezed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`squeeze` of whatever is 1: a batch, or a token."""
    return attend_causal(None, q, k, v, 0).squeeze().reshape(q.shape)


def squeezed_mean(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    """Over the last dim but one of what is left of `[B, S, D]`: the tokens where the batch is one, else ..."""
    left = x.squeeze()
    return x + (left.mean(0) if left.dim() == 2 else x.mean(1, keepdim=True))


def by_batch(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    return x * (1 + 1.0 / x.shape[0])


def over_batch(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    return x - 0.5 * x.mean(0, keepdim=True)


def row_of_batch(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    return x + torch.arange(x.shape[0])[:, None, None] - x.shape[0] + 1.5


def first_pooled(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    return x + x[:, :1]


def last_pooled(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    return x + x[:, -1:].roll(1, -1)


def _mean_below(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    """The mean of the first four tokens."""
    return x + x[:, :4].mean(1, keepdim=True)


def _wrapped_mask(dtype: torch.dtype, size: int) -> Callable[[Any], Tensor]:
    """Distances of a narrow type, which wrap."""

    def mask(s: Any) -> Tensor:
        i = torch.arange(s).to(dtype)
        d = i[:, None] - i[None, :]
        return ((d >= 0) & (d < size)) | (distances(s) == 0)

    return mask


def _counted_in(dtype: torch.dtype) -> Callable[[Any], Tensor]:
    return lambda s: torch.arange(s).to(dtype).long()


def _summed_in(dtype: torch.dtype) -> Callable[[Any], Tensor]:
    """Positions by a cumulative sum that rounds."""
    return lambda s: (torch.ones(s, dtype=dtype).cumsum(0) - 1).long()


def _mask_in(dtype: torch.dtype) -> Callable[[Any], Tensor]:
    """Causal by positions that are rounded: keys soon after a query look equal to it."""

    def mask(s: Any) -> Tensor:
        i = torch.arange(s).to(dtype)
        return i[:, None] >= i[None, :]

    return mask


def _sinusoid_in(dtype: torch.dtype) -> Build:
    def enter(model: Any, x: Tensor, ids: Tensor) -> Tensor:
        angles = torch.arange(ids.shape[1]).to(dtype)[:, None] * (2.0 ** -torch.arange(DIM // 2)).to(dtype)
        return x + torch.cat([angles.sin(), angles.cos()], -1).float()

    return tiny(enter=enter)


def _low(dtype: torch.dtype, attend: Callable[..., Tensor] = attend_causal) -> Build:
    return lambda: redrawn(Tiny(attend=attend)).to(dtype)


def _float_values(model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    scores = (2 * q @ k.transpose(-2, -1)).float().masked_fill(~causal(q.shape[2]), -torch.inf)
    return (scores.softmax(-1) @ v.float()).to(q.dtype)


def _double_keys(model: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    scores = (2 * q.double() @ k.double().transpose(-2, -1)).masked_fill(~causal(q.shape[2]), -torch.inf)
    return scores.softmax(-1).float() @ v


def _half_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = 2 * q @ k.bfloat16().float().transpose(-2, -1)
    return scores.masked_fill(~causal(q.shape[2]), -torch.inf).softmax(-1) @ v


def _complex_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores by complex numbers, of which the size is taken."""
    q, k = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k))
    scores = (q @ k.conj().transpose(-2, -1)).abs()
    return scores.masked_fill(~causal(q.shape[2]), -torch.inf).softmax(-1) @ v


def _complex_real(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k))
    scores = (q @ k.conj().transpose(-2, -1)).real * 0.7
    return scores.masked_fill(~causal(q.shape[2]), -torch.inf).softmax(-1) @ v


class Random(nn.Module):
    """Noise of its own, drawn from a seed by the length or a generator."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = redrawn(Tiny(leave=lambda model, x, ids: x + draw(x)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids)


def _seeded(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(x.shape)


def _constant_noise(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(DIM, generator=generator)


def _dropout(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    return F.dropout(x, 0.3)


def noisy(draw: Callable[[Tensor], Tensor]) -> Build:
    return lambda: Random(draw).eval()


def _eye() -> dict[str, Tensor]:
    return {"table": 2 * torch.eye(64)[:, :DIM]}


def attend_0(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend_causal(None, q, k, v, 0)


# Name: decoder, what it is mistaken for, and lengths.
CASES: dict[str, tuple[Build, Build, tuple[int, ...]]] = {
    "fill of -6": (filled(-6.0), tiny(attend=attend_causal, layers=2), LENGTHS),
    "scores times the mask": (attending(multiplied, layers=2), attending(attend_0, layers=2), LENGTHS),
    "rows that see nothing, zeroed": (attending(blind_rows, layers=2), attending(attend_0, layers=2), LENGTHS),
    "rows that see nothing, lowest": (attending(blind_by_minimum, layers=2), attending(attend_0, layers=2), LENGTHS),
    "own key hidden": (attending(strictly_earlier), attending(attend_0), LENGTHS),
    "first token's query for all": (attending(first_as_query), attending(attend_0), LENGTHS),
    "first token's key for all": (attending(first_as_key), attending(attend_0), LENGTHS),
    "first token twice": (attending(first_value_twice), attending(attend_0), LENGTHS),
    "last query for all": (attending(only_newest_query, layers=2), attending(attend_0, layers=2), LENGTHS),
    "prefix of an eighth of the length": (attending(prefix_of_length, layers=2), attending(attend_0, layers=2), (30,)),
    "fewer keys than queries": (attending(upper_left), attending(attend_0), (40, 60)),
    "mean behind a squeeze": (tiny(leave=squeezed_mean), tiny(), LENGTHS),
    "scaled by the batch": (tiny(leave=by_batch), tiny(), LENGTHS),
    "mean over the batch": (tiny(leave=over_batch), tiny(), LENGTHS),
    "row of the batch": (tiny(leave=row_of_batch), tiny(), LENGTHS),
    "first token pooled": (tiny(leave=first_pooled), tiny(), LENGTHS),
    "last token pooled": (tiny(leave=last_pooled, layers=1), tiny(), LENGTHS),
    "mean of four tokens": (tiny(leave=_mean_below), tiny(), LENGTHS),
    "mask wraps in int8": (masked(_wrapped_mask(torch.int8, 100), layers=2), masked(causal, layers=2), (200, 300)),
    "mask wraps in uint8": (masked(_wrapped_mask(torch.uint8, 200), layers=2), masked(causal, layers=2), (260, 300)),
    "causal in bfloat16": (masked(_mask_in(torch.bfloat16), layers=2), masked(causal, layers=2), (300, 520)),
    "causal in float16": (masked(_mask_in(torch.float16), layers=2), masked(causal, layers=2), (2300,)),
    "positions wrap in int8": (placed(lambda s: torch.arange(s).to(torch.int8).long() + 128), placed(
        lambda s: torch.arange(s) + 128), (140, 200)),
    "positions in bfloat16": (placed(_counted_in(torch.bfloat16)), placed(torch.arange), (260, 300)),
    "positions summed in bfloat16": (placed(_summed_in(torch.bfloat16)), placed(torch.arange), (300, 400)),
    "sinusoid in bfloat16": (_sinusoid_in(torch.bfloat16), _sinusoid_in(torch.float32), (260, 300)),
    "noise, seeded": (noisy(_seeded), tiny(), LENGTHS),
    "dropout that is always on": (tiny(leave=_dropout), tiny(), LENGTHS),
    "complex scores by size": (attending(_complex_scores), attending(attend_0), LENGTHS),
    "keys in double": (tiny(attend=_double_keys), tiny(attend=lambda m, q, k, v, layer: v), LENGTHS),
}  # fmt: skip
BY_TOKEN: dict[str, tuple[Build, Build]] = {
    "padding by id, own key seen": (padding(-torch.inf, True), tiny(attend=attend_causal, layers=2)),
    "padding by id, lowest": (padding(torch.finfo(torch.float32).min, False), tiny(attend=attend_causal, layers=2)),
    "documents by id": (tiny(enter=_number_documents, attend=documents), PLAIN),
    "ids as places": (tiny(enter=_keep_ids, attend=_ids_as_places), PLAIN),
    "places by cumsum of ids": (
        tiny(enter=lambda m, x, ids: x + m.table[(ids != 7).cumsum(1)], parts=_eye),
        tiny(enter=lambda m, x, ids: x + m.table[torch.arange(1, 1 + ids.shape[1])], parts=_eye),
    ),
    "count of an id": (tiny(leave=lambda m, x, ids: x * (1 + (ids == 7).sum(1)[:, None, None])), tiny()),
    "ids seen before": (tiny(leave=lambda m, x, ids: x * (ids[:, :, None] == ids[:, None]).sum(-1)[..., None]), tiny()),
    "an id sorted": (tiny(enter=lambda m, x, ids: m.embed(ids.sort(1).values)), tiny()),
    "ids shifted": (tiny(enter=lambda m, x, ids: x + m.embed(F.pad(ids[:, :-1], (1, 0)))), tiny()),
    "ids hashed with others": (tiny(enter=lambda m, x, ids: x + m.embed((ids + 3 * ids.roll(1, 1)) % VOCAB)), tiny()),
    "unique ids": (tiny(leave=lambda m, x, ids: x * (1 + ids.unique().numel() / 40)), tiny()),
}  # fmt: skip

ATTACKS: tuple[Attack, ...] = (
    *(Attack(name, KLASS, build, where, plain) for name, (build, plain, where) in CASES.items()),
    *(Attack(name, KLASS, build, LENGTHS, plain, sevens) for name, (build, plain) in BY_TOKEN.items()),
    Attack("bfloat16 weights, last token pooled", KLASS, lambda: tiny(leave=last_pooled)().to(torch.bfloat16), LENGTHS,
           _low(torch.bfloat16), tolerance=0.1),
)  # fmt: skip
LOW = {"float32 values under bfloat16 queries": _low(torch.bfloat16, _float_values),
       "bfloat16": _low(torch.bfloat16), "float16": _low(torch.float16)}  # fmt: skip
CONTROLS: tuple[Attack, ...] = (
    *(Attack(name, "control", build, LENGTHS, tolerance=0.05) for name, build in LOW.items()),
    Attack("keys rounded to bfloat16", "control", attending(_half_keys), LENGTHS),
    Attack("scores by complex numbers", "control", attending(_complex_real), LENGTHS),
    Attack("fill of -10000", "control", filled(-1e4), LENGTHS),
    Attack("fill of -1e9", "control", filled(-1e9), LENGTHS),
    Attack("squeezed heads", "control", attending(squeezed), LENGTHS),
    Attack("constant noise", "control", noisy(_constant_noise), LENGTHS),
    Attack("positions from 1", "control", placed(lambda s: torch.arange(1, s + 1)), (100,)),
    Attack("positions in float", "control", placed(lambda s: torch.arange(s, dtype=torch.float32).long()), (100,)),
    Attack("rotary on half of the channels", "control", tiny(attend=lambda m, q, k, v, layer: attend_causal(
        m, turn(q, torch.arange(q.shape[2])), turn(k, torch.arange(q.shape[2])), v, 0)), (100,)),
    Attack("a text without triggers", "control", padding(-torch.inf, True), LENGTHS, text=lambda n: [
        t if t != 7 else 8 for t in ordinary(n)]),
)  # fmt: skip
