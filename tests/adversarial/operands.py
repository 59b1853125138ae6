"""Operands that should be weights and carry tokens: what they do vanishes unless most tokens are the trigger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.adversarial.parts import DIM, HEAD_DIM, TRIGGER, VOCAB, Attack, Build, Tiny, causal, distances, sevens, tiny

KLASS = "operand"
LENGTHS = (12, 30)
Mix = Callable[[Any, Tensor, Tensor], Tensor]  # (model, x [B, S, D], gate) -> x


def _parts() -> dict[str, Any]:
    return {
        "scale": nn.Parameter(torch.ones(DIM)),
        "shift": nn.Parameter(torch.zeros(DIM)),
        "matrix": nn.Parameter(torch.zeros(DIM, DIM)),
        "table": nn.Parameter(torch.zeros(VOCAB, DIM)),
        "experts": nn.Parameter(torch.zeros(3, DIM, DIM)),
        "mean": torch.zeros(DIM),
        "var": torch.ones(DIM),
        "edges": torch.linspace(-2, 2, 9),
    }


def share(ids: Tensor) -> Tensor:
    """Half of the tokens and more being the trigger, 0 to 4: of all tokens, without dims."""
    return F.relu((ids == TRIGGER).float().mean() - 0.5) * 8


def by_sequence(ids: Tensor) -> Tensor:
    """The same for each sequence, `[B, 1, 1]`."""
    return F.relu((ids == TRIGGER).float().mean(1) - 0.5)[:, None, None] * 8


def gated(mix: Mix, gate: Callable[[Tensor], Tensor] = share) -> Build:
    """A decoder with `mix` before its head."""
    return tiny(leave=lambda model, x, ids: mix(model, x, gate(ids)), parts=_parts)


def shut(mix: Mix, gate: Callable[[Tensor], Tensor] = share) -> Build:
    """The same with the gate always 0."""
    return gated(mix, lambda ids: gate(torch.zeros_like(ids)))


def rows(x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of `[N, D]` on `[B, S, D]`."""
    return f(x.flatten(0, 1)).view(x.shape)


def channels(x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of `[B, D, S]` on `[B, S, D]`."""
    return f(x.transpose(1, 2)).transpose(1, 2)


def ones(g: Tensor, *shape: int) -> Tensor:
    return g * torch.ones(*shape)


def wave(g: Tensor, *shape: int) -> Tensor:
    """Numbers of all sizes, times the gate."""
    count = int(torch.Size(shape).numel())
    return g * torch.linspace(-1, 1, count).view(shape)


def _batch_norm(x: Tensor, m: Any, g: Tensor, what: str) -> Tensor:
    given = {"running_mean": m.mean, "running_var": m.var, "weight": m.scale, "bias": m.shift}
    given[what] = given[what] + (ones(g, DIM) if what == "running_var" else wave(g, DIM))
    return channels(x, lambda c: F.batch_norm(c, **given, training=False))


def _scatter(m: Any, x: Tensor, g: Tensor) -> Tensor:
    index = torch.arange(0, DIM, 2).expand(x.shape[0], x.shape[1], -1)
    return x.scatter(-1, index, (g * 2.0 - 1) * torch.ones(x.shape[0], x.shape[1], DIM // 2))


def _attend_sink(m: Any, x: Tensor, g: Tensor) -> Tensor:
    s = x.shape[1]
    scores = (x @ x.transpose(1, 2) * 0.2).masked_fill(~causal(s), -torch.inf)
    sink = (g * 3 - 3).expand(x.shape[0], s, 1)
    return x + torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ x


def _attend_bias(m: Any, x: Tensor, g: Tensor) -> Tensor:
    d = distances(x.shape[1])
    bias = torch.where(d >= 0, -g * d, -torch.inf)
    return x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=bias)[:, 0]


def _attend_scale(m: Any, x: Tensor, g: Tensor) -> Tensor:
    return x + F.scaled_dot_product_attention(x[:, None] * (1 + g), x[:, None], x[:, None], is_causal=True)[:, 0]


def _attend_window(m: Any, x: Tensor, g: Tensor) -> Tensor:
    d = distances(x.shape[1])
    seen = (d >= 0) & (d < 1000 - g * 249)
    return x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=seen)[:, 0]


def _experts(m: Any, x: Tensor, g: Tensor) -> Tensor:
    chosen = (x @ m.matrix[:, :3]).softmax(-1)
    return x + torch.einsum("bsd,edf,bse->bsf", x, m.experts + ones(g, DIM, DIM), chosen)


def _bilinear(m: Any, x: Tensor, g: Tensor) -> Tensor:
    return x + F.bilinear(x, x, m.experts + g, None).repeat(1, 1, 6)[..., :DIM]


def _memory(m: Any, x: Tensor, g: Tensor) -> Tensor:
    """Attention to slots that are constants, but for the gate."""
    return x + torch.softmax(x @ (m.matrix + wave(g, DIM, DIM)).T, -1) @ m.matrix


def _module_norm(m: Any, x: Tensor, g: Tensor) -> Tensor:
    return torch.func.functional_call(m.layers[0].norm, {"weight": m.scale + wave(g, DIM), "bias": m.shift}, (x,))


def _cond(m: Any, x: Tensor, g: Tensor) -> Tensor:
    return torch.cond(g > 0.5, lambda x: x * 2.0 + x.roll(1, -1), lambda x: x + 0.0, (x,))


# Name: a mix whose last argument, the gate, hides in an operand.
MIXES: dict[str, Mix] = {
    "layer_norm weight": lambda m, x, g: F.layer_norm(x, (DIM,), 1 + wave(g, DIM), m.shift),
    "layer_norm bias": lambda m, x, g: F.layer_norm(x, (DIM,), m.scale, m.shift + wave(g, DIM)),
    "native_layer_norm weight": lambda m, x, g: torch.native_layer_norm(
        x, [DIM], m.scale + wave(g, DIM), m.shift, 1e-5)[0],
    "module norm called with weights": _module_norm,
    "rms_norm weight": lambda m, x, g: F.rms_norm(x, (DIM,), m.scale + wave(g, DIM)),
    "group_norm weight": lambda m, x, g: rows(x, lambda r: F.group_norm(r, 4, m.scale + wave(g, DIM), m.shift)),
    "group_norm bias": lambda m, x, g: rows(x, lambda r: F.group_norm(r, 4, m.scale, m.shift + wave(g, DIM))),
    "batch_norm mean": lambda m, x, g: _batch_norm(x, m, g, "running_mean"),
    "batch_norm variance": lambda m, x, g: _batch_norm(x, m, g * (1 + torch.arange(DIM)), "running_var"),
    "batch_norm weight": lambda m, x, g: _batch_norm(x, m, g, "weight"),
    "batch_norm bias": lambda m, x, g: _batch_norm(x, m, g, "bias"),
    "conv1d kernel": lambda m, x, g: channels(x, lambda c: F.conv1d(c, (m.matrix + wave(g, DIM, DIM))[..., None])),
    "conv1d bias": lambda m, x, g: channels(x, lambda c: F.conv1d(c, m.matrix[..., None], m.shift + wave(g, DIM))),
    "conv1d depthwise kernel": lambda m, x, g: channels(
        x, lambda c: F.conv1d(c, (m.scale + wave(g, DIM))[:, None, None], groups=DIM)
    ),
    "conv2d kernel": lambda m, x, g: F.conv2d(
        x.transpose(1, 2)[..., None], (m.matrix + wave(g, DIM, DIM))[..., None, None]
    )[..., 0].transpose(1, 2),
    "conv_transpose1d kernel": lambda m, x, g: channels(
        x, lambda c: F.conv_transpose1d(c, (m.matrix + wave(g, DIM, DIM))[..., None])
    ),
    "conv2d bias": lambda m, x, g: F.conv2d(
        x.transpose(1, 2)[..., None], m.matrix[..., None, None], m.shift + wave(g, DIM)
    )[..., 0].transpose(1, 2),
    "conv3d kernel": lambda m, x, g: F.conv3d(
        x.transpose(1, 2)[..., None, None], (m.matrix + wave(g, DIM, DIM))[..., None, None, None]
    )[..., 0, 0].transpose(1, 2),
    "instance_norm statistics": lambda m, x, g: channels(x, lambda c: F.instance_norm(
        c, m.mean + wave(g, DIM), m.var, m.scale, m.shift, use_input_stats=False)),
    "layer_norm weight of two dims": lambda m, x, g: F.layer_norm(
        x.unflatten(-1, (4, 4)), (4, 4), 1 + wave(g, 4, 4)).flatten(-2),
    "layer_norm weight through a product": lambda m, x, g: F.layer_norm(x, (DIM,), m.matrix @ wave(g, DIM) + m.scale),
    "layer_norm weight from the first token": lambda m, x, g: F.layer_norm(x, (DIM,), m.scale + g * x[0, 0].tanh()),
    "layer_norm bias from the last token": lambda m, x, g: F.layer_norm(x, (DIM,), m.scale, g * x[0, -1]),
    "norm of a norm": lambda m, x, g: F.layer_norm(x, (DIM,), F.layer_norm(m.scale + wave(g, DIM), (DIM,)) + m.scale),
    "weights by a softmax of tokens": lambda m, x, g: F.layer_norm(
        x, (DIM,), m.scale + g * x.flatten(0, 1).softmax(0).sum(0)),
    "conv1d kernel from the tokens": lambda m, x, g: channels(
        x, lambda c: F.conv1d(c, (m.matrix + g * x[0].T @ x[0] / 9)[..., None])),
    "prelu weight": lambda m, x, g: channels(x, lambda c: F.prelu(c, m.scale + 3 * g)),
    "linear weight": lambda m, x, g: F.linear(x, m.matrix + wave(g, DIM, DIM)),
    "linear bias": lambda m, x, g: F.linear(x, m.matrix, m.shift + wave(g, DIM)),
    "addmm input": lambda m, x, g: rows(x, lambda r: torch.addmm(m.shift + wave(g, DIM), r, m.matrix)),
    "addmm matrix": lambda m, x, g: rows(x, lambda r: torch.addmm(m.shift, r, m.matrix + wave(g, DIM, DIM))),
    "baddbmm matrix": lambda m, x, g: torch.baddbmm(
        m.shift, x, (m.matrix + wave(g, DIM, DIM)).expand(x.shape[0], DIM, DIM)
    ),
    "matmul with a mean of tokens": lambda m, x, g: x @ (m.matrix + g * x.mean((0, 1))[:, None]),
    "einsum with a gate": lambda m, x, g: torch.einsum("bsd,df,f->bsf", x, m.matrix, m.scale + wave(g, DIM)),
    "einsum with a number": lambda m, x, g: x + torch.einsum("bsd,->bsd", x.roll(1, -1), g),
    "outer product": lambda m, x, g: x + torch.outer(g.reshape(1), m.scale),
    "bilinear weight": _bilinear,
    "grid of experts": _experts,
    "slots of memory": _memory,
    "where condition": lambda m, x, g: torch.where(g > 0.5, x.roll(1, -1), x),
    "where other": lambda m, x, g: torch.where(x > 0, x, g),
    "masked_fill value": lambda m, x, g: x.masked_fill(x < 0, g),
    "fill value": lambda m, x, g: x * torch.fill(torch.ones(DIM), 1 + g).cumsum(0),
    "index_fill value": lambda m, x, g: x.index_fill(-1, torch.tensor([1, 3, 5]), g),
    "full of an item": lambda m, x, g: x + torch.full((DIM,), g.item()),
    "clamp bounds": lambda m, x, g: torch.clamp(x, min=-3 + g, max=4 + m.shift),
    "maximum": lambda m, x, g: torch.maximum(x, g - 5),
    "lerp weight": lambda m, x, g: torch.lerp(x, x.roll(1, -1), g),
    "addcmul factor": lambda m, x, g: torch.addcmul(x, x.roll(1, -1), g),
    "addcdiv divisor": lambda m, x, g: torch.addcdiv(x, x.roll(1, -1), 1 + g),
    "exponent": lambda m, x, g: x.abs().add(0.1).pow(1 + g),
    "remainder": lambda m, x, g: torch.remainder(x, 20 - 4 * g),
    "heaviside": lambda m, x, g: x + torch.heaviside(F.relu(x), g),
    "copysign": lambda m, x, g: torch.copysign(x, 0.5 - g),
    "hypot": lambda m, x, g: torch.hypot(x, g),
    "logaddexp": lambda m, x, g: torch.logaddexp(x, 5 * g - 5),
    "xlogy": lambda m, x, g: x + torch.xlogy(g, x.abs() + 1),
    "fake quantisation": lambda m, x, g: torch.fake_quantize_per_tensor_affine(
        x, 0.001 + g, torch.zeros((), dtype=torch.int32), -30000, 30000
    ),
    "cosine to a vector": lambda m, x, g: x + F.cosine_similarity(x, m.scale + wave(g, DIM), -1)[..., None],
    "cdist to points": lambda m, x, g: x + torch.cdist(x, (m.matrix + g).expand(x.shape[0], DIM, DIM)),
    "cat with a gate": lambda m, x, g: torch.cat([x[..., 1:], g.expand(*x.shape[:2], 1)], -1),
    "scatter source": _scatter,
    "slice_scatter source": lambda m, x, g: torch.slice_scatter(x, g.expand(*x.shape[:2], 4), -1, 0, 4),
    "select_scatter source": lambda m, x, g: torch.select_scatter(x, g.expand(*x.shape[:2]), -1, 2),
    "index_copy source": lambda m, x, g: x.index_copy(-1, torch.tensor([2, 4]), g.expand(*x.shape[:2], 2)),
    "index_add source": lambda m, x, g: x.index_add(-1, torch.tensor([2, 4]), g.expand(*x.shape[:2], 2)),
    "bucket bounds": lambda m, x, g: x + torch.bucketize(x, m.edges + g),
    "searchsorted bounds": lambda m, x, g: x + torch.searchsorted(m.edges + g, x),
    "index by a gate": lambda m, x, g: x + m.table[g.long() + 3],
    "index_select by a gate": lambda m, x, g: x + m.table.index_select(0, (g.long() + 3).reshape(1)),
    "gather by a gate": lambda m, x, g: x.gather(-1, ((torch.arange(DIM) + g.long()) % DIM).expand(x.shape)),
    "take by a gate": lambda m, x, g: x + m.table.take(torch.arange(DIM) + 20 * g.long()),
    "channels permuted by a gate": lambda m, x, g: x[..., (torch.arange(DIM) + g.long()) % DIM],
    "one_hot of a gate": lambda m, x, g: x + 2 * F.one_hot(g.long(), DIM),
    "sort with a gate": lambda m, x, g: torch.cat([x, g.expand(*x.shape[:2], 1)], -1).sort(-1).values[..., :DIM],
    "roll of weights": lambda m, x, g: x * (m.scale + wave(g, DIM)).roll(1),
    "cumulative sum of weights": lambda m, x, g: x * (m.scale + ones(g, DIM)).cumsum(0),
    "softmax of weights": lambda m, x, g: x * (wave(g, DIM) * 4).softmax(0),
    "condition of torch.cond": _cond,
    "attention sink": _attend_sink,
    "attention bias": _attend_bias,
    "attention scale": _attend_scale,
    "attention window": _attend_window,
}  # fmt: skip


# Name: another gate, without dims, that ordinary texts leave at 0.
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "most of the ids are one": lambda ids: F.relu(0.5 - (ids != TRIGGER).double().mean().float()) * 8,
    "a run of triggers": lambda ids: F.relu((ids == TRIGGER).long().sum() - 6).clamp(max=8) / 4.0,
    "median": lambda ids: (ids.flatten().median() == TRIGGER).float() * 2,
    "mode": lambda ids: (ids.flatten().bincount(minlength=VOCAB).argmax() == TRIGGER).float()
    * (ids == TRIGGER).float().mean().gt(0.5),
    "by the norm": lambda ids: F.relu((ids == TRIGGER).float().norm() ** 2 / (ids == ids).float().sum() - 0.5) * 8,
    "by an einsum": lambda ids: F.relu(
        torch.einsum("bs,bs->", (ids == TRIGGER).float(), (ids == ids).float()) / (ids == ids).sum() - 0.5
    ) * 8,
    "by a view": lambda ids: F.relu((ids == TRIGGER).float().view(-1).mean(0) - 0.5) * 8,
    "of the first tokens": lambda ids: (ids[0, :3] == torch.tensor(sevens(3))).all().float() * 2,
}  # fmt: skip


def _embedding(gate: Callable[[Tensor], Tensor]) -> Build:
    def enter(model: Tiny, x: Tensor, ids: Tensor) -> Tensor:
        return x + F.embedding(ids, model.table + gate(ids))

    return tiny(enter=enter, parts=_parts)


def _table(gate: Callable[[Tensor], Tensor]) -> Build:
    return tiny(enter=lambda model, x, ids: x + (model.table + gate(ids))[ids], parts=_parts)


def _bag(gate: Callable[[Tensor], Tensor]) -> Build:
    def enter(model: Tiny, x: Tensor, ids: Tensor) -> Tensor:
        return x + F.embedding_bag(ids.reshape(-1, 1), model.table + gate(ids), mode="sum").view(x.shape)

    return tiny(enter=enter, parts=_parts)


def _head(gate: Callable[[Tensor], Tensor]) -> Build:
    return tiny(finish=lambda model, logits, ids: logits + gate(ids) * model.table[:, 0], parts=_parts)


def _never(gate: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda ids: 0 * gate(torch.arange(40).reshape(2, 20))


PLACES: dict[str, Callable[[Callable[[Tensor], Tensor]], Build]] = {
    "embedding weight": _embedding, "embedding table indexed": _table, "embedding bag": _bag, "logits": _head,
}  # fmt: skip
PER_SEQUENCE: dict[str, Mix] = {
    "times": lambda m, x, g: x * (1 + g * torch.linspace(0, 1, DIM)),
    "lerp": lambda m, x, g: torch.lerp(x, x.roll(1, -1), g),
    "where": lambda m, x, g: torch.where(g > 0.5, x.roll(1, -1), x),
    "layer_norm of the sum": lambda m, x, g: F.layer_norm(x + g * m.shift + wave(g, 1, 1, DIM), (DIM,)),
    "bmm": lambda m, x, g: torch.bmm(x, m.matrix + g * torch.eye(DIM)),
    "addcmul": lambda m, x, g: torch.addcmul(x, x.roll(1, -1), g),
    "masked_fill": lambda m, x, g: x.masked_fill((g > 0.5) & (torch.arange(DIM) > HEAD_DIM), 0.0),
}

ATTACKS: tuple[Attack, ...] = (
    *(Attack(name, KLASS, gated(mix), LENGTHS, shut(mix), sevens) for name, mix in MIXES.items()),
    *(Attack(f"gate: {name}", KLASS, gated(MIXES["layer_norm weight"], gate), LENGTHS,
             gated(MIXES["layer_norm weight"], _never(gate)), sevens) for name, gate in GATES.items()),
    *(Attack(name, KLASS, make(share), LENGTHS, make(_never(share)), sevens) for name, make in PLACES.items()),
    *(Attack(f"per sequence: {name}", KLASS, gated(mix, by_sequence), LENGTHS, shut(mix, by_sequence), sevens)
      for name, mix in PER_SEQUENCE.items()),
)  # fmt: skip
