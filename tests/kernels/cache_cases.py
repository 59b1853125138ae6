"""Random calls of the ops that fill, move and read back caches, each with its check: the same for every backend."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvpass.kernels import naive
from kvpass.kernels.formats import FORMATS, unpack_slabs
from kvpass.kernels.settling import read_blocks, wide_view
from tests.kernels.random_cases import BEYOND, BOUNDS, DIMS, allowed_error, poison_slabs, rounding_error, written_slots
from tests.kernels.settled_cases import allowed_errors, paired, settled_caches

WIDE_BLOCKS, NARROW_BLOCKS = 5, 7  # of a cache that settles

Kernel = Callable[..., Any]


def check_write_cache(kernel: Kernel, seed: int, key_format: str, value_format: str) -> None:
    """The slots hold what was written within the formats' bounds, and no other byte has changed."""
    key_format, value_format = paired(key_format, value_format)
    new, caches, slots = _draw_write(seed, key_format, value_format)
    before = [cache.clone() for cache in caches]
    kernel(*new, *caches, slots, key_format=key_format, value_format=value_format)
    for rows, cache, old, name in zip(new, caches, before, (key_format, value_format), strict=True):
        _check_written(rows, cache, old, slots, name, torch.zeros(()))


def check_norm_rotary_write(kernel: Kernel, seed: int, key_format: str, value_format: str) -> None:
    """The same, of keys that were normed and rotated; and the query comes back so."""
    key_format, value_format = paired(key_format, value_format)
    pick, generator = random.Random(seed + 1), torch.Generator().manual_seed(seed + 1)
    (key, value), caches, slots = _draw_write(seed, key_format, value_format)
    tokens, heads, width = key.shape
    query = torch.randn(tokens, heads * pick.choice((1, 4)), width, generator=generator).to(key.dtype)
    weights = [torch.rand(width, generator=generator) + 0.5 if pick.random() < 0.6 else None for _ in range(2)]
    rotary = pick.choice((0, width, width // 2, 8))
    angles = torch.rand(tokens, rotary, generator=generator) * 6
    cos, sin = (angles.cos(), angles.sin()) if rotary else (None, None)
    interleaved, before = pick.random() < 0.5, [cache.clone() for cache in caches]
    options = {"interleaved": interleaved, "key_format": key_format, "value_format": value_format}
    got = kernel(query, key, value, *caches, slots, *weights, 1e-5, cos, sin, **options)
    want = naive.norm_rotary(query, weights[0], 1e-5, cos, sin, interleaved)
    relative, absolute = BOUNDS[query.dtype]
    torch.testing.assert_close(got.double(), want, rtol=relative, atol=absolute, msg=lambda t: f"seed {seed}\n{t}")
    rows = naive.norm_rotary(key, weights[1], 1e-5, cos, sin, interleaved)
    _check_written(rows, caches[0], before[0], slots, key_format, rows.abs().amax() * 1e-5)
    _check_written(value, caches[1], before[1], slots, value_format, torch.zeros(()))


def check_gather_cache(kernel: Kernel, seed: int, name: str, _: str = "") -> None:
    """What is gathered is what the slabs stand for, and zeros past the ends."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    size, heads, dim = pick.choice((16, 32, 64)), pick.choice((1, 2, 3)), pick.choice(DIMS)
    lengths = [pick.randint(0, 100) for _ in range(pick.randint(1, 4))]
    columns = -(-max(lengths) // size) + 1
    order = torch.randperm(len(lengths) * columns + 2, generator=generator)
    tables = torch.full((len(lengths), columns), BEYOND)
    written = torch.zeros(len(order), size, dtype=torch.bool)
    for n, length in enumerate(lengths):
        used = -(-length // size)
        tables[n, :used], order = order[:used], order[used:]
        k = torch.arange(length)
        written[tables[n, k // size], k % size] = True
    if FORMATS[name].settles:
        dim = -(-dim // 16) * 16
    numbers = torch.randn(len(written), heads, size, dim, generator=generator)
    if FORMATS[name].settles:
        caches, stored, ids = settled_caches((numbers, numbers), written, generator)
        cache, held = (pair[name == "v2"] for pair in (caches, stored))
        followed = torch.where(tables < BEYOND, ids[tables.clamp(max=len(ids) - 1)], BEYOND)
    else:
        cache, followed = poison_slabs(numbers, written, FORMATS[name]), tables
        held = unpack_slabs(cache, FORMATS[name])
    got = kernel(cache, followed, torch.tensor(lengths), dim, format=name)
    assert got.dtype is torch.float32
    want = naive.gather_cache(held, tables, torch.tensor(lengths))
    torch.testing.assert_close(got.double(), want, rtol=2e-7, atol=0, msg=lambda t: f"seed {seed}\n{t}")


def check_copy_blocks(kernel: Kernel, seed: int, key_format: str, value_format: str) -> None:
    """Blocks are copied byte by byte, exchanged ones too, and no other byte has changed."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    _, caches, _ = _draw_write(seed, *paired(key_format, value_format))
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
        assert torch.equal(cache.view(torch.uint8), want.view(torch.uint8)), f"seed {seed}"


def check_settle_blocks(kernel: Kernel, seed: int, key_format: str, value_format: str) -> None:
    """Wide blocks settle within the bounds, others are copied byte by byte, and no other byte has changed."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    (key, value), caches, _ = _draw_write(seed, "k4", "v2")
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
    for want, cache, name, old in zip(wanted, caches, formats, rows, strict=True):
        numbers = read_blocks(cache, FORMATS[name], target[settled]).double()
        error, allowed = (numbers - old.double()).abs(), allowed_errors(old, name)
        assert (error <= allowed).all(), f"seed {seed}: {name} is off by {float((error - allowed).max()):.2e} too much"
        mean = error.square().mean(-1).sqrt() <= old.double().abs().amax(-1) * (0.26 if name == "v2" else 1)
        assert mean.all(), f"seed {seed}: {name} is off on average"
        want[target[settled]] = cache[target[settled]]
    for want, cache in zip(wanted, caches, strict=True):
        assert torch.equal(want, cache), f"seed {seed}: other bytes have changed"


CHECKS: dict[str, Callable[[Kernel, int, str, str], None]] = {
    "write_cache": check_write_cache,
    "norm_rotary_write": check_norm_rotary_write,
    "gather_cache": check_gather_cache,
    "copy_blocks": check_copy_blocks,
    "settle_blocks": check_settle_blocks,
}


def _draw_write(seed: int, key_format: str, value_format: str) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """New keys and values, caches of random bytes, and slots."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    size, heads, tokens = pick.choice((16, 32, 64)), pick.choice((1, 2, 8)), pick.choice((1, 5, 40))
    blocks = -(-tokens // size) + 2
    slots, dtype = torch.randperm(blocks * size, generator=generator)[:tokens], pick.choice(list(BOUNDS))
    if key_format == "k4":  # written in wide blocks
        slots -= blocks * size
    new, caches = [], []
    for name in (key_format, value_format):
        dim, form = pick.choice(DIMS), FORMATS[name]
        if form.settles:
            dim = -(-dim // 16) * 16
        rows = torch.randn(heads, tokens, dim, generator=generator).to(dtype).transpose(0, 1)
        rows[pick.randrange(tokens)] *= pick.choice((0.0, 1e-3, 20.0))
        new.append(rows)
        width = form.stored_width(dim) * form.dtype.itemsize
        total = len(form.allocate(NARROW_BLOCKS, heads, size, dim, "meta", max(blocks, WIDE_BLOCKS)))
        shape = (total if form.settles else blocks, heads, size, width)
        noise = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        caches.append(noise.view(form.dtype))
    return new, caches, slots


def _check_written(rows: Tensor, cache: Tensor, old: Tensor, slots: Tensor, name: str, slack: Tensor) -> None:
    form, size = FORMATS[name], cache.shape[2]
    if form.settles:  # as a cache of bfloat16
        cache, old = wide_view(cache, form), wide_view(old, form)
        slots, name, form = slots + len(cache) * size, "bfloat16", FORMATS["bfloat16"]
    numbers = unpack_slabs(cache, form)[slots // size, :, slots % size].double()
    error, allowed = rounding_error(numbers - rows.double(), name), allowed_error(rows, name) + slack
    if form.largest is not None and not form.scaled:
        error = (numbers - rows.double().clamp(-form.largest, form.largest)).abs()
    assert (error <= allowed).all(), f"{name}: error {float((error - allowed).max()):.2e} above the bound"
    untouched = ~written_slots(cache, slots, form)
    now, before = (tensor.view(torch.uint8).flatten(2)[untouched] for tensor in (cache, old))
    assert torch.equal(now, before), f"{name}: bytes outside of the slots have changed"
