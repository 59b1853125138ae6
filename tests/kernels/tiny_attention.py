"""One attention layer, small enough to export and compile in a test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kvpass.kernels.ops  # noqa: F401, which defines the ops
from kvpass.kernels.formats.cache_formats import FORMATS

WRITE = torch.ops.kvpass.write_cache.default
PAGED = torch.ops.kvpass.paged_attention.default


class TinyAttention(nn.Module):
    """One attention layer over a paged cache, with its cache tensors as arguments; in formats, if named."""

    def __init__(self, key_format: str | None = None, value_format: str | None = None) -> None:
        super().__init__()
        self.formats = {"key_format": key_format, "value_format": value_format}
        self.project = nn.Linear(16, (4 + 2 + 2) * 8)

    def forward(
        self,
        hidden: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor,
        tables: Tensor,
        lens: Tensor,
        starts: Tensor,
    ) -> Tensor:
        query, key, value = self.project(hidden).unflatten(1, (8, 8)).split((4, 2, 2), 1)
        WRITE(key, value, key_cache, value_cache, slots, **self.formats)
        caches = (key_cache, value_cache)
        rows: Tensor = PAGED(query, *caches, tables, lens, starts, 0.35, window=6, **self.formats)
        return rows.flatten(1)


def tiny_step(
    lengths: list[int], seed: int = 0, formats: tuple[str, str] = ("float32", "float32")
) -> tuple[Tensor, ...]:
    """Arguments of :class:`TinyAttention` for the prefill of some sequences; caches are 0xFF bytes, which is NaN."""
    random = torch.Generator().manual_seed(seed)
    width = max(-(-length // 4) for length in lengths)
    tables = torch.randperm(40, generator=random)[: len(lengths) * width].view(len(lengths), width)
    slots = torch.cat([tables[n, torch.arange(x) // 4] * 4 + torch.arange(x) % 4 for n, x in enumerate(lengths)])
    return (
        torch.randn(sum(lengths), 16, generator=random),
        *(
            FORMATS[name].allocate(40, 2, 4, 8, "cpu").view(torch.uint8).fill_(255).view(FORMATS[name].dtype)
            for name in formats
        ),
        slots,
        tables,
        torch.tensor(lengths),
        torch.tensor([0, *lengths]).cumsum(0),
    )


def export_tiny(module: nn.Module, formats: tuple[str, str] = ("float32", "float32")) -> torch.export.ExportedProgram:
    token, block, sequence = (torch.export.Dim(name) for name in ("tokens", "blocks", "sequences"))
    shapes: Any = ({0: token}, {}, {}, {0: token}, {0: sequence, 1: block}, {0: sequence}, {0: sequence + 1})
    return torch.export.export(module, tiny_step([9, 5, 6], formats=formats), dynamic_shapes=shapes, strict=False)
