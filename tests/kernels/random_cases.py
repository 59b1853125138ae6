"""Random calls of the attention ops, with what they have to give: the same for every backend.

A case is made from its seed alone. Whatever memory a call may not read is filled with 0xFF bytes, which are NaN in
every float format and in every scale, and entries of block tables that it may not follow lead far out of the caches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpass.kernels.formats.cache_formats import FORMATS
from kvpass.kernels.reference import naive
from tests.kernels.format_bounds import BOUNDS, ROUNDINGS, Allowance, Rounding, worst_part
from tests.kernels.format_definitions import make_cache, read_cache, split_cache
from tests.kernels.settled_cases import paired, settled_caches

BEYOND = 10**9  # a block id that nobody may follow
ATTENTIONS = ("paged_attention", "paged_attention_stats", "latent_attention", "cascade_attention")
HEADS = (
    (1, 1), (2, 1), (4, 4), (4, 2), (6, 2), (8, 1), (3, 3), (5, 5), (8, 2), (8, 8), (7, 1), (16, 1), (20, 1),
)  # fmt: skip
DIMS = (16, 24, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256, 288, 320, 576)
LATENTS = (48, 72, 80, 96, 128, 576)
SIZES = (16, 32, 64)
WIDE = 128  # wider heads are rarer, and mostly in 16 bits


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

    def check(self, kernel: Callable[..., Any], rounding: Rounding = ROUNDINGS["reference"]) -> float:
        """Call ``kernel`` and compare; outputs are NaN before they are written.

        Returns:
            the largest error as a part of its bound.
        """
        got = with_poisoned_outputs(kernel, **self.arguments)
        outputs, allowed = got if isinstance(got, tuple) else (got,), rounding.allow(self.arguments)
        worst, pairs = 0.0, zip(outputs, self.wanted(), strict=True)
        for part, (found, want) in zip(Allowance._fields, pairs, strict=False):
            bound = rounding.bound(want, found.dtype, getattr(allowed, part))
            worst = max(worst, worst_part(found, want, bound, f"{self.told}: {part}"))
        return worst


def with_poisoned_outputs(kernel: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call ``kernel`` while new memory is NaN until it is written."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return kernel(*arguments, **named)
    finally:
        torch.use_deterministic_algorithms(deterministic)


def poison_slabs(numbers: Tensor, written: Tensor, name: str) -> Tensor:
    """A cache ``[B, H, P, W]`` of ``numbers [B, H, P, D]``, 0xFF in slots that are not ``written`` (bool [B, P])."""
    cache = make_cache(numbers, name).contiguous()
    for part in split_cache(cache, name):
        if part is not None:
            part.masked_fill_(~written[:, None, :, None], 255)
    return cache


def draw_dims(pick: random.Random, formats: tuple[str, str]) -> tuple[int, int]:
    """Head dims of keys and values; settling formats need a multiple of 16 for keys."""
    most = DIMS[-1] if pick.random() < 0.15 else WIDE
    dims = [pick.choice([dim for dim in DIMS if dim <= most]) for _ in range(2)]
    if pick.random() < 0.5:
        dims[1] = dims[0]
    return -(-dims[0] // 16) * 16 if formats[0] == "k4" else dims[0], dims[1]


def draw_dtype(pick: random.Random, formats: tuple[str, str], widest: int) -> torch.dtype:
    """A query's dtype: of wide heads mostly that of their caches, or 16 bits, which more kernels serve."""
    dtype = pick.choice(list(BOUNDS))
    if widest > WIDE and pick.random() < 0.8:
        plain = [getattr(torch, name) for name in formats if name in ("float32", "float16", "bfloat16")]
        dtype = pick.choice(plain or [torch.float16, torch.bfloat16])
    return dtype


def name_formats(pick: random.Random, formats: dict[str, str]) -> dict[str, str]:
    """Format arguments: those of float formats may be left out."""
    return {key: name for key, name in formats.items() if FORMATS[name].coded or pick.random() < 0.5}


def attention_case(seed: int, op: str, key_format: str, value_format: str, wanted: Collection[str] = ()) -> Case:
    """A random attention over caches of the two formats (of the first alone, if latent: int8 for one that settles).

    It has the features that are ``wanted``, and by chance others; "tree_mask" and "strides" of the query count as such.
    """
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    size, latent, cascade = pick.choice(SIZES), op == "latent_attention", op == "cascade_attention"
    if latent:
        key_format = value_format = "int8" if FORMATS[key_format].settles else key_format
    formats = paired(key_format, value_format)
    heads, kv_heads = (pick.choice((1, 4, 16, 24)), 1) if latent else pick.choice(HEADS)
    dims = _draw_latent(pick) if latent else draw_dims(pick, formats)
    lengths, counts, groups = _draw_cascade(pick, size) if cascade else (*_draw_lengths(pick), [])
    tables = draw_tables(pick, lengths, size)
    shared = _share_blocks(pick, tables, groups, size) if cascade else {}
    blocks = sum(-(-length // size) for length in lengths) + 5
    written = mark_written(tables, lengths, size, blocks)
    rows = [_draw_rows(pick, generator, (blocks, kv_heads, size, dim)) for dim in dims[: 1 if latent else 2]]
    followed = tables
    if formats[0] == "k4":
        stored, numbers, ids = settled_caches((rows[0], rows[1]), written, generator)
        followed = torch.where(tables < BEYOND, ids[tables.clamp(max=blocks - 1)], BEYOND)
    else:
        stored = [poison_slabs(part, written, name) for part, name in zip(rows, formats, strict=False)]
        numbers = [read_cache(cache, name) for cache, name in zip(stored, formats, strict=False)]
    dtype, starts = draw_dtype(pick, formats, max(dims)), torch.tensor([0, *counts]).cumsum(0)
    query = torch.randn(heads, int(starts[-1]), dims[0], generator=generator).to(dtype).transpose(0, 1)
    query = query if pick.random() < 0.2 or "strides" in wanted else query.contiguous()
    features = _draw_features(pick, generator, heads, max(lengths), cascade, wanted)
    if op.startswith("paged"):
        features["tree_mask"] = _draw_tree(pick, counts) if pick.random() < 0.35 or "tree_mask" in wanted else None
    step = {"seq_lens": torch.tensor(lengths), "query_start": starts, "scale": dims[0] ** -0.5, **features}
    if not cascade:
        followed = _forget_blocks(followed, lengths, counts, size, features)
    common = {"query": query, "block_tables": followed, **step}
    naively = {"query": query, "block_tables": tables, **step, **shared}
    if latent:
        naively |= {"cache": numbers[0], "value_dim": dims[1]}
        given = {**common, "cache": stored[0], "value_dim": dims[1], **name_formats(pick, {"format": key_format})}
    else:
        naively |= {"key_cache": numbers[0], "value_cache": numbers[1]}
        named = name_formats(pick, dict(zip(("key_format", "value_format"), formats, strict=True)))
        given = {**common, **shared, "key_cache": stored[0], "value_cache": stored[1], **named}
    if op == "paged_attention_stats":
        given["mass"] = pick.random() < 0.7
    oracle = getattr(naive, op)

    def truth() -> tuple[Tensor, ...]:
        found = oracle(**naively)
        found = found if isinstance(found, tuple) else (found,)
        return found if given.get("mass", True) else (*found[:2], torch.zeros(0, dtype=torch.float64))

    told = f"{op}, seed {seed}: {', '.join(formats)}, heads {heads}/{kv_heads}, dims {dims}, blocks of {size}, "
    told += f"lengths {lengths}, new {counts}, {dtype}, {sorted(k for k, v in features.items() if v is not None)}"
    return Case(op, given, truth, told)


def draw_tables(pick: random.Random, lengths: list[int], size: int) -> Tensor:
    """Block tables ``[N, W]`` in random order."""
    needed = [-(-length // size) for length in lengths]
    order = list(range(sum(needed) + 4))
    pick.shuffle(order)
    tables = torch.full((len(lengths), max(needed) + pick.choice((0, 1))), BEYOND)
    for n, count in enumerate(needed):
        tables[n, :count] = torch.tensor([order.pop() for _ in range(count)])
    return tables


def mark_written(tables: Tensor, lengths: list[int], size: int, blocks: int) -> Tensor:
    """bool ``[blocks, size]``: the slots that hold tokens."""
    written = torch.zeros(blocks, size, dtype=torch.bool)
    for n, length in enumerate(lengths):
        k = torch.arange(length)
        written[tables[n, k // size], k % size] = True
    return written


def _draw_latent(pick: random.Random) -> tuple[int, int]:
    """Widths of the rows, and of their part that is the value."""
    width = pick.choice(LATENTS)
    return width, pick.choice((width, width * 2 // 3, width - 16, 512 if width == 576 else 32))


def _draw_lengths(pick: random.Random) -> tuple[list[int], list[int]]:
    """Lengths and new tokens of each sequence."""
    kind, longest = pick.choice(("decode", "decode", "prefill", "mixed", "some")), pick.choice((20, 90, 200))
    lengths = [pick.choice((1, 7, 16, 33, 64, 90, pick.randint(0, longest))) for _ in range(pick.randint(1, 4))]
    lengths[0] += lengths[0] == 0
    counts = []
    for length in lengths:
        most = {"decode": 1, "prefill": length, "mixed": pick.choice((0, 1, length)), "some": min(length, 24)}[kind]
        most = min(most, length)
        least = 0 if kind == "some" else min(1, most)
        counts.append(pick.randint(least, most) if most < 30 else pick.choice((1, 9, min(most // 2, 45))))
    if not sum(counts):
        counts[0] = 1
    return lengths, counts


def _draw_cascade(pick: random.Random, size: int) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Lengths and new tokens of each sequence, and of each group its sequences and the blocks that they share."""
    groups = [(pick.randint(1, 3), pick.randint(0, 3)) for _ in range(pick.randint(1, 2))]
    lengths, counts = [], []
    for members, blocks in groups:
        for _ in range(members):
            counts.append(pick.choice((0, 1, 1, 1, 5)))
            lengths.append(blocks * size + counts[-1] + pick.randint(0, 40))
    if not sum(counts):
        counts[0], lengths[0] = 1, lengths[0] + 1
    return lengths, counts, groups


def _share_blocks(pick: random.Random, tables: Tensor, groups: list[tuple[int, int]], size: int) -> dict[str, Tensor]:
    """Let groups begin with the same blocks, and say so, or sometimes less than is true."""
    starts, told, first = [0], [], 0
    for members, blocks in groups:
        tables[first : first + members, :blocks] = tables[first, :blocks].clone()
        first += members
        starts.append(first)
        told.append((pick.randint(0, blocks) if pick.random() < 0.2 else blocks) * size)
    return {"shared_start": torch.tensor(starts), "shared_lens": torch.tensor(told)}


def _draw_rows(pick: random.Random, generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Keys or values of several magnitudes, with dims that stand out in some tokens."""
    rows = torch.randn(shape, generator=generator) * pick.choice((0.5, 1.0, 3.0))
    if pick.random() < 0.5:
        rows *= torch.exp(torch.randn(*shape[:3], 1, generator=generator) * 0.5)
    rows[:, :, :: pick.choice((2, 5)), : shape[3] // 4] *= pick.choice((0.0, 1.0, 4.0))
    return rows


def _draw_features(
    pick: random.Random, generator: torch.Generator, heads: int, longest: int, cascade: bool, wanted: Collection[str]
) -> dict[str, Any]:
    bias, reach = None, longest + 3
    if pick.random() < 0.3 or "bias" in wanted:
        shape = (pick.choice((1, heads)), *[longest + pick.choice((0, 3))] * pick.choice((1, 2)))
        bias = torch.randn(shape, generator=generator)
        bias = bias.masked_fill(torch.rand(shape, generator=generator) < pick.choice((0.2, 0.9)), -torch.inf)
    features: dict[str, Any] = {
        "softcap": pick.choice((None, None, 4.0, 30.0, pick.uniform(1, 20))),
        "window": pick.choice((None, None, None, 1, 6, 200, pick.randint(1, reach))),
        "slopes": torch.rand(heads, generator=generator) if pick.random() < 0.3 or "slopes" in wanted else None,
        "sinks": torch.randn(heads, generator=generator) * pick.choice((1, 3))
        if pick.random() < 0.3 or "sinks" in wanted
        else None,
        "bias": bias,
        "chunk": pick.choice((None, None, None, None, 8, 32, pick.randint(1, reach))),
    }
    if cascade and pick.random() < 0.8:  # with these, it is a paged attention
        features |= {"window": None, "chunk": None}
    for name, values in (("softcap", (4.0, 30.0)), ("window", (3, 6)), ("chunk", (8, 12))):
        if name in wanted:
            features[name] = pick.choice(values)
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


def _forget_blocks(
    tables: Tensor, lengths: list[int], counts: list[int], size: int, features: dict[str, Any]
) -> Tensor:
    """The tables without the blocks that no query of this step sees: they may belong to somebody else by now."""
    tables, window, chunk = tables.clone(), features["window"], features["chunk"]
    for n, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        oldest, seen = length - count, [0]
        if features.get("tree_mask") is not None:
            oldest = max(0, oldest - 1)
        if window is not None:
            seen.append(oldest - window + 1)
        if chunk is not None:
            seen.append(oldest // chunk * chunk)
        tables[n, : max(seen) // size if count else None] = BEYOND
    return tables
