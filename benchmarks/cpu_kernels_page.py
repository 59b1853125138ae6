"""The figures of `cpu_kernels.py` in `docs/kernels-cpu.md`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]
HEADING = "## Figures"


def rewrite(page: Path, content: Row) -> None:
    """Replace the last part of the page, or add it, by the digest of the content of `cpu_kernels.json`."""
    kept = page.read_text(encoding="utf-8").partition(HEADING)[0].rstrip()
    page.write_text(f"{kept}\n\n{digest(content)}", encoding="utf-8")


def digest(content: Row) -> str:
    """One line for each shape and format with one thread; what more threads bring stands beside it."""
    rows, machine = content["results"], content["machine"]
    threads = max(row["threads"] for row in rows)
    columns = ("shape", "heads", "dims", "format", "ms", "GB/s", "of read", "roofline", "reached")
    columns = (
        *columns,
        "in cache",
        "x bfloat16",
        f"{threads} threads: x one",
        "of read",
        "reached",
        "x bfloat16",
        "times peers",
    )
    lines = [
        HEADING,
        "",
        "Written by `python benchmarks/cpu_kernels.py --page`;",
        "[the results](../benchmarks/results/cpu_kernels.json) have more.",
        f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, {content['date']};",
        f"medians of one thread, and then of {threads}.",
        "*Of read*: part of the bandwidth of a sequential read in the same run. *Roofline*: milliseconds to read the",
        "cache once at that bandwidth, and to do the arithmetic at the speed of torch's matrix product in the query's",
        "dtype. The longer of the two is the least that is possible, and *reached* the part of it that the kernel",
        "comes to. *In cache*: least milliseconds of the same call where all blocks are one: no memory is waited",
        "for.",
        "",
        f"| {' | '.join(columns)} |",
        "| " + " | ".join("---" for _ in columns) + " |",
    ]
    lines += [_line(row, _with_threads(threads, row, rows)) for row in rows if row["threads"] == 1]
    return "\n".join(lines) + "\n"


def _with_threads(threads: int, row: Row, rows: list[Row]) -> Row | None:
    same = ("shape", "heads", "dims", "format")
    found = [r for r in rows if r["threads"] == threads > 1 and all(r[name] == row[name] for name in same)]
    return found[0] if found else None


def _line(row: Row, other: Row | None) -> str:
    heads, dims = ("/".join(map(str, row[name])) for name in ("heads", "dims"))
    more: tuple[Any, ...] = ("-",) * 4
    if other:
        times = f"{row['milliseconds'] / other['milliseconds']:.2f}"
        more = (times, other["fraction"], other["fraction_of_bound"], other["times_bfloat16"] or "-")
    peers = ", ".join(
        f"{name.removeprefix('times ')} {value}" for name, value in row.items() if name.startswith("times ")
    )
    possible = row.get("possible times without sharing")
    cells = (
        row["shape"], heads, dims, row["format"], f"{row['milliseconds']:.2f}", row["gigabytes_per_second"],
        row["fraction"], f"{row['memory_milliseconds']:.2f}, {row['arithmetic_milliseconds']:.2f}",
        row["fraction_of_bound"], row.get("in_cache_milliseconds", "-"), row["times_bfloat16"] or "-", *more,
        (peers or "-") + (f" (of {possible} possible)" if possible and peers else ""),
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"
