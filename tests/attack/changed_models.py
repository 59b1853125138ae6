"""Tiny decoders whose parameters and buffers the sweep changes while an engine serves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.changing import CASES, DIM, HEADS, VOCAB, WIDTH, Case, Changing, Turned, equal_heads, hiding

LIMIT = 64


class Grouped(Changing):
    """Four heads of queries, two of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(DIM, 2 * DIM, bias=False), nn.Linear(2 * DIM, DIM, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(2 * q, k, v, is_causal=True, enable_gqa=True)

    def heads(self, projection: nn.Module, h: Tensor) -> Tensor:
        return projection(h).unflatten(-1, (-1, WIDTH)).transpose(1, 2)


class Held(Changing):
    """Attends by a tensor that it holds.

    Args:
        part: the tensor; a parameter where `learned`.
        bias: its bias of a length.
    """

    def __init__(self, part: Tensor, bias: Callable[[Tensor, int], Tensor], learned: bool = False) -> None:
        super().__init__()
        self.bias = bias
        if learned:
            self.part = nn.Parameter(part.clone())
        else:
            self.register_buffer("part", part.clone())

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(self.part, q.shape[2]))


class Scaled(Changing):
    """The scale of the scores is a parameter; read as a number where `number`."""

    def __init__(self, number: bool) -> None:
        super().__init__()
        self.number, self.scale = number, nn.Parameter(torch.tensor(0.5))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.number:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=float(self.scale.detach()))
        return hiding(q @ k.mT * self.scale, q.shape[2]).softmax(-1) @ v


class Placed(Changing):
    """Learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(LIMIT, DIM)

    def enter(self, ids: Tensor) -> Tensor:
        return self.embed(ids) + self.places(torch.arange(ids.shape[1]))


class Tied(Changing):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


class Latent(Changing):
    """Keys and values from a narrow latent, and an MLP wide enough for a sample of its weights to miss an entry."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(DIM, 8, bias=False)
        self.k, self.v = nn.Linear(8, DIM, bias=False), nn.Linear(8, DIM, bias=False)
        self.up, self.back = nn.Linear(DIM, 160), nn.Linear(160, DIM)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        h = self.norm(x)
        c = self.down(h)
        out = self.attend(self.heads(self.q, h), self.heads(self.k, c), self.heads(self.v, c))
        x = x + self.o(out.transpose(1, 2).flatten(-2))
        return self.leave(x + self.back(F.gelu(self.up(x))))


def _distance(s: int) -> Tensor:
    return torch.arange(s)[:, None] - torch.arange(s)


def _slopes(part: Tensor, s: int) -> Tensor:
    return hiding(-part[:, None, None] * _distance(s), s)


def _window(part: Tensor, s: int) -> Tensor:
    return (_distance(s) >= 0) & (_distance(s) < part)


def _zero_head(model: Any) -> None:
    model.k.weight[WIDTH:] = 0
    model.v.weight[WIDTH:] = 0


def _held(*given: Any) -> Callable[[], Changing]:
    return lambda: Held(*given)


def _none(model: Any) -> None:
    pass


def _case(make: Callable[[], Changing], setting: Callable[[Any], object] = _none, **config: Any) -> Case:
    return Case(make, _none, "", (), setting, config)


_TRIANGLE = torch.ones(LIMIT, LIMIT, dtype=torch.bool).tril()
FAMILIES: dict[str, Case] = {
    **{name: CASES[name] for name in ("mask", "mask of a buffer", "folded", "softcap", "buffers", "layers", "positions",
                                      "last row", "one-hot")},
    "plain": _case(Changing),
    "groups": _case(Grouped),
    "groups, equal heads": _case(Grouped, equal_heads),
    "a head of zeros": _case(Changing, _zero_head),
    "slopes": _case(_held(torch.tensor([0.5, 0.1]), _slopes)),
    "slopes, a parameter": _case(_held(torch.tensor([0.5, 0.1]), _slopes, True)),
    "causal buffer": _case(_held(_TRIANGLE, lambda part, s: part[:s, :s])),
    "window buffer": _case(_held(torch.tensor(9), _window)),
    "a scale": _case(lambda: Scaled(False)),
    "a scale read as a number": _case(lambda: Scaled(True)),
    "learned positions": _case(Placed),
    "tied": _case(Tied),
    "latent": _case(Latent),
    "int8": _case(Turned, dtype="int8"),
    "int4, rotated": _case(Changing, dtype="int4"),
    "k4v2, rotated": _case(Grouped, dtype="k4v2"),
}  # fmt: skip
assert HEADS * WIDTH == DIM and VOCAB < LIMIT
