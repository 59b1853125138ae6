"""How far two right runs of one model may be apart, by what rounding does to that model.

In float32 the bound is fixed. In less, it comes from the original alone: how far its logits move when nothing differs
but how sums are grouped. Runs of one sequence alone, in a batch, and as a part of itself give what the machine does of
its own accord; a run in which every sum is rounded to a neighbour of its result, by chance, gives what another way to
group each of them may do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

FIXED = {torch.float64: 1e-6, torch.float32: 5e-4}
TIMES, TIMES_UNROUNDED = 2.0, 4.0  # how many times the noise a rewrite may be off; the second where sums kept theirs
FLOOR = 4.0  # roundings of the dtype, relative to the largest logit, that are forgiven where no noise was seen
FLIPPED = 6.0  # a row that moves by so many times what the median row does was routed elsewhere
SHARE = 0.9  # of the rows that are held to the bound where rows were seen to be routed elsewhere
DRAWS, MORE_DRAWS = 8, 64  # sequences whose sums are rounded by chance; more where a row has to be accounted for
aten = torch.ops.aten
SUMS = {
    aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.linear, aten.matmul, aten.convolution, aten._softmax,
    aten.native_layer_norm, aten._fused_rms_norm, aten.mean, aten.sum, aten.mkldnn_rnn_layer, aten._grouped_mm,
    aten.scaled_dot_product_attention, aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention, aten._scaled_dot_product_attention_math,
}  # fmt: skip


@dataclass(frozen=True)
class Bound:
    """Largest difference of logits over their largest magnitude, and the share of the rows that has to keep to it."""

    tolerance: float
    share: float = 1.0


@dataclass
class _Rounded(TorchDispatchMode):
    """Every sum of floats comes out a part of a rounding off, by chance."""

    eps: float
    generator: torch.Generator

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket not in SUMS:
            return result
        first, *rest = result if isinstance(result, tuple) else (result,)
        if isinstance(first, Tensor) and first.is_floating_point():
            part = torch.rand(first.shape, generator=self.generator).to(first.device) - 0.5
            first = (first.float() * (1 + self.eps * part)).to(first.dtype)
        return (first, *rest) if isinstance(result, tuple) else first


@dataclass
class Noise:
    """What rounding does to the logits of a model, measured on it alone.

    Args:
        dtypes: of parameters and caches; the least precise one decides.
        original: token ids ``[B, S]`` to logits ``[B, S, V]``.
        sequences: token ids ``[S]`` of at least two.
    """

    dtypes: Iterable[torch.dtype]
    original: Callable[[Tensor], Tensor]
    sequences: Sequence[Tensor]

    def __post_init__(self) -> None:
        known = [d for d in self.dtypes if d.is_floating_point and d.itemsize > 1]
        self.dtype = max(known, key=lambda d: torch.finfo(d).eps, default=torch.float32)
        self._generator = torch.Generator().manual_seed(0)
        self._rows: list[Tensor] = []
        self._rounded = True

    @property
    def is_fixed(self) -> bool:
        """Whether the bound follows from the dtype alone."""
        return self.dtype in FIXED

    def bound(self) -> Bound:
        """The bound; nothing is run where it is fixed."""
        if self.is_fixed:
            return Bound(FIXED[self.dtype])
        if not self._rows:
            self._group_otherwise()
            self._round_otherwise(DRAWS)
        return self._bound()

    def bound_with_more(self) -> Bound:
        """The bound, with many more draws, for where rows have to be accounted for that no draw has shown."""
        if not self.is_fixed and self._rounded:
            self._round_otherwise(MORE_DRAWS)
        return self.bound()

    def _bound(self) -> Bound:
        floor = FLOOR * torch.finfo(self.dtype).eps
        rows = torch.cat(self._rows)
        rows = rows[rows.isfinite()]
        kept = rows[rows <= FLIPPED * max(float(rows.median()), floor / FLIPPED)] if len(rows) else rows
        times = TIMES if self._rounded else TIMES_UNROUNDED
        most = max(floor, times * float(kept.max())) if len(kept) else floor
        return Bound(most, 1.0 if len(kept) == len(rows) else SHARE)

    def _group_otherwise(self) -> None:
        """A sequence alone against itself in a batch, and as a part of itself."""
        first, second, *_ = self.sequences
        whole = self.original(first[None])[0]
        for stop in {max(1, len(first) * part // 8) for part in (1, 3, 5, 7)}:
            self._compare(self.original(first[None, :stop])[0], whole[:stop])
        shared = min(len(first), len(second))
        self._compare(self.original(torch.stack([first[:shared], second[:shared]]))[0], whole[:shared])

    def _round_otherwise(self, draws: int) -> None:
        """Sequences whose sums are rounded by chance, against the same without."""
        eps = torch.finfo(self.dtype).eps
        for ids in self.sequences[:2]:
            try:
                # what is compiled now would be found again by the model itself, sums moved and all
                with torch.compiler.set_stance("force_eager"), _Rounded(eps, self._generator):
                    rounded = self.original(ids.expand(draws // 2, -1))
            except Exception:  # an op that cannot be watched; what it raises, the model itself does not
                self._rounded = False
                return
            self._compare(rounded.flatten(0, 1), self.original(ids[None])[0].repeat(draws // 2, 1))

    def _compare(self, got: Tensor, wanted: Tensor) -> None:
        scale = float(wanted.float().abs().max()) or 1.0
        self._rows.append((got.float() - wanted.float()).abs().flatten(1).amax(1).cpu() / scale)
