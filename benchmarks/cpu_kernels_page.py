"""The figures of `cpu_kernels.py` in `docs/kernels-cpu.md`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
HEADING = "## Figures"


def _decodes(row: Row, *formats: str) -> bool:
    return row["shape"].startswith("decode") and row["format"] in formats


def _times(peer: str, row: Row) -> float | None:
    return row.get(f"times {peer}") if row["format"] == "bfloat16" else None


def _shared(row: Row) -> float | None:
    possible = row.get("possible times without sharing")
    return row["times without sharing"] / possible if possible and row["format"] == "bfloat16" else None


# What is asked for, how much of it, and what a row says of that.
TARGETS: tuple[tuple[str, float, Callable[[Row], float | None]], ...] = (
    ("decode, bfloat16: of the read bandwidth", 0.7, lambda r: r["fraction"] if _decodes(r, "bfloat16") else None),
    ("decode, float32: of the read bandwidth", 0.7, lambda r: r["fraction"] if _decodes(r, "float32") else None),
    ("decode, int8: times bfloat16", 1.6, lambda r: r["times_bfloat16"] if _decodes(r, "int8") else None),
    ("decode, int4: times bfloat16", 2.2, lambda r: r["times_bfloat16"] if _decodes(r, "int4") else None),
    ("int8 and int4: times bfloat16", 1.0, lambda r: r["times_bfloat16"] if r["format"] in ("int8", "int4") else None),
    ("bfloat16: times packed bmm", 2.5, lambda r: _times("packed bmm", r)),
    (
        "bfloat16: times SDPA enable_gqa",
        25.0,
        lambda r: _times("SDPA enable_gqa", r) if _decodes(r, "bfloat16") else None,
    ),
    ("prefill: times SDPA", 1.0, lambda r: r.get("times SDPA") if r["shape"].startswith("prefill") else None),
    ("shared prefix, bfloat16: of the speedup that bytes and flops allow", 0.8, _shared),
    ("more threads: times one", 1.8, lambda r: r.get("times one thread")),
)


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
        f"medians of one thread, and then of {threads}, of calls that no neighbour on the machine disturbed.",
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
    return "\n".join((*lines, "", *_compare(rows, threads))) + "\n"


def _compare(rows: list[Row], threads: int) -> list[str]:
    """The targets, and how many of the rows that they speak of reach them."""
    for row in rows:
        if row["threads"] == 1 and (other := _with_threads(threads, row, rows)):
            other["times one thread"] = row["milliseconds"] / other["milliseconds"]
    lines = [
        "### Against the targets",
        "",
        "From the least to the most of all rows that a target speaks of, and how many of them reach it.",
        "",
        f"| target | asked | one thread | {threads} threads |",
        "| --- | --- | --- | --- |",
    ]
    for told, least, measure in TARGETS:
        cells = []
        for count in (1, threads):
            found = sorted(value for row in rows if row["threads"] == count and (value := measure(row)) is not None)
            reached = sum(value >= least for value in found)
            cells.append(f"{found[0]:.2f} to {found[-1]:.2f}, {reached} of {len(found)}" if found else "-")
        lines.append(f"| {told} | {least} | {' | '.join(cells)} |")
    return lines


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
