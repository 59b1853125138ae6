"""Time the Triton kernels on a GPU, against what else is there.

    python benchmarks/gpu_kernels.py --output benchmarks/results/gpu_kernels.json

Every figure is the median over replays of one CUDA graph that holds several calls. The calls read caches of their own,
which together are several times the size of the L2 cache, so that each call finds it cold. The read bandwidth that
figures are compared with is measured in the same run. Peers: torch's SDPA and flex_attention on contiguous caches, and
flashinfer and flash-attn where they can be imported. Under ten minutes on one H200.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpass.kernels.formats.cache_formats import FORMATS

try:
    from kvpass.kernels.triton_kernels.launch import backend
except ImportError as error:
    sys.exit(f"the Triton kernels cannot be loaded: {error}. Install kvpass[gpu]")

DEVICE = "cuda"
COLD = 4  # times the L2 cache that a graph reads at least
REPLAYS = 15


class Shape(NamedTuple):
    """A batch of equally long sequences, ``new`` tokens of each being queries."""

    sequences: int
    length: int
    heads: int
    kv_heads: int
    width: int
    block_size: int = 16
    new: int = 1

    @property
    def label(self) -> str:
        step = "" if self.new == 1 else f" prefill {self.new}"
        heads = f"{self.heads}/{self.kv_heads}"
        return f"{self.sequences} x {self.length}{step}, heads {heads}, dim {self.width}, block {self.block_size}"

    def cache_bytes(self, form: str) -> int:
        """Bytes of keys and values that one call reads."""
        return 2 * self.sequences * self.length * FORMATS[form].bytes_per_token(self.kv_heads, self.width)


DECODE = [
    Shape(64, 8192, 32, 8, 128, 16), Shape(64, 8192, 32, 8, 128, 64), Shape(8, 4096, 32, 8, 128),
    Shape(1, 32768, 32, 8, 128), Shape(64, 512, 32, 8, 128), Shape(8, 4096, 32, 32, 128), Shape(8, 4096, 32, 8, 64),
]  # fmt: skip
PREFILL = [Shape(1, 4608, 32, 8, 128, 16, 512), Shape(8, 4608, 32, 8, 128, 64, 512)]


def time_calls(calls: list[Callable[[], object]]) -> float:
    """Seconds of one call: the median over replays of a graph of all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (calls[0], calls[-1], calls[0]):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times = []
    for replay in range(REPLAYS + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if replay >= 2:
            times.append(start.elapsed_time(stop) / 1e3 / len(calls))
    del kept
    return statistics.median(times)


def measure_bandwidth() -> float:
    """Bytes per second of the fastest of a few plain reads of 8 GB."""
    data = torch.ones(2 << 30, dtype=torch.float32, device=DEVICE)
    found = []
    for view in (data, data.view(torch.int32), data.view(1 << 15, -1)):
        found.append(data.nbytes / time_calls([lambda v=view: torch.amax(v)]))
    return max(found)


def copies_for(size: int) -> int:
    """How many caches of ``size`` bytes make the L2 cache cold for each."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, math.ceil(COLD * cache / size)))


def random_cache(form: str, blocks: int, heads: int, size: int, width: int) -> Tensor:
    """Blocks of random numbers in a format."""
    row = FORMATS[form]
    cache = row.allocate(blocks, heads, size, width, DEVICE)
    step = max(1, (1 << 28) // (heads * size * width))
    for first in range(0, blocks, step):
        count = min(step, blocks - first)
        rows = torch.randn(count * size, heads, width, device=DEVICE, dtype=torch.bfloat16)
        slots = torch.arange(first * size, (first + count) * size, device=DEVICE)
        name = row.name
        backend.write_cache(rows, rows, cache, cache, slots, name, name)
    return cache


def make_step(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Shuffled block tables, lengths, query starts."""
    width = -(-shape.length // shape.block_size)
    tables = torch.randperm(shape.sequences * width, device=DEVICE).view(shape.sequences, width)
    lens = torch.full((shape.sequences,), shape.length, device=DEVICE)
    return tables, lens, torch.arange(0, shape.sequences * shape.new + 1, shape.new, device=DEVICE)


def attention_calls(shape: Shape, form: str) -> list[Callable[[], object]]:
    """Paged attention on as many caches as it takes."""
    tables, lens, starts = make_step(shape)
    query = torch.randn(shape.sequences * shape.new, shape.heads, shape.width, device=DEVICE, dtype=torch.bfloat16)
    calls: list[Callable[[], object]] = []
    scale = shape.width**-0.5
    for _ in range(copies_for(shape.cache_bytes(form))):
        keys, values = (
            random_cache(form, tables.numel(), shape.kv_heads, shape.block_size, shape.width) for _ in range(2)
        )
        calls.append(
            lambda k=keys, v=values: backend.paged_attention(
                query, k, v, tables, lens, starts, scale, key_format=form, value_format=form
            )
        )
    return calls


def contiguous(shape: Shape) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries ``[N, Hq, new, D]`` with keys and values ``[N, Hkv, L, D]``, for the peers."""
    q, *kv = ((shape.heads, shape.new), (shape.kv_heads, shape.length), (shape.kv_heads, shape.length))
    made = []
    for _ in range(copies_for(shape.cache_bytes("bfloat16"))):
        made.append(tuple(
            torch.randn(shape.sequences, *one, shape.width, device=DEVICE, dtype=torch.bfloat16) for one in (q, *kv)
        ))  # fmt: skip
    return made  # type: ignore[return-value]


def peer_times(shape: Shape, flex: bool) -> dict[str, float]:
    """Seconds of a call of each peer, in bfloat16."""
    found: dict[str, float] = {}
    data = contiguous(shape)
    mask = None
    if shape.new > 1:
        mask = torch.ones(shape.new, shape.length, dtype=torch.bool, device=DEVICE).tril(shape.length - shape.new)

    def note(name: str, make: Callable[[Tensor, Tensor, Tensor], Callable[[], object]]) -> None:
        try:
            found[name] = time_calls([make(*one) for one in data])
        except Exception as error:
            print(f"  {name}: {type(error).__name__} {str(error).splitlines()[0][:100]}")

    note("sdpa", lambda q, k, v: lambda: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True))
    if flex:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        past = shape.length - shape.new
        blocks = create_block_mask(lambda b, h, q, k: k <= q + past, None, None, shape.new, shape.length, DEVICE)
        compiled = torch.compile(flex_attention)
        note("flex_attention", lambda q, k, v: lambda: compiled(q, k, v, block_mask=blocks, enable_gqa=True))
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_with_kvcache

        def flash(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
            q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
            return lambda: flash_attn_with_kvcache(q, k, v, causal=True)

        note("flash_attn", flash)
    if importlib.util.find_spec("flashinfer") and shape.new == 1:
        note("flashinfer", flashinfer_decode(shape))
    return found


def flashinfer_decode(shape: Shape) -> Callable[[Tensor, Tensor, Tensor], Callable[[], object]]:
    """flashinfer's batch decode over the same pages."""
    import flashinfer

    width = shape.length // shape.block_size
    order = torch.randperm(shape.sequences * width, device=DEVICE, dtype=torch.int32)
    starts = torch.arange(0, (shape.sequences + 1) * width, width, device=DEVICE, dtype=torch.int32)
    last = torch.full((shape.sequences,), shape.block_size, device=DEVICE, dtype=torch.int32)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE), "HND", use_cuda_graph=True,
        use_tensor_cores=shape.heads > shape.kv_heads, paged_kv_indptr_buffer=starts, paged_kv_indices_buffer=order,
        paged_kv_last_page_len_buffer=last,
    )  # fmt: skip
    wrapper.plan(starts, order, last, shape.heads, shape.kv_heads, shape.width, shape.block_size,
                 q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)  # fmt: skip

    def make(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
        pages = tuple(x.reshape(-1, shape.kv_heads, shape.block_size, shape.width) for x in (k, v))
        rows = q.squeeze(2)
        return lambda: wrapper.run(rows, pages)

    return make


class Run:
    """The rows of a run, printed as they come."""

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth, self.rows = bandwidth, list[dict[str, Any]]()

    def note(self, what: str, who: str, seconds: float, size: int, base: float | None = None) -> float:
        rate = size / seconds
        row = {"what": what, "who": who, "microseconds": seconds * 1e6, "gigabytes_per_second": rate / 1e9}
        row |= {"part_of_bandwidth": rate / self.bandwidth, "speedup": None if base is None else base / seconds}
        self.rows.append(row)
        ratio = "" if base is None else f"  x{base / seconds:.2f}"
        print(f"{what:58} {who:16} {seconds * 1e6:10.1f} us {rate / 1e9:7.0f} GB/s {rate / self.bandwidth:6.1%}{ratio}")
        sys.stdout.flush()
        return seconds

    def attention(self, shape: Shape, formats: list[str], flex: bool) -> None:
        """Each format, with its speed against bfloat16, and the peers with theirs."""
        base = None
        for form in formats:
            seconds = self.note(
                shape.label, form, time_calls(attention_calls(shape, form)), shape.cache_bytes(form), base
            )
            base = base or seconds
            torch.cuda.empty_cache()
        for name, seconds in peer_times(shape, flex).items():
            self.note(shape.label, name, seconds, shape.cache_bytes("bfloat16"), base)
        torch.cuda.empty_cache()

    def latent(self, heads: int, form: str, base: float | None) -> float:
        """Absorbed latent attention, 512 + 64."""
        shape = Shape(64, 4096, heads, 1, 576, 64)
        size = shape.cache_bytes(form) // 2
        tables, lens, starts = make_step(shape)
        query = torch.randn(64, heads, 576, device=DEVICE, dtype=torch.bfloat16)
        caches = [random_cache(form, tables.numel(), 1, 64, 576) for _ in range(copies_for(size))]
        calls: list[Callable[[], object]] = [
            lambda c=cache: backend.latent_attention(query, c, tables, lens, starts, 0.1, 512, format=form)
            for cache in caches
        ]
        return self.note(f"latent 64 x 4096, {heads} heads, 512 + 64", form, time_calls(calls), size, base)

    def cascade(self) -> None:
        """64 sequences with 8192 shared tokens and 128 of their own."""
        shape = Shape(64, 8320, 32, 8, 128, 16)
        tables, lens, starts = make_step(shape)
        tables[:, : 8192 // 16] = tables[0, : 8192 // 16]
        shared = torch.tensor([0, 64], device=DEVICE), torch.tensor([8192], device=DEVICE)
        query = torch.randn(64, 32, 128, device=DEVICE, dtype=torch.bfloat16)
        step, blocks = (tables, lens, starts), (8192 + 64 * 128) // 16
        tables[:] = tables.unique(return_inverse=True)[1]  # as many blocks as are in use
        once = 2 * blocks * 16 * FORMATS["bfloat16"].bytes_per_token(8, 128)
        caches = [
            tuple(random_cache("bfloat16", blocks, 8, 16, 128) for _ in range(2)) for _ in range(copies_for(once))
        ]
        plain = time_calls([lambda k=k, v=v: backend.paged_attention(query, k, v, *step, 0.1) for k, v in caches])
        self.note("shared prefix 64 x (8192 + 128)", "paged", plain, shape.cache_bytes("bfloat16"))
        joined = time_calls(
            [lambda k=k, v=v: backend.cascade_attention(query, k, v, *step, *shared, 0.1) for k, v in caches]
        )
        self.note("shared prefix 64 x (8192 + 128)", "cascade", joined, once, plain)

    def write(self, form: str, tokens: int) -> None:
        """Norm, rotary and write in one launch, against the same in torch and a plain write."""
        heads, kv_heads, width = 32, 8, 128
        query, key, value = (
            torch.randn(tokens, count, width, device=DEVICE, dtype=torch.bfloat16)
            for count in (heads, kv_heads, kv_heads)
        )
        cos, sin = (torch.randn(tokens, width, device=DEVICE) for _ in range(2))
        weight = torch.ones(width, device=DEVICE, dtype=torch.bfloat16)
        slots = torch.randperm(1 << 16, device=DEVICE)[:tokens]
        caches = [FORMATS[form].allocate(1 << 12, kv_heads, 16, width, DEVICE) for _ in range(2)]

        def turn(x: Tensor) -> Tensor:
            x = F.rms_norm(x, (width,), weight, 1e-6)
            half = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), 2)
            return (x * cos[:, None] + half * sin[:, None]).to(x.dtype)

        def apart() -> object:
            rows = turn(query)
            backend.write_cache(turn(key), value, *caches, slots, form, form)
            return rows

        def together() -> object:
            return backend.norm_rotary_write(
                query, key, value, *caches, slots, weight, weight, 1e-6, cos, sin, False, form, form
            )

        size = 2 * query.nbytes + 2 * key.nbytes + tokens * 2 * FORMATS[form].bytes_per_token(kv_heads, width)
        what = f"norm + rotary + write, {tokens} tokens, {form}"
        base = self.note(what, "torch, then write", time_calls([apart] * 4), size)
        self.note(what, "one launch", time_calls([together] * 4), size, base)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="the first shape of each kind, three formats, no flex")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured", file=sys.stderr)
        return 2
    began = time.time()
    torch.manual_seed(0)
    run = Run(measure_bandwidth())
    torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}: reads {run.bandwidth / 1e9:.0f} GB/s")
    small = ["bfloat16", "int8", "int4"]
    every = ["bfloat16", "fp8_e4m3", "int8", "int4"]
    for index, shape in enumerate(DECODE[:1] if options.quick else DECODE):
        formats = small if options.quick else [*every, "fp8_e5m2", "float16", "float32"] if index == 2 else every
        run.attention(shape, formats, flex=index == 2 and not options.quick)
    for shape in PREFILL[:1] if options.quick else PREFILL:
        run.attention(shape, small, flex=False)
    for heads in (16,) if options.quick else (16, 128):
        base = run.latent(heads, "bfloat16", None)
        for form in small[1:] if options.quick else every[1:]:
            run.latent(heads, form, base)
    run.cascade()
    for tokens in (64, 4096):
        run.write("int8", tokens)
    packages = ("torch", "triton", "flashinfer-python", "flash-attn")
    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    found = {
        "device": torch.cuda.get_device_name(), "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
        "versions": {name: importlib.metadata.version(name) for name in packages if name in installed},
        "read_bandwidth_gigabytes_per_second": run.bandwidth / 1e9, "seconds": round(time.time() - began),
        "rows": run.rows,
    }  # fmt: skip
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
