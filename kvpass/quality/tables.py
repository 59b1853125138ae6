"""What was measured of cache formats, and chosen by it, as tables for a terminal or a page, or as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from kvpass.quality.eval_sets import is_task
from kvpass.quality.evaluate import FormatQuality
from kvpass.quality.tune import Tuning


def quality_table(model: str, rows: Sequence[FormatQuality]) -> Table:
    """The figures of one model for a terminal."""
    table = Table(title=f"cache formats of {model}")
    columns, cells = quality_cells(rows)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in cells:
        table.add_row(*row)
    return table


def markdown_table(rows: Sequence[FormatQuality]) -> str:
    """The same for a page of documentation."""
    columns, cells = quality_cells(rows)
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quality_cells(rows: Sequence[FormatQuality]) -> tuple[list[str], list[list[str]]]:
    """Columns and their cells; each set of samples has its own columns."""
    names = list(rows[0].scores) if rows else []
    columns = ["format", "bits per element", "bytes per token"]
    for name in names:
        columns += [f"{name}: {'right' if is_task(name) else 'perplexity'}", "KL", "same top token"]
    if any(row.greedy_in_common is not None for row in rows):
        columns.append("greedy in common")
    cells = []
    for row in rows:
        line = [row.format, f"{row.bits_per_element:.2f}", f"{row.bytes_per_token}"]
        for name in names:
            scores = row.scores[name]
            line.append(f"{scores.accuracy:.2%}" if is_task(name) else f"{scores.perplexity:.3f}")
            # of independent tokens, as is usual; neighbours are not quite
            deviation = math.sqrt(scores.agreement * (1 - scores.agreement) / scores.tokens)
            line += [f"{scores.kl:.1e}", f"{scores.agreement:.2%} ± {100 * deviation:.2f}"]
        if row.greedy_in_common is not None:
            line.append(f"{row.greedy_in_common:.1%}")
        cells.append(line)
    return columns, cells


def quality_data(model: str, rows: Sequence[FormatQuality]) -> dict[str, Any]:
    """The same as plain dicts, lists, strings and numbers."""
    return {"model": model, "formats": [asdict(row) for row in rows]}


def tuning_table(model: str, tuning: Tuning) -> Table:
    """The loss of every part in every format, and which was chosen."""
    formats = list(tuning.parts[0].costs)
    table = Table(title=f"KL divergence in nats when one part of the cache of {model} is narrowed")
    for column in ("cache", "part", *formats, "chosen", "bytes"):
        table.add_column(column, justify="right" if column in formats or column == "bytes" else "left")
    for part in tuning.parts:
        losses = [f"{part.costs[name][1]:.1e}" if name in part.costs else "" for name in formats]
        table.add_row(part.cache, part.kind, *losses, part.chosen, f"{part.costs[part.chosen][0]}")
    return table


def tuning_lines(tuning: Tuning) -> list[str]:
    """What was chosen, in words."""
    return [
        f"{tuning.bytes_per_token} bytes per token, of {tuning.budget:g} allowed",
        f"KL divergence {tuning.kl:.1e} measured with all parts narrowed ({tuning.predicted_kl:.1e} as a sum of the "
        f"parts), same top token {tuning.agreement:.2%}",
        f"CacheConfig(dtype={tuning.dtype!r})",
    ]


def tuning_data(model: str, tuning: Tuning) -> dict[str, Any]:
    """The same as plain dicts, lists, strings and numbers."""
    return {"model": model, **asdict(tuning)}
