"""Numbers at the edge of a code: how far a model's answers move where they fall to its other side.

A file and the library sum the same products in different orders, so that a key or a value differs by a few roundings of
float32. Where a narrow format rounds it once more that may be enough for the next code, a whole step away: a 127th of
the largest number of its row in int8, a 15th of the row's range in int4. Both are right, and no bound for sums holds
for what comes of it. So the model is asked again, with all new rows nudged by as much as sums may differ: answers that
hold still are compared as closely as ever, and those that move are given room for as much as they moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from kvpass.exporters.dialects.lowerings import KVPASS
from kvpass.fx_passes.lowering.bind import PagedModule
from kvpass.kernels.formats.cache_formats import allocate_cache, find_format
from kvpass.kernels.reference import backend as reference
from kvpass.types import CachePlan, StepInputs

ROWS = {"write_cache": (0, 1), "norm_rotary_write": (1, 2)}  # which arguments are new rows
# Standard deviation of a nudge as a part of the row's largest number, by dtype of the model: several times of what was
# seen, so that what a file rounds the other way is more likely than not among what nudges do.
NUDGE = {torch.float64: 2e-6, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
PAIRS = 3  # of nudges and their opposites, one of which crosses any edge that is near
CHUNK = 256  # most new tokens of a sequence in a step


class InTorch(TorchDispatchMode):
    """Computes ops of kvpass by their reference, and their new rows nudged.

    Kernels may round queries and weights as well, where a format is coarser than that; no file does as they do.

    Args:
        by_reference: false leaves ops to the kernels that serve them, for files that call these.
        nudge: standard deviation, as a part of the largest number of a row; 0 for none.
        seed: of the nudges.
        sign: 1, or -1 for the opposite of each.
    """

    def __init__(self, by_reference: bool, nudge: float = 0.0, seed: int = 0, sign: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._by_reference, self._size = by_reference, nudge * sign
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, given, options = str(func._schema.name), list(args), dict(kwargs or {})
        if not name.startswith(KVPASS):
            return func(*given, **options)
        op = name.removeprefix(KVPASS)
        for place in ROWS.get(op, ()) if self._size else ():
            given[place] = self._nudged(given[place])
        return (getattr(reference, op) if self._by_reference else func)(*given, **options)

    def _nudged(self, rows: Tensor) -> Tensor:
        if not rows.numel():
            return rows
        noise = torch.randn(rows.shape, generator=self._generator).to(rows.device, rows.dtype)
        return rows + self._size * noise * rows.abs().amax(-1, keepdim=True)


def is_narrow(plan: CachePlan, dtype: torch.dtype) -> bool:
    """Whether a cache rounds what a model of ``dtype`` computes."""
    formats = {find_format(form) for spec in plan.caches for form in (spec.key_format, spec.value_format)}
    return any(form.coded or form.dtype.itemsize < dtype.itemsize for form in formats)


def spread(module: PagedModule, tokens: Sequence[int], reads: Sequence[int], by_reference: bool) -> list[float]:
    """How far logits move when rows are nudged.

    Args:
        module: the rewritten model.
        tokens: a sequence.
        reads: numbers of its first tokens, ascending.
        by_reference: as of :class:`InTorch`.

    Returns:
        for each of ``reads`` the largest change of a logit after so many tokens, as a part of the largest logit.
    """
    still = _logits(module, tokens, reads, InTorch(by_reference))
    worst = torch.zeros(len(reads))
    for seed in range(PAIRS):
        for sign in (1, -1):
            mode = InTorch(by_reference, NUDGE[still.dtype], seed, sign)
            moved = (_logits(module, tokens, reads, mode) - still).abs().amax(-1)
            part = moved / still.abs().amax(-1).clamp(min=1e-6)
            worst = torch.maximum(worst, part.float().nan_to_num(0.0, 0.0, 0.0))  # what cannot be told gives no room
    return worst.tolist()


@torch.no_grad()
def _logits(module: PagedModule, tokens: Sequence[int], reads: Sequence[int], mode: InTorch) -> Tensor:
    plan, device, groups = module.plan, module.device, len(module.plan.group_windows)
    blocks = -(-reads[-1] // plan.block_size)
    caches = [allocate_cache(spec, blocks, plan.block_size, device) for spec in plan.caches]
    tables = torch.arange(blocks, device=device).expand(groups, 1, -1).contiguous()
    found = []
    for start in range(0, reads[-1], CHUNK):
        stop = min(start + CHUNK, reads[-1])
        place = torch.arange(start, stop, device=device)
        wanted = torch.tensor([read - 1 - start for read in reads if start < read <= stop], dtype=torch.int64)
        step = StepInputs(
            torch.tensor(tokens[start:stop], device=device),
            place,
            place.expand(groups, -1).contiguous(),
            tables,
            torch.tensor([stop], device=device),
            torch.tensor([0, stop - start], device=device),
            # One at least: a step of no logits at all is none that a model is ever asked.
            wanted.to(device) if len(wanted) else torch.zeros(1, dtype=torch.int64, device=device),
        )
        with mode:
            logits = module(step, caches)
        found.append(logits[: len(wanted)])
    return torch.cat(found)
