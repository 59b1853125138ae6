"""The parts that decoders under test have in common, so that each file shows only a spelling of its own.

A *mixer* is a module `[B, S, E] -> [B, S, E]` that mixes tokens; masks and positions are its own business.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

VOCAB = 97
DIM = 48
HEADS = 4
HEAD_DIM = DIM // HEADS
MAX_LENGTH = 128
SPREAD = 0.25

Builder = Callable[[int], nn.Module]


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class GeluMLP(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm residual block around a token mixer."""

    def __init__(self, mixer: nn.Module, feed_forward: nn.Module, dim: int = DIM) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.mixer = mixer
        self.norm2 = RMSNorm(dim)
        self.mlp = feed_forward

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Embedding, blocks around `make_mixer()`, norm, head: `[B, S]` token ids in, `[B, S, VOCAB]` logits out."""

    def __init__(
        self,
        make_mixer: Callable[[], nn.Module],
        make_mlp: Callable[[], nn.Module] = lambda: GeluMLP(DIM, 2 * DIM),
        num_layers: int = 2,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(Block(make_mixer(), make_mlp()) for _ in range(num_layers))
        self.norm = RMSNorm(DIM)
        self.head = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def in_turn(*makers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A maker of mixers that goes through `makers` layer by layer, over and over."""
    turns = itertools.cycle(makers)
    return lambda: next(turns)()


def redraw(model: nn.Module, seed: int, spread: float = SPREAD) -> nn.Module:
    """Draw all weights anew, large enough that a lost or swapped token shows, and set eval mode.

    Matrices get a spread of `spread`; vectors (norms, biases, per-head scalars) move by a spread of 0.1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(spread * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model.eval()


def decoder(make_model: Callable[[], nn.Module], spread: float = SPREAD) -> Builder:
    """`build(seed)` for a model class, or for a function that makes a model."""

    def build(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return redraw(make_model(), seed, spread)

    return build


def decoder_around(make_mixer: Callable[[], nn.Module], spread: float = SPREAD) -> Builder:
    """`build(seed)` for the common decoder around a mixer class."""
    return decoder(lambda: Decoder(make_mixer), spread)


def one_layer_around(make_mixer: Callable[[], nn.Module]) -> Builder:
    """The same with a single layer: what says nothing of layers is exported in half the time."""
    return decoder(lambda: Decoder(make_mixer, num_layers=1))
