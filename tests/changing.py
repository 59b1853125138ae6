"""Decoders that have a value read of them at compile time, and a change of it: one for each feed of the ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvpass

VOCAB, DIM, HEADS, WIDTH = 23, 32, 2, 16
PROMPT = [3, 7, 1, 4, 9, 2, 8, 5, 11, 6, 13, 10, 17, 12, 19, 14, 20, 15, 1, 2]
Change = Callable[[Any], object]


class Changing(nn.Module):
    """One attention layer; subclasses change how it looks and what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB, bias=False)
        self.norm = nn.LayerNorm(DIM)
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))

    def heads(self, projection: nn.Module, h: Tensor) -> Tensor:
        return projection(h).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(2 * q, k, v, is_causal=True)

    def enter(self, ids: Tensor) -> Tensor:
        return self.embed(ids)

    def leave(self, x: Tensor) -> Tensor:
        return self.head(x)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.enter(input_ids)
        h = self.norm(x)
        out = self.attend(*(self.heads(p, h) for p in (self.q, self.k, self.v)))
        return self.leave(x + self.o(out.transpose(1, 2).flatten(-2)))


def hiding(bias: Tensor, s: int) -> Tensor:
    return bias.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), -torch.inf)


class Biased(Changing):
    """A table of biases by distance, and its mask."""

    def __init__(self, parameter: bool = True) -> None:
        super().__init__()
        table = -0.2 * torch.arange(12.0)[:, None] * torch.tensor([1.0, 2.0])
        if parameter:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q.shape[2]
        d = (torch.arange(s)[:, None] - torch.arange(s)).clamp(0, 11)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=hiding(self.table[d].permute(2, 0, 1), s))


class Turned(Changing):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 30.0 ** -(torch.arange(WIDTH // 2) / (WIDTH // 2)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angle = torch.arange(q.shape[2])[:, None] * (1 / (1 / self.inv_freq))
        angle = torch.cat((angle, angle), -1)

        def turn(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return x * angle.cos() + torch.cat((-b, a), -1) * angle.sin()

        return super().attend(turn(q), turn(k), v)


class Capped(Changing):
    def __init__(self) -> None:
        super().__init__()
        self.cap = nn.Parameter(torch.tensor(5.0))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.cap * torch.tanh(q @ k.mT / self.cap)
        return hiding(scores, q.shape[2]).softmax(-1) @ v


class Picked(Changing):
    """Heads are picked by a product with a matrix of zeros and ones."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pick", torch.eye(DIM)[torch.arange(DIM) // WIDTH * 0 + torch.arange(DIM) % WIDTH])

    def heads(self, projection: nn.Module, h: Tensor) -> Tensor:
        return (projection(h) @ self.pick.T).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)


class Ordered(Changing):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([0, 0]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, k[:, self.order], v)


class TwoGains(Changing):
    """Two buffers with the same entries."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("first", "second"):
            self.register_buffer(name, torch.linspace(0.5, 1.5, DIM))

    def enter(self, ids: Tensor) -> Tensor:
        return self.embed(ids) * self.first

    def leave(self, x: Tensor) -> Tensor:
        return self.head(x * self.second)


class TwoLayers(Changing):
    """Two attentions over the same rows, with weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.k2, self.v2, self.q2 = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        h = self.norm(x)
        one = self.attend(*(self.heads(p, h) for p in (self.q, self.k, self.v)))
        two = self.attend(*(self.heads(p, h) for p in (self.q2, self.k2, self.v2)))
        return self.head(x + self.o((one - 0.5 * two).transpose(1, 2).flatten(-2)))


class Tabled(Changing):
    """Positions that are counted in a way that no rule follows: they are tabulated."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.tensor([0.3]))

    def enter(self, ids: Tensor) -> Tensor:
        places = (torch.ones(ids.shape[1]) * self.step).cumsum(0)
        return self.embed(ids) + places[:, None].sin()


class LastRow(Changing):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.tensor([-1]))

    def leave(self, x: Tensor) -> Tensor:
        return self.head(x[:, self.last])


class Kept(Changing):
    """A tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [torch.linspace(0.5, 1.5, DIM)]

    def enter(self, ids: Tensor) -> Tensor:
        return self.embed(ids) * self.kept[0]


@dataclass(frozen=True)
class Case:
    """A decoder and a change of it.

    Attributes:
        make: makes the decoder, weights not drawn yet.
        change: changes what was read, in place.
        named: the path that the error names.
        feeds: beginnings of what the ledger says that it decided; none where the ledger is not what sees it.
        setting: prepares weights before the model is compiled.
        config: of the cache.
    """

    make: Callable[[], Changing]
    change: Change
    named: str
    feeds: tuple[str, ...]
    setting: Change = lambda model: None
    config: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def build(self) -> Changing:
        torch.manual_seed(1)
        model = self.make().eval()
        for name, p in model.named_parameters():
            if p.dim() > 1 and name != "table":
                p.copy_(torch.randn(p.shape) * (1.0 if "embed" in name else 0.25))
        self.setting(model)
        return model

    def compile(self, model: nn.Module) -> kvpass.Engine:
        options = {"block_size": 8, "num_blocks": 32, **self.config}
        return kvpass.compile(model, kvpass.CacheConfig(**options), verify=False)


def equal_heads(model: Any) -> None:
    for projection in (model.k, model.v):
        projection.weight[WIDTH:] = projection.weight[:WIDTH]


def equal_layers(model: Any) -> None:
    model.k2.weight.copy_(model.k.weight)
    model.v2.weight.copy_(model.v.weight)


CASES = {
    "mask": Case(Biased, lambda m: m.table.data.neg_(), "table", ("the mask",)),
    "mask of a buffer": Case(lambda: Biased(False), lambda m: m.table.mul_(5), "table", ("the mask",)),
    "folded": Case(Turned, lambda m: m.inv_freq.mul_(3), "inv_freq", ("a constant that was folded",)),
    "softcap": Case(Capped, lambda m: m.cap.fill_(0.3), "cap", ("a factor of the scores",)),
    "one-hot": Case(Picked, lambda m: m.pick.add_(0.1), "pick", ("a product that only picks",)),
    "order": Case(Ordered, lambda m: m.order.copy_(torch.tensor([0, 1])), "order", ("the order of",)),
    "buffers": Case(TwoGains, lambda m: m.second.neg_(), "second", ("buffers that are held once",)),
    "heads": Case(Changing, lambda m: m.k.weight.data[WIDTH:].neg_(), "k.weight", ("heads that",), equal_heads),
    "layers": Case(TwoLayers, lambda m: m.k2.weight.data.neg_(), "k2.weight", ("keys and values that",), equal_layers),
    "positions": Case(Tabled, lambda m: m.step.mul_(4), "step", ("the positions",)),
    "rotations": Case(
        Changing, lambda m: m.v.weight.data.neg_(), "v.weight", ("a rotated copy",), config={"dtype": "int4"}
    ),
    "last row": Case(LastRow, lambda m: m.last.fill_(0), "last", ("which token's logits",)),
    "kept": Case(Kept, lambda m: m.kept[0].mul_(-1), "kept[0]", ()),
}  # fmt: skip


@torch.no_grad()
def naive(model: nn.Module, prompt: list[int], count: int) -> tuple[list[int], Tensor]:
    """Greedy tokens of the loop without a cache, and log-probabilities `[count, V]`."""
    tokens, rows = list(prompt), []
    for _ in range(count):
        rows.append(model(torch.tensor([tokens]))[0, -1].log_softmax(-1))
        tokens.append(int(rows[-1].argmax()))
    return tokens[len(prompt) :], torch.stack(rows)


def differs(engine: kvpass.Engine, model: nn.Module, prompt: list[int] = PROMPT, count: int = 3) -> float:
    """How far an engine's probabilities of its own tokens are from those of the model, at most."""
    handle = engine.submit(prompt, count, kvpass.Sampling(logprobs=VOCAB, ignore_eos=True))
    tokens, worst = list(prompt), 0.0
    for step, token in enumerate(handle.result()):
        with torch.no_grad():
            wanted = model(torch.tensor([tokens]))[0, -1].log_softmax(-1)
        top = dict(handle.logprobs[step].top)
        worst = max(worst, *(abs(top[i] - float(wanted[i])) for i in range(VOCAB)))
        tokens.append(token)
    return worst
