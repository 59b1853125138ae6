"""Weights and buffers that are changed after the model was compiled: what was read at compile time is stale then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.adversarial.parts import DIM, HEAD_DIM, HEADS, VOCAB, Attack, Build, Tiny, causal, distances, redrawn, tiny
from tests.adversarial.positions import turn

KLASS = "changed weights"
LENGTHS = (9, 30)
Change = Callable[[Any], object]


def quietly(change: Change) -> Change:
    """Under no_grad, as everybody changes weights."""

    def changed(model: Any) -> None:
        with torch.no_grad():
            change(model)

    return changed


class Latent(nn.Module):
    """Keys and values from a narrow latent, whose matrices a pass may multiply into others, and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCAB, DIM), nn.LayerNorm(DIM)
        self.q, self.down = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, 4, bias=False)
        self.k, self.v = nn.Linear(4, DIM, bias=False), nn.Linear(4, DIM, bias=False)
        self.o = nn.Linear(DIM, DIM, bias=False)
        self.gate, self.up, self.head = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        h = self.norm(x)
        c = self.down(h)
        q, k, v = (t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for t in (self.q(h), self.k(c), self.v(c)))
        x = x + self.o(F.scaled_dot_product_attention(2 * q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return self.head(x + F.silu(self.gate(x)) * self.up(x))


class Separate(nn.Module):
    """A decoder with a projection for each of queries, keys, values; grouped heads where there are fewer for keys.

    Args:
        setting: changes the weights before they are compiled.
        options: names of the parts that take part.
    """

    def __init__(self, kv_heads: int = HEADS, tied: bool = False, layers: int = 1) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.embed = nn.Embedding(VOCAB, DIM)
        self.q, self.o = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.k, self.v = (nn.Linear(DIM, kv_heads * HEAD_DIM, bias=False) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(2 * q, k, v, is_causal=True, enable_gqa=self.kv_heads != HEADS)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        h = self.norm(x)
        q, k, v = (p(h).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.head(x + self.o(self.attend(q, k, v).transpose(1, 2).flatten(-2)))


def separate(setting: Change = lambda model: None, make: Callable[[], nn.Module] = Separate) -> Build:
    """A builder of :class:`Separate`, its weights set so that a pass finds something to use."""

    def build() -> nn.Module:
        model = redrawn(make())
        quietly(setting)(model)
        return model

    return build


def other(model: nn.Module, *names: str, seed: int = 5) -> dict[str, Tensor]:
    """Other weights of the same shapes, of the parameters with these names or all."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: p + 0.5 * torch.randn(p.shape, generator=generator)
        for name, p in model.named_parameters()
        if not names or name in names
    }


def _equal_heads(model: Separate) -> None:
    for projection in (model.k, model.v):
        projection.weight[HEAD_DIM:] = projection.weight[:HEAD_DIM]


def _keys_are_values(model: Separate) -> None:
    model.v.weight.copy_(model.k.weight)


def _zero_head(model: Separate) -> None:
    model.k.weight[HEAD_DIM:] = 0
    model.v.weight[HEAD_DIM:] = 0


def _zero_rows(model: Separate) -> None:
    """Half of the channels of each key are 0, and so need not be stored."""
    model.k.weight.view(HEADS, HEAD_DIM, DIM)[:, 4:] = 0


def _linear_step(model: nn.Module) -> None:
    """One step of an optimizer."""
    with torch.enable_grad():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        ids = torch.arange(1, 21)[None]
        F.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).backward()
        optimizer.step()


def _via_numpy(model: Separate) -> None:
    model.v.weight.detach().numpy()[:] *= -1.5


def _via_storage(model: Separate) -> None:
    torch.frombuffer(memoryview(model.k.weight.detach().numpy()).cast("B"), dtype=torch.float32).mul_(-0.7)


def _set(path: str, value: Callable[[Any], Any]) -> Change:
    """`setattr` of the object at `path`, to a function of what stands there."""

    def change(model: Any) -> None:
        *owners, leaf = path.split(".")
        for owner in owners:
            model = getattr(model, owner)
        setattr(model, leaf, value(getattr(model, leaf)))

    return change


def _flat(model: nn.Module) -> None:
    flat = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(flat * 1.2, model.parameters())


def _add_weight_norm(model: Separate) -> None:
    nn.utils.parametrizations.weight_norm(model.v).parametrizations.weight.original0.mul_(-2)


CHANGES: dict[str, Change] = {
    "load_state_dict": lambda m: m.load_state_dict({**m.state_dict(), **other(m)}),
    "load_state_dict, assigned": lambda m: m.load_state_dict({**m.state_dict(), **other(m)}, assign=True),
    "copy_": lambda m: m.k.weight.copy_(other(m)["k.weight"]),
    "data.copy_": lambda m: m.v.weight.data.copy_(other(m)["v.weight"]),
    "data set": _set("v.weight.data", lambda data: data * -1.5),
    "set_": lambda m: m.v.weight.set_((m.v.weight * -1.5).clone()),
    "mul_": lambda m: m.o.weight.mul_(-1.5),
    "all mul_ by 1.1": lambda m: [p.data.mul_(1.1) for p in m.parameters()],
    "embedding add_": lambda m: m.embed.weight.data.add_(torch.linspace(-1, 1, DIM)),
    "a row of the embedding": lambda m: m.embed.weight[1:12].neg_(),
    "setattr of a Parameter": _set("v.weight", lambda p: nn.Parameter(-p)),
    "setattr of a module": _set("v", lambda old: redrawn(nn.Linear(DIM, DIM, bias=False), 9)),
    "head replaced": _set("head", lambda old: redrawn(nn.Linear(DIM, VOCAB, bias=False), 9)),
    "norm replaced": _set("norm", lambda old: nn.Identity()),
    "embedding replaced": _set("embed", lambda old: redrawn(nn.Embedding(VOCAB, DIM), 9)),
    "a step of SGD": _linear_step,
    "through numpy": _via_numpy,
    "through a view of bytes": _via_storage,
    "vector_to_parameters": _flat,
    "norm weight data": lambda m: m.norm.weight.data.mul_(1.7),
    "pruned": lambda m: m.v.weight.mul_((torch.arange(DIM) % 2).float()),
    "index_put": lambda m: m.v.weight.__setitem__((slice(None), torch.tensor([1, 3, 5, 7, 9])), 1.0),
    "weights in double": lambda m: m.to(torch.float64).v.weight.mul_(-1.5),
    "weight_norm added": _add_weight_norm,
}  # fmt: skip
SETTINGS: dict[str, tuple[Build, Change]] = {
    "equal heads part": (separate(_equal_heads), lambda m: m.load_state_dict({**m.state_dict(), **other(m)})),
    "equal heads part by data": (separate(_equal_heads), lambda m: m.k.weight.data[HEAD_DIM:].neg_()),
    "equal value heads part": (separate(_equal_heads), lambda m: m.v.weight.data[HEAD_DIM:].neg_()),
    "equal heads replaced": (separate(_equal_heads), _set("v.weight", lambda p: nn.Parameter(p.flip(0)))),
    "values part from keys": (separate(_keys_are_values), lambda m: m.v.weight.copy_(other(m)["v.weight"])),
    "head of zeros awakes": (separate(_zero_head), lambda m: m.load_state_dict({**m.state_dict(), **other(m)})),
    "channels of zeros awake": (separate(_zero_rows), lambda m: m.k.weight.add_(0.6)),
    "one key head, loaded": (
        separate(make=lambda: Separate(kv_heads=1)),
        lambda m: m.load_state_dict({**m.state_dict(), **other(m)}),
    ),
    "latent's keys": (separate(make=Latent), lambda m: m.k.weight.neg_()),
    "latent's values": (separate(make=Latent), lambda m: m.v.weight.data.neg_()),
    "latent's down": (separate(make=Latent), lambda m: m.down.weight.copy_(other(m)["down.weight"])),
    "latent's queries": (separate(make=Latent), lambda m: m.q.weight.neg_()),
    "latent's output, replaced": (separate(make=Latent), _set("o.weight", lambda p: nn.Parameter(-p))),
    "gate of an MLP": (separate(make=Latent), lambda m: m.gate.weight.neg_()),
    "bias of an MLP": (separate(make=Latent), lambda m: m.up.bias.data.add_(1.0)),
    "latent of zeros": (separate(lambda m: m.down.weight[2:].zero_(), Latent), lambda m: m.down.weight[2:].add_(0.5)),
    "tied weights scaled": (separate(make=lambda: Separate(tied=True)), lambda m: m.embed.weight.mul_(-1.2)),
    "tied weights part": (
        separate(make=lambda: Separate(tied=True)),
        _set("head.weight", lambda p: nn.Parameter(p.flip(0).clone())),
    ),
}


def _bias_of(kind: str) -> Callable[..., Tensor]:
    def attend(m: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        s = q.shape[2]
        d = distances(s)
        if kind == "mask":
            return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=m.part[:s, :s])
        if kind == "window":
            return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=(d >= 0) & (d < m.part))
        if kind == "chunk":
            i = torch.arange(s)
            seen = (d >= 0) & (i[:, None] // m.part == i[None, :] // m.part)
            return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=seen)
        if kind in ("table", "wide table"):
            bias = m.part[d.clamp(0, m.part.shape[0] - 1)].movedim(-1, 0)
        elif kind == "pairs":
            bias = m.part[:s, :s]
        elif kind == "slopes":
            bias = -m.part[:, None, None] * d
        elif kind == "faint":
            return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=m.part * (d < 0))
        else:
            raise ValueError(kind)
        return F.scaled_dot_product_attention(2 * q, k, v, attn_mask=torch.where(d >= 0, bias, -torch.inf))

    return attend


def _scores_of(kind: str) -> Callable[..., Tensor]:
    def attend(m: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        scores = q @ k.transpose(-2, -1)
        if kind == "scale":
            scores = scores * m.part
        elif kind == "scale by item":
            scores = scores * m.part.item()
        elif kind == "scale by float":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=float(m.part))
        elif kind == "scale of heads":
            scores = scores * m.part[:, None, None]
        elif kind == "softcap":
            scores = m.part * torch.tanh(scores / m.part)
        scores = scores.masked_fill(~causal(q.shape[2]), -torch.inf)
        if kind == "sink":
            sink = m.part[:, None, None].expand(q.shape[0], -1, q.shape[2], 1)
            return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v
        if kind == "sink gate":
            kept = torch.sigmoid(scores.logsumexp(-1, keepdim=True) - m.part[:, None, None])
            return scores.softmax(-1) @ v * kept
        if kind == "difference":
            return scores.softmax(-1) @ v - m.part * ((scores * 0.5).softmax(-1) @ v)
        if kind == "copies by ones":
            spread = torch.einsum("bhsd,gh->bgsd", v, m.part)
            return scores.softmax(-1) @ spread
        if kind == "gate":
            return scores.softmax(-1) @ v * m.part
        if kind == "mixed values":
            return scores.softmax(-1) @ (v + m.part * k)
        if kind == "order of heads":
            return scores.softmax(-1) @ v[:, m.part]
        return scores.softmax(-1) @ v

    return attend


def _turned(m: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    places = torch.arange(q.shape[2]) + m.offset
    q, k = turn(q, torch.arange(q.shape[2]), m.base), turn(k, places, m.base)
    return F.scaled_dot_product_attention(2 * q, k, v, is_causal=True)


def _placed(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    return x + m.part[torch.arange(ids.shape[1]) + m.offset]


def holding(attend: Callable[..., Tensor], part: Callable[[], Any]) -> Build:
    """A decoder whose attention reads `model.part`, with the value that `part()` gives."""

    def build() -> nn.Module:
        model = redrawn(Tiny(attend=attend, parts=lambda: {"part": part()}))
        with torch.no_grad():
            model.part.copy_(part())
        return model.eval()

    return build


def _param(value: Any) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.as_tensor(value, dtype=torch.float32).clone())


def _buffer(value: Any) -> Callable[[], Tensor]:
    return lambda: torch.as_tensor(value).clone()


TRIANGLE = torch.ones(64, 64, dtype=torch.bool).tril()
FADING = -0.3 * torch.arange(12.0)[:, None] * torch.tensor([1.0, 2.0])
HELD: dict[str, tuple[Build, Change]] = {
    "causal buffer becomes windowed": (holding(_bias_of("mask"), _buffer(TRIANGLE)),
                                       lambda m: m.part.logical_and_(TRIANGLE.triu(-3))),
    "causal buffer shows the next": (holding(_bias_of("mask"), _buffer(TRIANGLE.float().log())),
                                     lambda m: m.part.data.sub_(2.0 * torch.arange(64) * (torch.arange(64) < 9))),
    "causal buffer replaced": (holding(_bias_of("mask"), _buffer(TRIANGLE)), _set("part", lambda b: b.triu(-3))),
    "window buffer shrinks": (holding(_bias_of("window"), _buffer(20)), lambda m: m.part.fill_(4)),
    "window buffer grows": (holding(_bias_of("window"), _buffer(4)), lambda m: m.part.fill_(20)),
    "windows of heads": (holding(_bias_of("window"), _buffer([[[4]], [[5]]])), lambda m: m.part.mul_(5)),
    "chunk buffer": (holding(_bias_of("chunk"), _buffer(4)), lambda m: m.part.fill_(12)),
    "bias table, a parameter": (holding(_bias_of("table"), _param(FADING)), lambda m: m.part.data.neg_()),
    "bias table, a buffer": (holding(_bias_of("table"), _buffer(FADING)), lambda m: m.part.copy_(FADING.flip(0))),
    "bias table through numpy": (holding(_bias_of("table"), _buffer(FADING)), lambda m: m.part.numpy().fill(0)),
    "bias table of zeros": (holding(_bias_of("table"), _param(0 * FADING)), lambda m: m.part.add_(FADING)),
    "bias of pairs": (holding(_bias_of("pairs"), _param(torch.zeros(64, 64))), lambda m: m.part[:, :4].sub_(3)),
    "slopes, a buffer": (holding(_bias_of("slopes"), _buffer([0.5, 0.1])), lambda m: m.part.zero_()),
    "slopes, a parameter": (holding(_bias_of("slopes"), _param([0.5, 0.1])), lambda m: m.part.data.neg_()),
    "slopes of zero": (holding(_bias_of("slopes"), _param([0.0, 0.0])), lambda m: m.part.add_(0.5)),
    "fill of the future": (holding(_bias_of("faint"), _buffer(-1e9)), lambda m: m.part.copy_(torch.tensor(torch.nan))),
    "scale, a parameter": (holding(_scores_of("scale"), _param(0.5)), lambda m: m.part.mul_(4)),
    "scale, a buffer": (holding(_scores_of("scale"), _buffer(0.5)), lambda m: m.part.fill_(2.0)),
    "scale by item": (holding(_scores_of("scale by item"), _buffer(0.5)), lambda m: m.part.fill_(2.0)),
    "scale by float": (holding(_scores_of("scale by float"), _buffer(0.5)), lambda m: m.part.fill_(2.0)),
    "scale of heads": (holding(_scores_of("scale of heads"), _param([0.5, 0.5])), lambda m: m.part[1].mul_(5)),
    "softcap, a buffer": (holding(_scores_of("softcap"), _buffer(9.0)), lambda m: m.part.fill_(0.3)),
    "softcap, a parameter": (holding(_scores_of("softcap"), _param(9.0)), lambda m: m.part.data.fill_(0.3)),
    "sinks": (holding(_scores_of("sink"), _param([0.0, 1.0])), lambda m: m.part.add_(3.0)),
    "sinks of nothing": (holding(_scores_of("sink"), _param([-torch.inf] * 2)), lambda m: m.part.fill_(2.0)),
    "sinks as a gate": (holding(_scores_of("sink gate"), _param([0.0, 1.0])), lambda m: m.part.add_(3.0)),
    "difference of attentions": (holding(_scores_of("difference"), _param(0.0)), lambda m: m.part.fill_(0.8)),
    "heads copied by ones": (holding(_scores_of("copies by ones"), _buffer([[1.0, 0.0], [1.0, 0.0]])),
                             lambda m: m.part.copy_(torch.eye(2))),
    "gate of zeros": (holding(_scores_of("gate"), _param(0.0)), lambda m: m.part.fill_(1.0)),
    "gate of ones": (holding(_scores_of("gate"), _buffer(1.0)), lambda m: m.part.fill_(-1.0)),
    "values mixed by zero": (holding(_scores_of("mixed values"), _param(0.0)), lambda m: m.part.fill_(1.0)),
    "order of heads": (holding(_scores_of("order of heads"), _buffer([0, 1])), lambda m: m.part.copy_(m.part.flip(0))),
    "order of heads, one twice": (holding(_scores_of("order of heads"), _buffer([0, 0])),
                                  lambda m: m.part.copy_(torch.tensor([0, 1]))),
}  # fmt: skip
PLACED: dict[str, tuple[Build, Change]] = {
    "rotary frequencies": (tiny(attend=_turned, parts=lambda: {"base": torch.tensor(100.0), "offset": torch.tensor(0)}),
                           lambda m: m.base.fill_(3.0)),
    "rotary offset": (tiny(attend=_turned, parts=lambda: {"base": torch.tensor(100.0), "offset": torch.tensor(0)}),
                      lambda m: m.offset.fill_(3)),
    "position table": (tiny(enter=_placed, parts=lambda: {"part": nn.Parameter(torch.zeros(64, DIM)), "offset": 0}),
                       lambda m: m.part.data.neg_()),
    "position offset": (tiny(enter=_placed, parts=lambda: {"part": nn.Parameter(torch.ones(64, DIM)),
                                                           "offset": torch.tensor(0)}), lambda m: m.offset.fill_(5)),
    "table by buffer of places": (
        tiny(enter=lambda m, x, ids: x + m.table[m.places[: ids.shape[1]]],
             parts=lambda: {"table": nn.Parameter(torch.ones(64, DIM)), "places": torch.arange(64)}),
        lambda m: m.places.copy_(torch.arange(64).flip(0))),
    "map of ids": (tiny(enter=lambda m, x, ids: x + m.table[m.map[ids]],
                        parts=lambda: {"table": nn.Parameter(torch.ones(VOCAB, DIM)), "map": torch.arange(VOCAB)}),
                   lambda m: m.map.copy_(m.map.flip(0))),
    "constant that is no buffer": (
        tiny(enter=lambda m, x, ids: x * m.kept[0], parts=lambda: {"kept": [torch.ones(DIM)]}),
        lambda m: m.kept[0].mul_(torch.linspace(-1, 2, DIM))),
    "batch norm statistics": (tiny(leave=lambda m, x, ids: m.norm(x.transpose(1, 2)).transpose(1, 2),
                                   parts=lambda: {"norm": nn.BatchNorm1d(DIM)}),
                              lambda m: m.norm.running_mean.copy_(torch.linspace(-2, 2, DIM))),
    "weight_norm gain": (tiny(leave=lambda m, x, ids: m.out(x), parts=lambda: {
        "out": nn.utils.parametrizations.weight_norm(nn.Linear(DIM, DIM))}),
        lambda m: m.out.parametrizations.weight.original0.mul_(-2.0)),
}  # fmt: skip

ATTACKS: tuple[Attack, ...] = (
    *(Attack(name, KLASS, separate(), LENGTHS, change=quietly(change)) for name, change in CHANGES.items()),
    *(
        Attack(name, KLASS, build, LENGTHS, change=quietly(change))
        for name, (build, change) in {**SETTINGS, **HELD, **PLACED}.items()
    ),
)
