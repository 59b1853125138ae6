"""What stands before a cache write: an RMS norm of each head, a rotary embedding, both or neither; by evaluating it.

The formula is that of ``kvpass::norm_rotary_write``: ``R(positions) @ (x / sqrt(mean(x * x) + eps) * weight)`` for
every head (RMS norm: https://arxiv.org/abs/1910.07467, rotary: https://arxiv.org/abs/2104.09864). A segment is run in
float64 on unit vectors, with random numbers in the place of every table and weight: that gives R as a matrix, whose
entries must be entries of the tables, each found by its value. The formula so read is then compared with the segment
on fresh random numbers. Both are analytic, so that they agree everywhere or almost nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.fx_passes.graph import shape_of
from kvpass.fx_passes.optimization.analytic_slices import Origin, Segment, numbers_of

TOKENS = 3
EXACT = 1e-9  # of float64 numbers of size 1
LARGE = 1e4  # where a power that is added shows


@dataclass(frozen=True)
class Columns:
    """Entries ``[T, Dr]`` of a table of positions.

    Attributes:
        table: its place among the segment's inputs.
        places: column of each entry, once a row of the table is one long row; of a complex table, of its real form.
        sign: 1 or -1, a factor.
    """

    table: int
    places: tuple[int, ...]
    sign: int


@dataclass(frozen=True)
class Rotation:
    """What a segment computes of the heads ``[T, H, D]`` of its source.

    Attributes:
        cos: None for no rotation.
        sin: the same.
        interleaved: neighbours are rotated against each other, not the two halves.
        weight: place of the norm's weight among the segment's inputs; -1 for a norm without one, None for no norm.
        eps: of the norm.
    """

    cos: Columns | None
    sin: Columns | None
    interleaved: bool
    weight: int | None
    eps: float


def read_rotation(segment: Segment, origins: dict[Node, Origin], heads: int, width: int) -> Rotation | None:
    """The meaning of a segment whose result is ``[T, heads, width]``; None if it has no such meaning."""
    trial = _Trial(segment, origins, heads, width, seed=0)
    fresh = _Trial(segment, origins, heads, width, seed=1)
    if trial.token_dim is None or not all(table is not None for table in trial.tables.values()):
        return None
    for weight, eps in _norms(trial):
        matrices = trial.matrices(weight, eps)
        found = None if matrices is None else _read_matrices(trial, matrices, weight, eps)
        if found is not None and fresh.agrees(found):
            return found
    return None


def _norms(trial: _Trial) -> Iterator[tuple[int | None, float]]:
    """Norms that the segment may have: place of the weight, and epsilon."""
    once, twice = trial.run(trial.heads), trial.run(2 * trial.heads)
    if torch.allclose(twice, 2 * once, rtol=EXACT, atol=EXACT):
        yield None, 0.0
        return
    for eps in numbers_of(trial.segment.body):
        for place in (*trial.weights, -1):
            if 0 < eps < 1:
                yield place, eps


class _Trial:
    """A segment with random numbers for all that it reads."""

    def __init__(self, segment: Segment, origins: dict[Node, Origin], heads: int, width: int, seed: int) -> None:
        self.segment = segment
        self.shape = (TOKENS, heads, width)
        generator = torch.Generator().manual_seed(seed)

        def draw(sizes: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.randn(*sizes, generator=generator, dtype=dtype)

        self.token_dim = _token_dim(segment, segment.source)
        self.heads = draw(self.shape)
        self.given: dict[Node, Tensor] = {}
        self.tables: dict[int, Tensor | None] = {}
        self.weights: dict[int, Tensor] = {}
        for place, node in enumerate(segment.inputs):
            dtype = torch.complex128 if node.meta["val"].dtype.is_complex else torch.float64
            value = draw(segment.sizes(node, TOKENS), dtype)
            self.given[node] = value
            if origins[node] is Origin.POSITIONS:
                dim = _token_dim(segment, node)
                rows = torch.view_as_real(value) if dtype.is_complex else value
                self.tables[place] = None if dim is None else rows.movedim(dim, 0).reshape(TOKENS, -1)
            elif value.numel() == width and not dtype.is_complex:
                self.weights[place] = value.flatten()

    def run(self, heads: Tensor) -> Tensor:
        """The segment of heads ``[T, H, D]``."""
        sizes = self.segment.sizes(self.segment.source, TOKENS)
        assert self.token_dim is not None
        rest = [size for i, size in enumerate(sizes) if i != self.token_dim]
        source = heads.reshape(TOKENS, *rest).movedim(0, self.token_dim)
        return self.segment.evaluate({**self.given, self.segment.source: source}, TOKENS)

    def matrices(self, weight: int | None, eps: float) -> Tensor | None:
        """R of each token, ``[T, D, D]``, from the images of unit vectors; None if the heads differ in theirs."""
        columns = []
        for place in range(self.shape[2]):
            unit = torch.zeros(self.shape, dtype=torch.float64)
            unit[..., place] = 1
            length = self.normed(unit, weight, eps)[..., place, None]
            columns.append(self.run(unit) / length)
        matrix = torch.stack(columns, -1)
        return matrix[:, 0] if _close(matrix, matrix[:, :1]) else None

    def normed(self, heads: Tensor, weight: int | None, eps: float) -> Tensor:
        if weight is None:
            return heads
        factor = 1.0 if weight < 0 else self.weights[weight]
        return heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + eps) * factor

    def columns(self, wanted: Tensor) -> Columns | None:
        """Where entries ``[T, Dr]`` stand in one of the tables."""
        for place, table in self.tables.items():
            assert table is not None
            for sign in (1, -1):
                equal = (table[:, None, :] * sign - wanted[:, :, None]).abs().amax(0) < EXACT
                if bool(equal.any(1).all()):
                    return Columns(place, tuple(equal.int().argmax(1).tolist()), sign)
        return None

    def agrees(self, found: Rotation) -> bool:
        """Whether the segment computes the formula: for numbers of size 1, large, and so small that epsilon counts."""
        for scale in (1.0, LARGE, max(found.eps, 1e-12) ** 0.5):
            heads = self.heads * scale
            normed = self.normed(heads, found.weight, found.eps)
            wanted = normed
            if found.cos is not None and found.sin is not None:
                cos, sin = (self.tables[c.table][:, None, list(c.places)] * c.sign for c in (found.cos, found.sin))  # type: ignore[index]
                turned, rest = normed[..., : cos.shape[-1]], normed[..., cos.shape[-1] :]
                wanted = torch.cat((turned * cos + _turn(turned, found.interleaved) * sin, rest), -1)
            got = self.run(heads)
            if got.shape != wanted.shape or not _close(got / scale, wanted / scale):
                return False
        return True


def _read_matrices(trial: _Trial, matrices: Tensor, weight: int | None, eps: float) -> Rotation | None:
    """The rotation whose matrices ``[T, D, D]`` are given, in either order of pairs."""
    width = matrices.shape[-1]
    identity = torch.eye(width, dtype=torch.float64)
    moved = ((matrices - identity).abs() > EXACT).any(0).any(1)
    rotated = int(moved.sum())
    if not rotated:
        return None if weight is None else Rotation(None, None, False, weight, eps)
    if rotated % 2 or not bool(moved[:rotated].all()):
        return None
    cos = matrices[:, range(rotated), range(rotated)]
    places = torch.arange(rotated)
    for interleaved in (False, True):
        partner = places ^ 1 if interleaved else (places + rotated // 2) % rotated
        first = places % 2 == 0 if interleaved else places < rotated // 2
        sin = matrices[:, places, partner] * torch.where(first, -1.0, 1.0)
        found = trial.columns(cos), trial.columns(sin)
        if found[0] is not None and found[1] is not None:
            return Rotation(found[0], found[1], interleaved, weight, eps)
    return None


def _turn(rows: Tensor, interleaved: bool) -> Tensor:
    """``(-x2, x1)`` of the two halves, or of each pair of neighbours."""
    if interleaved:
        return torch.stack((-rows[..., 1::2], rows[..., ::2]), -1).flatten(-2)
    first, second = rows.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _token_dim(segment: Segment, node: Node) -> int | None:
    """The dim that counts tokens; None if there is not one alone."""
    found = [i for i, size in enumerate(shape_of(node)) if segment.captured.length in size.free_symbols]
    return found[0] if len(found) == 1 else None


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= EXACT * (1 + b.abs())).all())
