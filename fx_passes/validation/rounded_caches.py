"""What a lossy format alone does to a model: its exact graph, run with every row rounded as it is written.

The rounding is that of the reference, :func:`~kvpass.kernels.formats.cache_formats.quantise_rows` and back; everything
else is exact. So the graph as it is stored may differ from this by what kernels round otherwise, and by nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvpass.kernels.formats.cache_formats import CacheFormat, dequantise_rows, find_format, quantise_rows
from kvpass.types import CacheSpec

# Largest rounding error of a format, relative to the number for fp8 and to the largest of its row for the others.
ROUNDING = {"int8": 0.5 / 127, "fp8_e4m3": 2.0**-4, "fp8_e5m2": 2.0**-3, "int4": 0.5 / 7, "k4": 0.57 / 7,
            "v2": 0.25}  # fmt: skip
EPS = 1e-5  # of the arithmetic of a rounding, relative


class RoundedCaches(TorchDispatchMode):
    """Runs the ops of kvpass over float32 copies of the caches, in which rows are rounded as they are written.

    Args:
        caches: the tensors that the graph is given, ``[B, H, P, D]`` of exact formats.
        specs: in which formats they are to be stored.
        nudge: by how much of a row's largest number each of its numbers is moved, up or down by chance, before it is
            rounded: what falls between two codes then falls the other way.
    """

    def __init__(self, caches: Sequence[tuple[Tensor, Tensor]], specs: Sequence[CacheSpec], nudge: float = 0.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._nudge, self._generator = nudge, torch.Generator().manual_seed(0)
        self.unexplained: dict[str, list[int]] = {}
        """By cache: rows that lost more than their format rounds, and all rows."""
        self._held: dict[int, tuple[Tensor, CacheFormat, str]] = {}
        for pair, spec in zip(caches, specs, strict=True):
            for tensor, name in zip(pair, (spec.key_format, spec.value_format), strict=True):
                if tensor.numel():
                    held = torch.full_like(tensor, torch.nan, dtype=torch.float32)
                    self._held[tensor.data_ptr()] = held, find_format(name), spec.name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ops of kvpass over the copies, and all others as they are."""
        if func.namespace != "kvpass":
            return func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        written = []
        for name, value in given.items():
            if not isinstance(value, Tensor):
                continue
            if name in ("query", "key", "value"):
                given[name] = value.float()
            elif name.endswith("cache"):
                known = self._held.get(value.data_ptr()) if value.numel() else None
                given[name] = known[0] if known else value.new_empty(value.shape, dtype=torch.float32)
                written += [known] if known and "slot_mapping" in names else []
        result = func(**given)
        for held, form, cache in written:
            self._round(held, form, cache, given["slot_mapping"])
        query = dict(zip(names, args, strict=False)).get("query")
        return result.to(query.dtype) if isinstance(result, Tensor) and query is not None else result

    def _round(self, held: Tensor, form: CacheFormat, cache: str, slots: Tensor) -> None:
        slots = slots[slots >= 0]
        block, offset = slots.div(held.shape[2], rounding_mode="floor"), slots % held.shape[2]
        rows = held[block, :, offset]
        moved = rows
        if self._nudge:
            signs = torch.randint(0, 2, rows.shape, generator=self._generator).to(rows.device) * 2 - 1
            moved = rows + signs * self._nudge * rows.abs().amax(-1, keepdim=True)
        rounded = dequantise_rows(*quantise_rows(moved, form), form)
        held[block, :, offset] = rounded
        count = self.unexplained.setdefault(cache, [0, 0])
        count[0] += int((~_explained(rows, rounded, form)).sum())
        count[1] += rows[..., 0].numel()


def _explained(rows: Tensor, rounded: Tensor, form: CacheFormat) -> Tensor:
    """Whether rows ``[..., D]`` lost no more than the format rounds, bool ``[...]``."""
    lost = (rounded - rows).square().mean(-1).sqrt()
    if form.scaled:
        return lost <= ROUNDING[form.name] * (1 + EPS) * rows.abs().amax(-1)
    part = ROUNDING.get(form.name, torch.finfo(form.dtype).eps)
    smallest = torch.finfo(form.dtype).smallest_normal  # below it fp8 has fewer digits
    return lost <= part * ((1 + EPS) * rows.square().mean(-1).sqrt() + smallest)
