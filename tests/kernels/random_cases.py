"""Random calls of the ops, with what they have to give: the same for every backend.

A case is made from its seed alone. Whatever memory a call may not read is filled with 0xFF bytes, which are NaN in
every float format and in every scale.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpass.kernels import naive
from kvpass.kernels.formats import FORMATS, SCALE_BYTES, CacheFormat, pack_slabs, split_slabs, unpack_slabs
from tests.kernels.settled_cases import paired, settled_caches

BEYOND = 10**9  # a block id that nobody may follow
ATTENTIONS = ("paged_attention", "paged_attention_stats", "latent_attention", "cascade_attention")
HEADS = ((4, 4), (6, 2), (8, 1), (3, 3), (8, 2))
DIMS = (16, 24, 40, 64, 80, 128, 256)
LATENTS = ((64, 16), (48, 24), (96, 32), (512, 64))
BOUNDS = {  # relative, absolute; of the half precisions the final rounding, so sums must have been float32
    torch.float32: (3e-5, 3e-6),
    torch.float16: (2.0**-10, 2e-5),
    torch.bfloat16: (2.0**-8, 2e-5),
}


@dataclass
class Case:
    """One call of an op.

    Attributes:
        op: its name.
        arguments: by name, as the op takes them.
        wanted: gives what the op has to return, in float64, as a tuple.
        told: what was drawn, for the message of a failure.
    """

    op: str
    arguments: dict[str, Any]
    wanted: Callable[[], tuple[Tensor, ...]]
    told: str

    def check(self, kernel: Callable[..., Any], slack: float = 1.0) -> None:
        """Call ``kernel`` and compare, with ``slack`` times the bounds; outputs are NaN before they are written."""
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            got = kernel(**self.arguments)
        finally:
            torch.use_deterministic_algorithms(deterministic)
        outputs, wanted = got if isinstance(got, tuple) else (got,), self.wanted()
        for found, want in zip(outputs, wanted, strict=True):
            relative, absolute = (slack * bound for bound in BOUNDS[found.dtype])
            largest = want.nan_to_num(0.0, 0.0, 0.0).abs().flatten()
            absolute = max(absolute, slack * 2e-6 * largest.max().item() if len(largest) else 0.0)  # sums cancel
            torch.testing.assert_close(
                found.double(), want, rtol=relative, atol=absolute, msg=lambda text: f"{self.told}\n{text}"
            )


def poison_slabs(numbers: Tensor, written: Tensor, form: CacheFormat) -> Tensor:
    """A cache ``[B, H, P, W]`` of ``numbers [B, H, P, D]``, 0xFF in slots that are not ``written`` (bool [B, P])."""
    stored = pack_slabs(numbers, form).contiguous()
    if form.scaled:
        for part in split_slabs(stored, form):
            part.masked_fill_(~written[:, None, :, None], 255)
    else:
        rows = stored.view(torch.uint8).view(*numbers.shape[:3], -1)
        rows.masked_fill_(~written[:, None, :, None], 255)
    return stored


def attention_case(seed: int, op: str, key_format: str, value_format: str) -> Case:
    """A random attention over caches of the two formats (of the first alone, if latent: int8 for one that settles)."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    size, latent = pick.choice((16, 32, 64)), op == "latent_attention"
    if latent:
        key_format = value_format = "int8" if FORMATS[key_format].settles else key_format
    key_format, value_format = paired(key_format, value_format)
    heads, kv_heads = (pick.choice((1, 4, 16)), 1) if latent else pick.choice(HEADS)
    value_dim, rotary = pick.choice(LATENTS)
    dims = (value_dim + rotary, value_dim) if latent else (pick.choice(DIMS), pick.choice(DIMS))
    if key_format == "k4":
        dims = (-(-dims[0] // 16) * 16, dims[1])
    counts, lengths = _draw_lengths(pick)
    tables, shared = _draw_tables(pick, lengths, counts, size, cascade=op == "cascade_attention")
    blocks = int(tables[tables < BEYOND].max()) + 3
    written = torch.zeros(blocks, size, dtype=torch.bool)
    for n, length in enumerate(lengths):
        k = torch.arange(length)
        written[tables[n, k // size], k % size] = True
    drawn, stored, numbers = [], [], []
    for dim, name in zip(dims, (key_format, value_format), strict=True):
        rows = torch.randn(blocks, kv_heads, size, dim, generator=generator) * pick.choice((0.5, 1.0, 3.0))
        rows[:, :, :: pick.choice((2, 5)), : dim // 4] *= pick.choice((0.0, 1.0, 4.0))
        drawn.append(rows)
        if name not in ("k4", "v2"):
            stored.append(poison_slabs(rows, written, FORMATS[name]))
            numbers.append(unpack_slabs(stored[-1], FORMATS[name]).double())
    followed = tables
    if key_format == "k4":
        stored, numbers, ids = settled_caches((drawn[0], drawn[1]), written, generator)
        followed = torch.where(tables < BEYOND, ids[tables.clamp(max=blocks - 1)], BEYOND)
    dtype = pick.choice(list(BOUNDS))
    starts = torch.tensor([0, *counts]).cumsum(0)
    query = torch.randn(int(starts[-1]), heads, dims[0], generator=generator).to(dtype)
    step = {"block_tables": tables, "seq_lens": torch.tensor(lengths), "query_start": starts}
    features = _draw_features(pick, generator, heads, max(lengths), counts, tree=op.startswith("paged"))
    common = {"query": query, "scale": dims[0] ** -0.5, **step, **features}
    naively = {**common, **({} if latent else {"key_cache": numbers[0], "value_cache": numbers[1]})}
    common["block_tables"] = followed
    told = f"{op}, seed {seed}: {key_format}, {value_format}, heads {heads}/{kv_heads}, dims {dims}, blocks of {size}, "
    told += f"lengths {lengths}, new {counts}, {dtype}, {sorted(k for k, v in features.items() if v is not None)}"
    if latent:
        naively |= {"cache": numbers[0], "value_dim": value_dim}
        given = {**common, "cache": stored[0], "value_dim": value_dim, "format": key_format}
    else:
        given = {**common, "key_cache": stored[0], "value_cache": stored[1]}
        given |= {"key_format": key_format, "value_format": value_format}
    if op == "cascade_attention":
        given |= shared
        naively |= shared
    if op == "paged_attention_stats":
        given["mass"] = pick.random() < 0.7
    oracle = getattr(naive, op)

    def wanted() -> tuple[Tensor, ...]:
        found = oracle(**naively)
        found = found if isinstance(found, tuple) else (found,)
        return found if given.get("mass", True) else (*found[:2], torch.zeros(0, dtype=torch.float64))

    return Case(op, given, wanted, told)


def _draw_lengths(pick: random.Random) -> tuple[list[int], list[int]]:
    """New tokens and lengths of each sequence."""
    kind = pick.choice(("decode", "decode", "prefill", "mixed"))
    lengths = [pick.choice((1, 7, 16, 33, 64, 90)) for _ in range(pick.randint(1, 4))]
    counts = []
    for length in lengths:
        most = {"decode": 1, "prefill": length, "mixed": pick.choice((0, 1, length))}[kind]
        counts.append(pick.randint(min(1, most), most) if most < 30 else pick.choice((1, 9, most // 2)))
    if not sum(counts):
        counts[0] = 1
    return counts, lengths


def _draw_tables(
    pick: random.Random, lengths: list[int], counts: list[int], size: int, cascade: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Block tables ``[N, W]`` in random order; for a cascade groups of sequences that begin with the same blocks."""
    needed = [-(-length // size) for length in lengths]
    order = list(range(sum(needed) + 4))
    pick.shuffle(order)
    tables = torch.full((len(lengths), max(needed) + 1), BEYOND)
    for n, count in enumerate(needed):
        tables[n, :count] = torch.tensor([order.pop() for _ in range(count)])
    if not cascade:
        return tables, {}
    starts, shared = [0], []
    while starts[-1] < len(lengths):
        first, last = starts[-1], pick.randint(starts[-1] + 1, len(lengths))
        most = min((length - count) // size for length, count in list(zip(lengths, counts, strict=True))[first:last])
        blocks = pick.randint(0, most)
        tables[first:last, :blocks] = tables[first, :blocks].clone()
        starts.append(last)
        shared.append(blocks * size)
    return tables, {"shared_start": torch.tensor(starts), "shared_lens": torch.tensor(shared)}


def _draw_features(
    pick: random.Random, generator: torch.Generator, heads: int, longest: int, counts: list[int], tree: bool
) -> dict[str, Any]:
    bias = None
    if pick.random() < 0.3:
        shape = (pick.choice((1, heads)), *[longest + pick.choice((0, 3))] * pick.choice((1, 2)))
        bias = torch.randn(shape, generator=generator)
        bias = bias.masked_fill(torch.rand(shape, generator=generator) < 0.2, -torch.inf)
    features: dict[str, Any] = {
        "softcap": pick.choice((None, None, 4.0, 30.0)),
        "window": pick.choice((None, None, 1, 6, 20, 200)),
        "slopes": torch.rand(heads, generator=generator) if pick.random() < 0.3 else None,
        "sinks": torch.randn(heads, generator=generator) if pick.random() < 0.3 else None,
        "bias": bias,
        "chunk": pick.choice((None, None, None, 8, 20, 32)),
    }
    if tree:
        features["tree_mask"] = _draw_tree(pick, counts) if pick.random() < 0.35 else None
    return features


def _draw_tree(pick: random.Random, counts: list[int]) -> Tensor:
    """bool ``[T, M]``: trees, each node after its parent; columns past a sequence's step are set at random."""
    width = max(counts) + pick.choice((0, 2))
    mask = torch.zeros(sum(counts), width, dtype=torch.bool)
    row = 0
    for count in counts:
        for j in range(count):
            parent = pick.randint(-1, j - 1)
            if parent >= 0:
                mask[row + j] = mask[row + parent]
            mask[row + j, j] = True
        for j in range(count):
            mask[row + j, count:] = pick.random() < 0.5
        row += count
    return mask


def allowed_error(rows: Tensor, name: str) -> Tensor:
    """Largest error that a format may make of each number of ``rows [..., D]``, float64; see :func:`rounding_error`."""
    rows = rows.double().abs()
    if FORMATS[name].scaled:
        return (rows.amax(-1, keepdim=True) / {"int8": 127, "int4": 7}[name] / 2 * 1.0001 + 1e-44).expand_as(rows)
    # half a unit in the last place, and half of the smallest number that there is
    bits, smallest = {
        "float32": (24, 0.0),
        "bfloat16": (8, 2.0**-133),
        "float16": (11, 2.0**-24),
        "fp8_e4m3": (4, 2.0**-9),
        "fp8_e5m2": (3, 2.0**-16),
    }[name]
    return rows * 2.0**-bits * 1.0001 + smallest / 2


def rounding_error(error: Tensor, name: str) -> Tensor:
    """Errors ``[..., D]`` in the sense of a format's bound: each by itself, or of int4 the RMS of its row.

    int4 may cut off its largest number where that makes all others better.
    """
    return error.square().mean(-1, keepdim=True).sqrt().expand_as(error) if name == "int4" else error.abs()


def written_slots(cache: Tensor, slots: Tensor, form: CacheFormat) -> Tensor:
    """bool of the bytes of a cache, ``[B, H, ...]``: those that belong to ``slots [T]``."""
    blocks, heads, size, width = cache.shape
    written = torch.zeros(blocks * size, dtype=torch.bool)
    written[slots] = True
    row = written.view(blocks, 1, size, 1).expand(blocks, heads, size, 1)
    if not form.scaled:
        return row.expand(blocks, heads, size, width * cache.dtype.itemsize).flatten(2)
    parts = (row.expand(blocks, heads, size, width - SCALE_BYTES), row.expand(blocks, heads, size, SCALE_BYTES))
    return torch.cat([part.flatten(2) for part in parts], 2)
