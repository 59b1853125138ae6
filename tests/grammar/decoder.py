"""Random decoders: a spelling drawn for every stage of every attention, and the models made of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.grammar import attention, masks, projections
from tests.grammar.shape import Frame, Heads, Part, Spec

VOCAB = 29
WIDTH = 16
FAMILY = 8

UNSOUND = ("shows a later token", "sees everything", "talking heads", "softmax over queries", "scale by length")
AFTER = ("none", "gate per head", "gate per number", "weight per head", "norm per head", "differential")
OUTPUTS = ("transposed", "permuted, flattened", "einsum", "product per head", "by concatenation")
DEFAULTS: Spec = {
    "heads": 2, "kv_heads": 2, "dim": 4, "value_dim": 4, "projection": "three linears", "norm": "none",
    "position": "none", "route": "written out", "repeat": "repeat_interleave", "scale": "times", "scores": "matmul",
    "cap": "none", "bias": "none", "visible": "tril of ones", "hiding": "masked_fill(-inf)", "softmax": "softmax",
    "after": "none", "output": "transposed", "unsound": "none", "once_more": "none",
}  # fmt: skip


def draw(seed: int, unsound: bool = False) -> Spec:
    """The choices of one attention. Neighbours, `FAMILY` at a time, have the projections into heads in common."""
    rng = random.Random(seed // FAMILY)

    def often(default: str, table: Iterable[str], share: float) -> str:
        return default if rng.random() < share else rng.choice(list(table))

    kv, group = rng.choice([(1, 1), (2, 1), (3, 1), (4, 1), (1, 4), (2, 2), (1, 2), (1, 3)])
    dim = rng.choice([4, 4, 8])
    spec = dict(DEFAULTS, seed=seed, kv_heads=kv, heads=kv * group, dim=dim, value_dim=dim)
    tables = {**projections.ANY_HEADS, **projections.EQUAL_WIDTHS}
    if group == 1:
        tables |= projections.MULTI_HEAD
    spec["projection"] = rng.choice(list(tables))
    if spec["projection"] in projections.ANY_HEADS and rng.random() < 0.3:
        spec["value_dim"] = rng.choice([2, 4, 6])
    spec["norm"] = often("none", projections.NORMS, 0.5)
    spec["position"] = often("none", projections.POSITIONS, 0.4)
    rng = random.Random(seed)
    spec["route"] = "sdpa" if rng.random() < 0.2 else "written out"
    spec["repeat"] = rng.choice(list(attention.REPEATS))
    spec["scale"] = rng.choice(attention.SCALES)
    spec["scores"] = rng.choice(list(attention.SCORES if group > 1 else attention.REPEATED_SCORES))
    spec["cap"] = often("none", attention.CAPS, 0.7)
    spec["bias"] = often("none", masks.BIASES, 0.6)
    spec["visible"] = rng.choice(list(masks.VISIBLE))
    spec["hiding"] = rng.choice(list(masks.HIDING))
    spec["softmax"] = rng.choice(list(attention.SOFTMAXES))
    if spec["softmax"] == "divided after values":
        spec["scores"] = "matmul"  # the sum stands in the layout of the result
    spec["after"] = often("none", AFTER, 0.6)
    spec["output"] = rng.choice(OUTPUTS)
    if unsound:
        spec["unsound"] = rng.choice(UNSOUND)
    return spec


def describe(spec: Spec) -> str:
    """The choices that are not the plain ones."""
    return ", ".join(f"{k}={v}" for k, v in spec.items() if DEFAULTS.get(k) != v)


class RandomAttention(Part):
    """`[B, S, E] -> [B, S, E]` by the choices of a spec, from heads that a family has in common."""

    def forward(self, x: Tensor, t: Heads) -> Tensor:
        spec = self.spec
        out = self.attend(t)
        if spec["after"] == "differential":
            other = Heads(x, t.q.flip(-1), t.k * self.weight("other", 1, self.kv, 1, self.d), t.v)
            out = out - self.weight("share", self.h, 1, 1, around=0.4, spread=0.1) * self.attend(other)
        return self.merge(self.after(out, x))

    def attend(self, t: Heads) -> Tensor:
        """`[B, H, S, Dv]`."""
        return self.by_sdpa(t) if self.spec["route"] == "sdpa" else self.written_out(t)

    def visible(self, n: int, device: torch.device) -> Tensor:
        """`[1 or H, S, S]`."""
        seen = masks.VISIBLE[self.spec["visible"]](self, n, device)
        if self.spec["unsound"] == "shows a later token":
            seen = seen | torch.ones(n, n, dtype=torch.bool, device=device).triu(1).tril(1)
        elif self.spec["unsound"] == "sees everything":
            seen = torch.ones(n, n, dtype=torch.bool, device=device)
        return seen if seen.dim() == 3 else seen.unsqueeze(0)

    def by_sdpa(self, t: Heads) -> Tensor:
        """`scaled_dot_product_attention`; what hides keys is chosen by the `hiding` of the spec."""
        n, device, spec = t.length, t.x.device, self.spec
        t = Heads(t.x, t.q, t.k, t.v)
        grouped = self.group > 1 and spec["repeat"] in ("repeat_interleave", "indexed")
        if self.group > 1 and not grouped:
            self.repeat_heads(t)
        options = {} if spec["scale"] in ("on queries", "times") else {"scale": 0.45}
        bias = masks.BIASES[spec["bias"]]
        plain = bias is None and spec["visible"] in ("tril of ones", "not triu") and spec["unsound"] == "none"
        if plain and spec["hiding"].startswith("where"):
            mask, options["is_causal"] = None, True
        elif bias is None and spec["hiding"].startswith("masked"):
            mask = self.visible(n, device)
        else:
            zero = torch.zeros((), device=device) if bias is None else bias(self, n, device).float()
            mask = torch.where(self.visible(n, device), zero, -torch.inf)
        return F.scaled_dot_product_attention(t.q, t.k, t.v, attn_mask=mask, enable_gqa=grouped, **options)

    def repeat_heads(self, t: Heads) -> None:
        repeat = attention.REPEATS[self.spec["repeat"]]
        t.k, t.v = repeat(self, t.k), repeat(self, t.v)

    def written_out(self, t: Heads) -> Tensor:
        n, device, spec = t.length, t.x.device, self.spec
        t = Heads(t.x, t.q, t.k, t.v)
        if spec["scale"] in attention.SCALES_BEFORE:
            t.q, t.k = attention.SCALES_BEFORE[spec["scale"]](self, t.q, t.k)
        if self.group > 1 and spec["scores"] in attention.REPEATED_SCORES:
            self.repeat_heads(t)
        scores, frame = attention.SCORES[spec["scores"]](self, t)
        if spec["scale"] in attention.SCALES_AFTER:
            scores = attention.SCALES_AFTER[spec["scale"]](self, scores)
        if spec["unsound"] == "scale by length":
            scores = scores * torch.log(torch.ones(n, device=device).sum())
        if spec["unsound"] == "talking heads":
            scores = self.mix_heads(scores, frame)
        scores = attention.CAPS[spec["cap"]](scores)
        bias = masks.BIASES[spec["bias"]]
        if bias is not None:
            scores = scores + frame.place(bias(self, n, device))
        frame = replace(frame, seen=frame.place(self.visible(n, device)))
        scores = masks.HIDING[spec["hiding"]](scores, frame.seen)
        if spec["unsound"] == "softmax over queries":
            queries = -1 if frame.keys in (2, -2) else -2
            frame = replace(frame, keys=1 if spec["scores"] in ("heads last", "queries before heads") else queries)
        weights = attention.SOFTMAXES[spec["softmax"]](self, scores, frame)
        out = attention.weighted(self, weights, t)
        if spec["softmax"] == "divided after values":
            out = out / weights.sum(frame.keys, keepdim=True)
        return out

    def mix_heads(self, scores: Tensor, frame: Frame) -> Tensor:
        """Scores of one head take part in those of another."""
        if frame.rank != 4 or self.h == 1:
            return scores - scores.mean(0, keepdim=True)  # or those of other sequences
        heads = {"heads last": 3, "queries before heads": 2, "heads first": 0}.get(self.spec["scores"], 1)
        return scores + 0.5 * scores.roll(1, heads)

    def after(self, out: Tensor, x: Tensor) -> Tensor:
        match self.spec["after"]:
            case "gate per head":
                return out * F.linear(x, self.weight("gate", self.h, self.e)).sigmoid().transpose(1, 2).unsqueeze(-1)
            case "gate per number":
                gate = F.silu(F.linear(x, self.weight("gate", self.h * self.dv, self.e)))
                return out * gate.unflatten(-1, (self.h, self.dv)).transpose(1, 2)
            case "weight per head":
                return out * self.weight("share", 1, self.h, 1, 1, around=1.0)
            case "norm per head":
                return F.rms_norm(out, (self.dv,)) * self.weight("norm", self.dv, around=1.0)
        return out

    def merge(self, out: Tensor) -> Tensor:
        """`[B, H, S, Dv] -> [B, S, E]`."""
        b, h, s, d = out.shape
        match self.spec["output"]:
            case "transposed":
                return F.linear(out.transpose(1, 2).contiguous().view(b, s, h * d), self.weight("o", self.e, h * d))
            case "permuted, flattened":
                return out.permute(0, 2, 1, 3).flatten(2) @ self.weight("o", h * d, self.e)
            case "einsum":
                return torch.einsum("bhsd,hde->bse", out, self.weight("o", h, d, self.e))
            case "product per head":
                return (out @ self.weight("o", h, d, self.e)).sum(1)
        return F.linear(torch.cat([out[:, i] for i in range(h)], dim=-1), self.weight("o", self.e, h * d))


class Family(Part):
    """Attentions side by side over the same queries, keys and values: `[B, S, E]` each."""

    def __init__(self, specs: list[Spec]) -> None:
        super().__init__(specs[0], WIDTH)
        self.attentions = nn.ModuleList(RandomAttention(spec, WIDTH) for spec in specs)

    def forward(self, x: Tensor) -> list[Tensor]:
        t = projections.PROJECTIONS[self.spec["projection"]](self, x)
        projections.NORMS[self.spec["norm"]](self, t)
        projections.POSITIONS[self.spec["position"]](self, t)
        return [attend(x, t) for attend in self.attentions]


class Chain(nn.Module):
    """Families one after the other, each attention with logits of its own: `[B, S] -> [B, S, VOCAB * attentions]`.

    A family reads what the families before it made; the logits show which attention was wrong first.
    """

    def __init__(self, specs: list[Spec]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(specs[0]["seed"])
        self.embed = nn.Parameter(torch.randn(VOCAB, WIDTH, generator=generator))
        self.head = nn.Parameter(torch.randn(VOCAB, WIDTH, generator=generator))
        families = itertools.groupby(specs, lambda spec: spec["seed"] // FAMILY)
        self.layers = nn.ModuleList(Family(list(members)) for _, members in families)
        with torch.no_grad():
            self(torch.zeros(2, 5, dtype=torch.int64))  # weights come into being
        self.eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = F.embedding(input_ids, self.embed)
        logits = []
        for layer in self.layers:
            outs = layer(F.layer_norm(x, (WIDTH,)))
            logits += [F.linear(out, self.head) for out in outs]
            x = x + torch.stack(outs).sum(0)
        return torch.cat(logits, dim=-1)
