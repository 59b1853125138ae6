"""Random calls of the ops that fill, move and read back caches, each with its check: the same for every backend."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvpass.kernels.formats.cache_formats import FORMATS
from kvpass.kernels.formats.settling import read_blocks, wide_view
from kvpass.kernels.reference import naive
from tests.kernels.format_bounds import BOUNDS, ROUNDINGS, Rounding, allowed_error, rounding_error, worst_part
from tests.kernels.format_definitions import FLOATS, decode, encode, read_cache, split_cache
from tests.kernels.random_cases import (
    BEYOND,
    HEADS,
    SIZES,
    draw_dims,
    draw_tables,
    mark_written,
    name_formats,
    poison_slabs,
    with_poisoned_outputs,
)
from tests.kernels.settled_cases import allowed_errors, paired, settled_caches

WIDE_BLOCKS, NARROW_BLOCKS = 5, 7  # of a cache that settles

Kernel = Callable[..., Any]


def check_write_cache(
    kernel: Kernel, seed: int, key_format: str, value_format: str, rounding: Rounding = ROUNDINGS["reference"]
) -> float:
    """The slots hold what the formats' definitions say, within their bounds, and no other byte has changed."""
    formats, pick = paired(key_format, value_format), random.Random(seed + 1)
    new, caches, slots = _draw_write(seed, formats)
    if pick.random() < 0.2:
        new[pick.randrange(2)][-1, -1, -1] = pick.choice((torch.inf, -torch.inf, torch.nan))
    before = [cache.clone() for cache in caches]
    kernel(*new, *caches, slots, **name_formats(pick, dict(zip(("key_format", "value_format"), formats, strict=True))))
    worst = 0.0
    for rows, cache, old, name in zip(new, caches, before, formats, strict=True):
        told = f"write_cache, seed {seed}: {tuple(rows.shape)} in {rows.dtype} to {name}, blocks of {cache.shape[2]}"
        worst = max(worst, _check_written(rows, cache, old, slots, name, rounding, 0.0, told))
        _check_defined(rows, cache, slots, name, rounding, told)
    return worst


def check_norm_rotary_write(
    kernel: Kernel, seed: int, key_format: str, value_format: str, rounding: Rounding = ROUNDINGS["reference"]
) -> float:
    """The slots hold keys, normed and rotated, and values, within the bounds; and the query comes back so."""
    formats = paired(key_format, value_format)
    pick, generator = random.Random(seed + 1), torch.Generator().manual_seed(seed + 1)
    (key, value), caches, slots = _draw_write(seed, formats)
    key, value = (x.clamp(-9, 9) for x in (key, value))
    tokens, heads, width = key.shape
    query = torch.randn(tokens, heads * pick.choice((1, 2, 4)), width, generator=generator).to(key.dtype)
    weights = [torch.rand(width, generator=generator) + 0.5 if pick.random() < 0.6 else None for _ in range(2)]
    rotary = pick.choice((0, width, width // 2, 8))
    angles = torch.rand(tokens, rotary, generator=generator) * 6
    cos, sin = (angles.cos(), angles.sin()) if rotary else (None, None)
    interleaved, before = pick.random() < 0.5, [cache.clone() for cache in caches]
    named = name_formats(pick, dict(zip(("key_format", "value_format"), formats, strict=True)))
    operands = (query, key, value, *caches, slots, *weights, 1e-5, cos, sin)
    got = with_poisoned_outputs(kernel, *operands, interleaved=interleaved, **named)
    told = f"norm_rotary_write, seed {seed}: {formats}, {tuple(query.shape)} in {query.dtype}, rotary {rotary}"
    want = naive.norm_rotary(query, weights[0], 1e-5, cos, sin, interleaved)
    worst = worst_part(got, want, rounding.bound(want, query.dtype), told)
    rows = naive.norm_rotary(key, weights[1], 1e-5, cos, sin, interleaved)
    slack = rows.abs().amax().item() * 1e-5
    worst = max(worst, _check_written(rows, caches[0], before[0], slots, formats[0], rounding, slack, told))
    return max(worst, _check_written(value, caches[1], before[1], slots, formats[1], rounding, 0.0, told))


def check_gather_cache(
    kernel: Kernel, seed: int, name: str, _: str = "", rounding: Rounding = ROUNDINGS["reference"]
) -> float:
    """What is gathered is what the slabs stand for, and zeros past the ends."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    size, heads, (dim, _) = pick.choice(SIZES), pick.choice((1, 2, 3)), draw_dims(pick, ("k4", "v2"))
    lengths = [pick.randint(0, pick.choice((100, 200))) for _ in range(pick.randint(1, 4))]
    tables = draw_tables(pick, lengths, size)
    written = mark_written(tables, lengths, size, sum(-(-length // size) for length in lengths) + 5)
    numbers = torch.randn(len(written), heads, size, dim, generator=generator)
    followed = tables
    if FORMATS[name].settles:
        caches, stored, ids = settled_caches((numbers, numbers), written, generator)
        cache, held = (pair[name == "v2"] for pair in (caches, stored))
        followed = torch.where(tables < BEYOND, ids[tables.clamp(max=len(ids) - 1)], BEYOND)
    else:
        cache = poison_slabs(numbers, written, name)
        held = read_cache(cache, name)
    arguments = (cache, followed, torch.tensor(lengths), dim)
    got = with_poisoned_outputs(kernel, *arguments, **name_formats(pick, {"format": name}))
    assert got.dtype is torch.float32
    want = naive.gather_cache(held, tables, torch.tensor(lengths))
    told = f"gather_cache, seed {seed}: {name}, {heads} heads of {dim}, blocks of {size}, lengths {lengths}"
    return worst_part(got, want, want.abs() * 2e-7, told)


def check_copy_blocks(
    kernel: Kernel, seed: int, key_format: str, value_format: str, rounding: Rounding = ROUNDINGS["reference"]
) -> float:
    """Blocks are copied byte by byte, exchanged ones too, and no other byte has changed."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    _, caches, _ = _draw_write(seed, paired(key_format, value_format))
    blocks = min(cache.shape[0] for cache in caches)
    count = pick.randint(0, blocks)
    source = torch.randint(blocks, (count,), generator=generator)
    target = torch.randperm(blocks, generator=generator)[:count]
    wanted = [cache.clone() for cache in caches]
    for cache, want in zip(caches, wanted, strict=True):
        for i, j in zip(source.tolist(), target.tolist(), strict=True):
            want.view(torch.uint8)[j] = cache.view(torch.uint8)[i]
    kernel(caches, source, target)
    for cache, want in zip(caches, wanted, strict=True):
        assert torch.equal(cache.view(torch.uint8), want.view(torch.uint8)), f"copy_blocks, seed {seed}: other bytes"
    return 0.0


def check_settle_blocks(
    kernel: Kernel, seed: int, key_format: str, value_format: str, rounding: Rounding = ROUNDINGS["reference"]
) -> float:
    """Wide blocks settle within the bounds, others are copied byte by byte, and no other byte has changed."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    (key, value), caches, _ = _draw_write(seed, ("k4", "v2"))
    size, heads = caches[0].shape[2], key.shape[1]
    formats = ["k4", "v2"]
    for cache, name, dim in zip(caches, formats, (key.shape[2], value.shape[2]), strict=True):
        rows = torch.randn(WIDE_BLOCKS, heads, size, dim, generator=generator) * 2.0 ** pick.randint(-20, 20)
        rows[:, :, :, pick.randrange(dim)] *= 20
        rows[:, :, pick.randrange(size)] *= pick.choice((0.0, 1e-3, 20.0))
        wide_view(cache, FORMATS[name])[-WIDE_BLOCKS:] = rows.bfloat16()
    source, target = -1 - torch.randperm(WIDE_BLOCKS, generator=generator), -1 - torch.arange(WIDE_BLOCKS)
    settled = torch.arange(WIDE_BLOCKS) < pick.randint(1, WIDE_BLOCKS)
    target = torch.where(settled, torch.randperm(NARROW_BLOCKS, generator=generator)[:WIDE_BLOCKS], target)
    wanted = [cache.clone() for cache in caches]
    for want, cache, name in zip(wanted, caches, formats, strict=True):
        form = FORMATS[name]
        wide_view(want, form)[target[~settled]] = wide_view(cache, form)[source[~settled]]
    rows = [wide_view(cache, FORMATS[name])[source[settled]] for cache, name in zip(caches, formats, strict=True)]
    kernel(caches, formats, source, target)
    worst = 0.0
    for want, cache, name, old in zip(wanted, caches, formats, rows, strict=True):
        numbers = read_blocks(cache, FORMATS[name], target[settled]).double()
        error, allowed = (numbers - old.double()).abs(), allowed_errors(old, name)
        assert (error <= allowed).all(), f"seed {seed}: {name} is off by {float((error - allowed).max()):.2e} too much"
        mean = error.square().mean(-1).sqrt() <= old.double().abs().amax(-1) * (0.26 if name == "v2" else 1)
        assert mean.all(), f"seed {seed}: {name} is off on average"
        worst = max(worst, (error / allowed.clamp(min=1e-300)).max().item())
        want[target[settled]] = cache[target[settled]]
    for want, cache in zip(wanted, caches, strict=True):
        assert torch.equal(want, cache), f"settle_blocks, seed {seed}: other bytes have changed"
    return worst


CHECKS: dict[str, Callable[..., float]] = {  # called with kernel, seed, two formats, rounding
    "write_cache": check_write_cache,
    "norm_rotary_write": check_norm_rotary_write,
    "gather_cache": check_gather_cache,
    "copy_blocks": check_copy_blocks,
    "settle_blocks": check_settle_blocks,
}


def _draw_write(seed: int, formats: tuple[str, str]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """New keys and values, strided in two ways, caches of random bytes, and slots."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    size, (_, heads), tokens = pick.choice(SIZES), pick.choice(HEADS), pick.choice((1, 5, 40, pick.randint(1, 40)))
    blocks = -(-tokens // size) + 2
    slots, dtype = torch.randperm(blocks * size, generator=generator)[:tokens], pick.choice(list(BOUNDS))
    if formats[0] == "k4":  # written in wide blocks
        slots -= blocks * size
    new, caches = [], []
    for dim, name in zip(draw_dims(pick, formats), formats, strict=True):
        form = FORMATS[name]
        rows = torch.randn(heads, tokens, dim + pick.choice((0, 3)), generator=generator).to(dtype)
        rows = rows.transpose(0, 1)[..., :dim]
        if pick.random() < 0.5:
            rows *= torch.exp(torch.randn(tokens, heads, 1, generator=generator) * 2).to(dtype)
        rows[pick.randrange(tokens)] *= pick.choice((0.0, 1e-3, 20.0))
        new.append(rows)
        width = form.stored_width(dim) * form.dtype.itemsize
        total = len(form.allocate(NARROW_BLOCKS, heads, size, dim, "meta", max(blocks, WIDE_BLOCKS)))
        shape = (total if form.settles else blocks, heads, size, width)
        noise = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        caches.append(noise.view(form.dtype))
    return new, caches, slots


def _as_written(cache: Tensor, slots: Tensor, name: str) -> tuple[Tensor, Tensor, str]:
    """What is written to a cache that settles: its wide blocks, the slots there, and their format."""
    if not FORMATS[name].settles:
        return cache, slots, name
    cache = wide_view(cache, FORMATS[name])
    return cache, slots + len(cache) * cache.shape[2], "bfloat16"


def _rows_of(cache: Tensor, slots: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
    """Bytes of the rows in ``slots [T]``, and of their tails."""
    size = cache.shape[2]
    elements, tails = (
        None if part is None else part[slots // size, :, slots % size] for part in split_cache(cache, name)
    )
    assert elements is not None
    return elements, tails


def _check_written(
    rows: Tensor, cache: Tensor, old: Tensor, slots: Tensor, name: str, rounding: Rounding, slack: float, told: str
) -> float:
    """Rows within the bound of the format plus ``slack``, and no other byte changed."""
    (cache, slots, stored), (old, *_) = _as_written(cache, slots, name), _as_written(old, slots, name)
    form, wanted = FORMATS[stored], rows.double()
    numbers = decode(*_rows_of(cache, slots, stored), stored)
    finite = wanted.isfinite().all(-1, keepdim=True).expand_as(wanted)
    assert not numbers.isfinite()[~finite].all() or finite.all(), f"{told}: a number that is not finite does not show"
    wanted = torch.where(finite, wanted, 0.0)
    if form.largest is not None and not form.scaled:
        wanted = wanted.clamp(-form.largest, form.largest)
    error = rounding_error(torch.where(finite, numbers - wanted, 0.0), stored)
    factor = rounding.bfloat16 / BOUNDS[torch.bfloat16][0] if stored == "bfloat16" else 1.0
    bound = allowed_error(wanted, stored) * factor + slack
    worst = worst_part(error, torch.zeros_like(error), bound, f"{told}: rounding to {name}")
    for now, before in zip(split_cache(cache, stored), split_cache(old, stored), strict=True):
        if now is not None and before is not None:
            same = (now == before).all(-1)
            same[slots // cache.shape[2], :, slots % cache.shape[2]] = True
            assert same.all(), f"{told}: bytes outside of the slots have changed"
    return worst


def _check_defined(rows: Tensor, cache: Tensor, slots: Tensor, name: str, rounding: Rounding, told: str) -> None:
    """Rows byte for byte as the format's definition stores them; of int4, as good.

    Which of two trials wins that are all but equal is a matter of rounding, and so is to which of two bfloat16 numbers
    an offset goes that lies halfway: half a step of it may be a few hundredths of the error.
    """
    cache, slots, name = _as_written(cache, slots, name)
    got, want = _rows_of(cache, slots, name), encode(rows, name)
    numbers, wanted = (decode(*each, name) for each in (got, want))
    same = numbers == wanted
    if name == "bfloat16" and rounding.bfloat16 > BOUNDS[torch.bfloat16][0]:
        same |= (numbers - wanted).abs() <= wanted.abs() * rounding.bfloat16
    elif name == "int4":
        errors = [(each - rows.double()).square().sum(-1, keepdim=True) for each in (numbers, wanted)]
        same |= errors[0] <= errors[1] * 1.05 + 1e-30
    elif name not in FLOATS:
        same = (got[0] == want[0]) & same
    same |= numbers.isnan() & wanted.isnan()
    assert same.all(), f"{told}: {int((~same).sum())} stored numbers of {name} differ from the definition's"
