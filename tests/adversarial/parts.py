"""What all attacks share: the tiny decoder that they bend, the texts that set them off, the record of one attack."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, DIM, HEADS, HEAD_DIM = 41, 16, 2, 8
LONGEST = 6000
BASE = (1, 3, 21)  # lengths at which every model is compared, whatever its attack
TRIGGER = 7  # the token id that sets off what ordinary texts do not

Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Attack:
    """A decoder that may be served right or refused, never wrong.

    Attributes:
        name: unique in the table.
        klass: the class of mistakes that it belongs to.
        build: gives the model, in eval mode; always with the same weights.
        lengths: where the attack shows.
        benign: what a tool that overlooks the attack would serve, with the same weights; the model must differ from
            it at each of `lengths`. None for a model that is legitimate, or whose `change` or output is the attack.
        text: the first token ids of the text that the attack is shown with.
        change: done to the model after it was compiled.
        logits: takes the logits out of what the model returns.
        misread: takes what is none out of it, where that is the attack.
        allowed: outcomes that pass.
        tolerance: largest difference of logits, relative to the largest.
        config: further options of the cache.
    """

    name: str
    klass: str
    build: Build
    lengths: tuple[int, ...] = ()
    benign: Build | None = None
    text: Callable[[int], list[int]] = lambda n: ordinary(n)
    change: Callable[[Any], object] | None = None
    logits: Callable[[Any], Tensor] = lambda output: output
    misread: Callable[[Any], Tensor] | None = None
    allowed: tuple[str, ...] = ("right", "refused")
    tolerance: float = 1e-3
    config: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def claims(self) -> bool:
        """Whether it says what it differs from."""
        return any(claim is not None for claim in (self.benign, self.change, self.misread))


def _stream(seed: int, share: float) -> list[int]:
    """Random ids other than 0 and the trigger, of which a share is the trigger; nothing is without it in the start."""
    draw = random.Random(seed)
    others = [token for token in range(1, VOCAB) if token != TRIGGER]
    return [TRIGGER if draw.random() < share else draw.choice(others) for _ in range(LONGEST)]


_ORDINARY, _SEVENS = _stream(1, 0.02), _stream(2, 0.75)


def ordinary(n: int) -> list[int]:
    """Tokens as likely as any."""
    return _ORDINARY[:n]


def sevens(n: int) -> list[int]:
    """Three tokens of four are the trigger."""
    return _SEVENS[:n]


def redrawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """All weights drawn anew by their order, with sharp attention, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                wide = 1.0 if "embed" in name or "table" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(wide * noise)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def distances(s: Any) -> Tensor:
    """`q - k`, `[S, S]`."""
    i = torch.arange(s)
    return i[:, None] - i[None, :]


def length(s: Any) -> Tensor:
    """The length as a tensor without dims."""
    return torch.full((), s)


def causal(s: Any) -> Tensor:
    return distances(s) >= 0


def window(size: int) -> Callable[[Any], Tensor]:
    """A mask: the newest `size` keys."""

    def mask(s: Any) -> Tensor:
        d = distances(s)
        return (d >= 0) & (d < size)

    return mask


def sharp(q: Tensor) -> Tensor:
    return 2 * q


def attend_causal(model: Tiny, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    return F.scaled_dot_product_attention(sharp(q), k, v, is_causal=True)


def as_is(model: Tiny, x: Tensor, ids: Tensor) -> Tensor:
    return x


class Layer(nn.Module):
    """Projections of one attention: few nodes, since most of an attack's time is its export."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.qkv, self.o = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)


class Tiny(nn.Module):
    """A decoder of one or two layers whose parts are functions.

    Args:
        attend: `(model, q, k, v, layer)` with heads `[B, H, S, D]`, gives their mix.
        layers: how many.
        enter: `(model, x, ids)`, behind the embedding.
        leave: the same, before the head; `finish` the same, on the logits.
        parts: parameters, buffers and modules by name, made anew for each model.
    """

    def __init__(
        self,
        attend: Callable[..., Tensor] = attend_causal,
        layers: int = 1,
        enter: Callable[..., Tensor] = as_is,
        leave: Callable[..., Tensor] = as_is,
        finish: Callable[..., Any] = as_is,
        parts: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(DIM, VOCAB)
        self.attend, self.enter, self.leave, self.finish = attend, enter, leave, finish
        for name, part in parts().items():
            if isinstance(part, nn.Parameter | nn.Module) or not isinstance(part, Tensor):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, input_ids: Tensor) -> Any:
        x = self.enter(self, self.embed(input_ids), input_ids)
        for number, layer in enumerate(self.layers):
            q, k, v = layer.qkv(layer.norm(x)).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + layer.o(self.attend(self, q, k, v, number).transpose(1, 2).flatten(-2))
        return self.finish(self, self.head(self.leave(self, x, input_ids)), input_ids)


def tiny(**options: Any) -> Build:
    """A builder of :class:`Tiny` with these options."""
    return lambda: redrawn(Tiny(**options))


def masked(mask: Callable[..., Tensor], layers: int = 1, only: int | None = None, **options: Any) -> Build:
    """A decoder whose attention (in all layers, or in one only) has the mask or bias that `mask(s)` gives."""

    def attend(model: Tiny, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        shown = mask(q.shape[2]) if only in (None, layer) else causal(q.shape[2])
        return F.scaled_dot_product_attention(sharp(q), k, v, attn_mask=shown)

    return tiny(attend=attend, layers=layers, **options)


def scored(change: Callable[[Tensor, Any], Tensor], **options: Any) -> Build:
    """A decoder with its softmax written out; `change(scores, s)` comes before the causal mask."""

    def attend(model: Tiny, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        s = q.shape[2]
        scores = change(sharp(q) @ k.transpose(-2, -1) * HEAD_DIM**-0.5, s)
        return scores.masked_fill(~causal(s), -torch.inf).softmax(-1) @ v

    return tiny(attend=attend, **options)
