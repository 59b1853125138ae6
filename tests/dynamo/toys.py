"""Small decoders whose forwards do what real ones do around their attention."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvpass.dynamo.graph_engines import engines_of

VOCAB, DIM, HEADS = 37, 16, 2
OPTIONS: dict[str, Any] = {"num_blocks": 48, "block_size": 4}


class Toy(nn.Module):
    """One causal attention between an embedding and a head, and a hook for what a test wants to be different."""

    def __init__(self, leave: Callable[..., Any] = lambda model, logits, ids: logits) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.places = nn.Embedding(64, DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.head = nn.Linear(DIM, VOCAB)
        self.leave = leave
        self.scales = torch.ones(DIM)  # neither a parameter nor a buffer

    def body(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states `[B, S, D]`."""
        b, s = ids.shape
        x = self.embed(ids) + self.places(torch.arange(s)) * self.scales.to(self.embed.weight.dtype)
        q, k, v = self.qkv(x).view(b, s, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        seen = torch.ones(s, s, dtype=torch.bool).tril()
        if mask is not None:
            seen = seen & (mask != 0)[:, None, None, :]
        attended = F.scaled_dot_product_attention(3 * q, k, v, attn_mask=seen)
        return x + attended.transpose(1, 2).reshape(b, s, DIM)

    def forward(self, ids: Tensor) -> Any:
        return self.leave(self, self.head(self.body(ids)), ids)


class Bare(Toy):
    """No positions, so that nothing but the pool bounds its length."""

    def forward(self, ids: Tensor, *others: Any) -> Any:
        b, s = ids.shape
        x = self.embed(ids)
        q, k, v = self.qkv(x).view(b, s, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        a = F.scaled_dot_product_attention(3 * q, k, v, is_causal=True)
        return self.leave(self, self.head(x + a.transpose(1, 2).reshape(b, s, DIM)), ids)


class Losing(Toy):
    """What a training script calls."""

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        logits = self.head(self.body(ids))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


class Masked(Toy):
    """Its positions count padding."""

    def forward(self, ids: Tensor, *, attention_mask: Tensor | None = None) -> Any:
        return self.head(self.body(ids, attention_mask))


class Given(Toy):
    """Its caller makes the mask."""

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        b, s = x.shape
        hidden = self.embed(x) + self.places(torch.arange(s))
        q, k, v = self.qkv(hidden).view(b, s, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        shown = mask if mask.is_floating_point() else mask.bool()
        attended = F.scaled_dot_product_attention(3 * q, k, v, attn_mask=shown)
        return self.head(hidden + attended.transpose(1, 2).reshape(b, s, DIM))


class Chatty(Toy):
    """Its forward is two graphs of Dynamo's."""

    def forward(self, ids: Tensor) -> Any:
        x = self.body(ids)
        torch._dynamo.graph_break()
        return self.head(x)


def toy(make: Callable[..., nn.Module] = Toy, *args: Any, seed: int = 0) -> nn.Module:
    """One of them, in eval mode, with weights that let the history matter."""
    torch.manual_seed(seed)
    model = make(*args).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def compiled(model: nn.Module, **options: Any) -> Any:
    """With the backend, and a small pool."""
    return torch.compile(model, backend="kvpass", options=OPTIONS | options)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids."""
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def logits_of(output: Any) -> Tensor:
    """The logits in what a toy returns."""
    if isinstance(output, tuple):
        output = output[0]
    return output["logits"] if isinstance(output, dict) else output


@torch.no_grad()
def check(model: nn.Module, served: Any, ids: Tensor, **arguments: Any) -> None:
    """The last logits of a call in a scope are the model's."""
    found, wanted = logits_of(served(ids, **arguments)), logits_of(model(ids, **arguments))
    assert (found[:, -1] - wanted[:, -1]).abs().max() <= 1e-4 * wanted.abs().max()


def is_free(model: nn.Module) -> bool:
    """Whether the pools of a model hold nothing but what is kept for reuse."""
    for found in engines_of(model).found.values():
        assert not isinstance(found, Exception)
        found.engine.check_integrity()
        stats = found.engine.stats()
        if stats.running or stats.waiting or stats.blocks_used:
            return False
    return True
