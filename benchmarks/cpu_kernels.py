"""The native CPU kernels against memory, and against torch's own attention, in the same run.

Every figure is a median of repeated calls over caches too large for the processor's caches, of those made while the
machine was quiet (see `quiet_timing.py`); the fraction of bandwidth is that of a sequential read between the calls.
The roofline of a row is the longer of two times: to read the cache once at that bandwidth, and to multiply at the speed
of a matrix product of torch in the query's dtype, measured in the same run. `of bound` is the part of the roofline that
the kernel reaches. `in cache` is the least time of the same call where all blocks are one, so that no memory is waited
for. For a cascade, the roofline of the same step without sharing says by how much sharing can be quicker.

`packed bmm` is the torch backend of kvpass. SDPA and flex_attention are given contiguous keys and values, which they
need not gather; they have no cache formats, so only the bfloat16 and float32 rows have them.

    python benchmarks/cpu_kernels.py [--quick] [--threads 1 2] [--page]
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cpu_kernels_page import rewrite
from quiet_timing import Probe, Timings, time_quietly
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvpass.cli.terminal import output
from kvpass.kernels.cpu import backend, loader
from kvpass.kernels.formats.cache_formats import FORMATS, pack_slabs
from kvpass.kernels.formats.settling import settle_slabs, wide_view
from kvpass.kernels.reference import backend as reference
from kvpass.quality.measure import CLOCKS, write_result

Clock = Callable[[], float]

READ_BYTES = 512 << 20
DECODE = ("bfloat16", "float32", "float16", "fp8_e4m3", "fp8_e5m2", "int8", "int4", "k4v2")
ROUNDS = 8  # in which the formats of a shape take turns
WIDE_BLOCKS = (0, -2, -1)  # of a sequence, in k4v2: the first and the newest


@dataclass
class Shape:
    """One row of the table.

    Attributes:
        name: as printed.
        op: the op.
        sequences: number of sequences, N.
        length: tokens of each, the new ones included.
        new: new tokens of each.
        heads: query heads and KV heads.
        dims: widths of keys and values.
        shared: tokens at the beginning that all sequences share.
        formats: cache formats to run.
    """

    name: str
    op: str
    sequences: int
    length: int
    heads: tuple[int, int]
    dims: tuple[int, int]
    new: int = 1
    shared: int = 0
    formats: tuple[str, ...] = ("bfloat16", "int8", "int4")
    more: dict[str, Any] = field(default_factory=dict)


SHAPES = (
    Shape("decode 8 x 4096", "paged_attention", 8, 4096, (32, 8), (128, 128), formats=DECODE),
    Shape("decode 8 x 4096", "paged_attention", 8, 4096, (32, 32), (64, 64)),
    Shape("decode 8 x 4096", "paged_attention", 8, 4096, (32, 8), (64, 64)),
    Shape("decode 1 x 32768", "paged_attention", 1, 32768, (32, 8), (128, 128)),
    Shape("decode 64 x 512", "paged_attention", 64, 512, (32, 8), (128, 128)),
    Shape("latent 8 x 4096, 16 heads", "latent_attention", 8, 4096, (16, 1), (576, 512), more={"value_dim": 512}),
    Shape("latent 1 x 4096, 128 heads", "latent_attention", 1, 4096, (128, 1), (576, 512), more={"value_dim": 512}),
    Shape(
        "prefill 512 on 4096", "paged_attention", 1, 4608, (32, 8), (128, 128), new=512, formats=("float32", "bfloat16")
    ),
    Shape("cascade 64 x (8192 + 128)", "cascade_attention", 64, 8320, (32, 8), (128, 128), shared=8192),
)  # fmt: skip
QUICK = (0, 5, 7)
SHOWN = {
    "heads": "heads",
    "dims": "dims",
    "format": "format",
    "threads": "threads",
    "ms": "milliseconds",
    "GB/s": "gigabytes_per_second",
    "of read": "fraction",
    "memory ms": "memory_milliseconds",
    "arithmetic ms": "arithmetic_milliseconds",
    "in cache ms": "in_cache_milliseconds",
    "of bound": "fraction_of_bound",
    "x bf16": "times_bfloat16",
}
PAGE = Path(__file__).parents[1] / "docs" / "kernels-cpu.md"
PEAK_SIZE = 1024  # of the square matrices whose product is the peak


def read_bandwidth(memory: Tensor, clock: Clock) -> float:
    """GB/s of a sequential read with torch's threads."""
    start = clock()
    memory.sum()
    return memory.numel() * 4 / (clock() - start) / 1e9


@functools.cache
def peak_speed(dtype: torch.dtype, threads: int, clock: Clock) -> float:
    """GFLOP/s of a matrix product with this many threads: the best of several, as it is a bound."""
    torch.set_num_threads(threads)
    left, right = (torch.randn(PEAK_SIZE, PEAK_SIZE).to(dtype) for _ in range(2))
    return 2 * PEAK_SIZE**3 / min(time_calls(lambda: left @ right, 20, 1.0, clock)) / 1e9


def count_flops(shape: Shape) -> float:
    """Multiplications and additions of queries with keys and of weights with values, that nothing can save."""
    seen = shape.length - (shape.new - 1) / 2  # keys of a query on average
    return 2.0 * shape.sequences * shape.new * shape.heads[0] * seen * sum(shape.dims)


def roofline(
    shape: Shape, cache_bytes: int, dtype: torch.dtype, threads: int, read: float, clock: Clock
) -> dict[str, Any]:
    """The least milliseconds that bandwidth and arithmetic allow, and which of them decides."""
    peak = peak_speed(dtype, threads, clock)
    memory, arithmetic = cache_bytes / read / 1e6, count_flops(shape) / peak / 1e6
    found: dict[str, Any] = {
        "peak_gigaflops": round(peak, 1),
        "memory_milliseconds": round(memory, 3),
        "arithmetic_milliseconds": round(arithmetic, 3),
        "bound_by": "memory" if memory > arithmetic else "arithmetic",
    }
    if shape.shared:
        tokens = shape.shared + shape.sequences * (shape.length - shape.shared)
        alone = memory * shape.sequences * shape.length / tokens
        found["possible times without sharing"] = round(max(alone, arithmetic) / max(memory, arithmetic), 2)
    return found


def make_cache(name: str, blocks: int, heads: int, size: int, dim: int) -> Tensor:
    """A cache of random rows; 64 of the blocks are drawn, the others repeat them."""
    form = FORMATS[name]
    cache = form.allocate(blocks, heads, size, dim, "cpu")
    drawn = pack_slabs(torch.randn(64, heads, size, dim), form).view(torch.uint8)
    for first in range(0, blocks, 64):
        part = cache[first : first + 64].view(torch.uint8)
        part.copy_(drawn[: len(part)])
    return cache


def make_settled(shape: Shape, size: int, tables: Tensor) -> tuple[list[Tensor], Tensor]:
    """k4v2 caches of keys and values, of as many blocks as the tables have, and these blocks' numbers in them."""
    count, width = tables.shape
    narrow, wide = count * (width - len(WIDE_BLOCKS)), count * len(WIDE_BLOCKS)
    numbers = torch.empty_like(tables)
    middle = torch.ones(width, dtype=torch.bool)
    middle[list(WIDE_BLOCKS)] = False
    numbers[:, middle] = torch.randperm(narrow).view(count, -1)
    numbers[:, ~middle] = -1 - torch.randperm(wide).view(count, -1)
    caches = []
    for dim, name in zip(shape.dims, ("k4", "v2"), strict=True):
        cache = FORMATS[name].allocate(narrow, shape.heads[1], size, dim, "cpu", wide)
        drawn = settle_slabs(torch.randn(64, shape.heads[1], size, dim), FORMATS[name])
        for first in range(0, narrow, 64):
            part = cache[first : min(first + 64, narrow)]
            part.copy_(drawn[: len(part)])
        wide_view(cache, FORMATS[name])[-wide:] = torch.randn(wide, shape.heads[1], size, dim).bfloat16()
        caches.append(cache)
    return caches, numbers


def make_call(shape: Shape, name: str, size: int) -> tuple[dict[str, Any], int]:
    """The op's arguments, and the bytes of cache that it has to read at least once."""
    torch.manual_seed(0)
    count, dtype = shape.sequences, torch.float32 if name == "float32" else torch.bfloat16
    width, shared = shape.length // size, shape.shared // size
    blocks = shared + count * (width - shared)
    order = torch.randperm(blocks)
    tables = torch.cat((order[:shared].expand(count, shared), order[shared:].view(count, width - shared)), 1)
    arguments: dict[str, Any] = {
        "query": torch.randn(count * shape.new, shape.heads[0], shape.dims[0]).to(dtype),
        "block_tables": tables.contiguous(),
        "seq_lens": torch.full((count,), shape.length),
        "query_start": torch.arange(count + 1) * shape.new,
        "scale": shape.dims[0] ** -0.5,
        **shape.more,
    }
    if shape.op == "latent_attention":
        cache = make_cache(name, blocks, 1, size, shape.dims[0])
        return {**arguments, "cache": cache, "format": name}, cache.numel() * cache.element_size()
    formats = ("k4", "v2") if name == "k4v2" else (name, name)
    if name == "k4v2":
        caches, arguments["block_tables"] = make_settled(shape, size, tables)
    else:
        caches = [make_cache(name, blocks, shape.heads[1], size, dim) for dim in shape.dims]
    arguments |= dict(zip(("key_cache", "value_cache", "key_format", "value_format"), (*caches, *formats), strict=True))
    if shape.shared:
        arguments |= {"shared_start": torch.tensor([0, count]), "shared_lens": torch.tensor([shape.shared])}
    return arguments, sum(cache.numel() * cache.element_size() for cache in caches)


def peers_of(shape: Shape, name: str, arguments: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What else computes the same, ready to be called."""
    peers: dict[str, Callable[[], Any]] = {}
    if shape.op != "cascade_attention":
        peers["packed bmm"] = functools.partial(getattr(reference, shape.op), **arguments)
    else:
        alone = {k: v for k, v in arguments.items() if not k.startswith("shared")}
        peers["without sharing"] = functools.partial(backend.paged_attention, **alone)
    if name not in ("bfloat16", "float32") or shape.op != "paged_attention":
        return peers
    heads, dims, dtype = shape.heads, shape.dims, arguments["query"].dtype
    keys, values = (torch.randn(shape.sequences, heads[1], shape.length, dim, dtype=dtype) for dim in dims)
    query = torch.randn(shape.sequences, heads[0], shape.new, dims[0], dtype=dtype)
    mask = None
    if shape.new > 1:
        mask = torch.ones(shape.new, shape.length, dtype=torch.bool).tril(shape.length - shape.new)
    whole = [part.repeat_interleave(heads[0] // heads[1], 1) for part in (keys, values)]
    peers["SDPA"] = functools.partial(sdpa, query, *whole, attn_mask=mask)
    if heads[0] != heads[1]:
        peers["SDPA enable_gqa"] = functools.partial(sdpa, query, keys, values, attn_mask=mask, enable_gqa=True)
    if shape.new == 1 and shape.sequences * shape.heads[1] == 64:  # one compilation of it takes half a minute
        peers["flex_attention"] = functools.partial(compiled_flex(), query, keys, values, enable_gqa=True)
    return peers


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def time_calls(call: Callable[[], Any], repeats: int, seconds: float, clock: Clock) -> list[float]:
    """Seconds of each call after one to warm up; fewer calls when they take long."""
    call()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < repeats and (not times or time.perf_counter() - start < seconds):
        before = clock()
        call()
        times.append(clock() - before)
    return times


@dataclass
class Timed:
    """A kernel's calls on one cache format, and the reads of memory that took turns with them."""

    name: str
    threads: int
    arguments: dict[str, Any]
    cache_bytes: int
    kernel: Callable[[], Any]
    near: Callable[[], Any]
    reads: list[float] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    near_times: list[float] = field(default_factory=list)


def measure(
    shape: Shape, threads: list[int], size: int, repeats: int, memory: Tensor, clock: Clock
) -> list[dict[str, Any]]:
    """Rows of results, for each number of threads one for each format.

    Formats, threads and reads take turns, since others use the machine as well.
    """
    timed, op = [], getattr(backend, shape.op)
    for name in shape.formats:
        arguments, cache_bytes = make_call(shape, name, size)
        same = {**arguments, "block_tables": torch.zeros_like(arguments["block_tables"])}
        calls = functools.partial(op, **arguments), functools.partial(op, **same)
        timed += [Timed(name, count, arguments, cache_bytes, *calls) for count in threads]
    probes = {count: Probe(count, clock) for count in threads}
    for _ in range(ROUNDS):
        for one in timed:
            torch.set_num_threads(one.threads)
            one.reads.append(max(read_bandwidth(memory, clock) for _ in range(2)))
            time_quietly(one.kernel, -(-repeats // ROUNDS), probes[one.threads], one.timings)
            if shape.new == 1:
                one.near_times += time_calls(one.near, 2, 0.5, clock)
    rows = []
    for one in sorted(timed, key=lambda each: each.threads):
        row = describe(shape, size, one, clock)
        torch.set_num_threads(one.threads)
        for peer, call in peers_of(shape, one.name, one.arguments).items() if one.name in DECODE[:2] else ():
            try:
                took = statistics.median(time_quietly(call, 3, probes[one.threads], Timings()).chosen())
            except Exception as error:  # a peer that cannot run here says why in the JSON
                row[f"no {peer}"] = type(error).__name__
                continue
            row[f"times {peer}"] = round(took * 1e3 / row["milliseconds"], 2)
        rows.append(row)
    for row in rows:
        base = [r["milliseconds"] for r in rows if r["format"] == "bfloat16" and r["threads"] == row["threads"]]
        row["times_bfloat16"] = round(base[0] / row["milliseconds"], 2) if base else None
    return rows


def describe(shape: Shape, size: int, one: Timed, clock: Clock) -> dict[str, Any]:
    """What was measured of a format, beside what is possible."""
    times, read = one.timings.chosen(), statistics.median(one.reads)
    median = statistics.median(times)
    row: dict[str, Any] = {
        "shape": shape.name,
        "heads": list(shape.heads),
        "dims": list(shape.dims),
        "block_size": size,
        "format": one.name,
        "threads": one.threads,
        "milliseconds": round(median * 1e3, 3),
        "best_milliseconds": round(min(times) * 1e3, 3),
        "quiet_calls": len(one.timings.quiet),
        "noisy_calls": len(one.timings.noisy),
        "gigabytes_per_second": round(one.cache_bytes / median / 1e9, 2),
        "sequential_read": round(read, 2),
        "fraction": round(one.cache_bytes / median / 1e9 / read, 3),
        **roofline(shape, one.cache_bytes, one.arguments["query"].dtype, one.threads, read, clock),
    }
    if one.near_times:
        row["in_cache_milliseconds"] = round(min(one.near_times) * 1e3, 3)  # a bound
    bound = max(row["memory_milliseconds"], row["arithmetic_milliseconds"])
    row["fraction_of_bound"] = round(bound / row["milliseconds"], 3)
    return row


def cells_of(row: dict[str, Any]) -> tuple[str, ...]:
    """A row as it is printed."""
    peers = ", ".join(f"{name.removeprefix('times ')} {row[name]}" for name in row if name.startswith("times "))
    if "possible times without sharing" in row:
        peers += f" (of {row['possible times without sharing']} possible)"
    heads, dims = ("/".join(map(str, row[name])) for name in ("heads", "dims"))
    return row["shape"], heads, dims, *(str(row.get(name) or "-") for name in list(SHOWN.values())[2:]), peers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three shapes only")
    parser.add_argument("--shapes", type=int, nargs="*", help="numbers of the shapes to run")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, torch.get_num_threads()])
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=24)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="on a busy machine: processor, with one thread")
    parser.add_argument("--name", default="cpu_kernels", help="name of the JSON")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    parser.add_argument("--page", type=Path, nargs="?", const=PAGE, help="write the digest into this page of docs/")
    options = parser.parse_args()
    clock = CLOCKS[options.clock]
    memory = torch.ones(READ_BYTES // 4)
    rows: list[dict[str, Any]] = []
    for number in options.shapes or (QUICK if options.quick else range(len(SHAPES))):
        threads = list(dict.fromkeys(options.threads))
        for row in measure(SHAPES[number], threads, options.block_size, options.repeats, memory, clock):
            output().print(", ".join((*cells_of(row)[:6], f"peers: {cells_of(row)[-1] or 'none'}")))
            rows.append(row)
    table = Table(title=f"CPU kernels, level {loader.supported_levels()[-1]}, blocks of {options.block_size} tokens")
    for name in ("shape", *SHOWN, "peers"):
        table.add_column(name, justify="left" if name in ("shape", "peers") else "right")
    for row in rows:
        table.add_row(*cells_of(row))
    output().print(table)
    chosen = {"block_size": options.block_size, "repeats": options.repeats, "clock": options.clock}
    written = write_result(options.results, options.name, chosen, rows)
    output().print(f"written to {written}", soft_wrap=True)
    if options.page:
        rewrite(options.page, json.loads(written.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
