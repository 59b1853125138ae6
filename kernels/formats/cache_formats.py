"""How keys and values are stored: one row per format, its bytes, and the way of a row of numbers there and back.

A cache is a pair of tensors ``[B, Hkv, P, W]``, W being the *stored width* of one token's row of a head. Everything of
a *slab* (one block, one head, P tokens) lies in one tensor, so that whoever owns blocks copies and frees them whole:

float formats
    ``float32``, ``bfloat16``, ``float16``, ``fp8_e4m3``, ``fp8_e5m2``: tensors of that dtype, W = D. A cast into fp8
    saturates; NaN and infinities become NaN. fp8 has no scale here: passes fold one per head around the ops.
scaled formats
    ``int8``, ``int4``: uint8 tensors whose slab is P rows of codes, and after them 4 bytes for each token's row, its
    *tail*; W = (bytes of D codes) + 4. A scale is 0 for a row of zeros, NaN for a row that is not finite. int8 codes
    are two's complement, the tail a float32 ``scale = absmax / 127``, ``code = round(x / scale)``, half to even. int4
    codes are split-half nibbles ``code + 8``: byte j holds dim j in its low and dim ``j + D / 2`` in its high half, so
    that two half-length dots need no interleave. A number is ``scale * code + offset``; the tail is scale and offset in
    bfloat16, in this order, which are searched for: see :func:`kvpass.kernels.formats.fitted_codes.fit_codes`.
settling formats
    ``k4`` for keys and ``v2`` for values, always together: blocks are written in bfloat16 and quantised as a whole once
    they are full. See :mod:`kvpass.kernels.formats.settling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kvpass.errors import ConfigError, InputError
from kvpass.kernels.formats.fitted_codes import fit_codes
from kvpass.types import CacheSpec, dtype_name

SCALE_BYTES = 4  # for each row of a scaled format: a float32, or two bfloat16
SETTLED_SCALE_BYTES = 2  # a bfloat16 for each row of a settling format
CHANNEL_GROUP = 16  # tokens of a block whose keys in k4 share the scales of their channels, a byte each
WIDE_BYTES = 2  # of a number in a block that has not settled: a bfloat16
CACHE_LINE = 64  # bytes


@dataclass(frozen=True)
class CacheFormat:
    """One way to store the keys, or the values, of a cache.

    Attributes:
        name: the row's name in :data:`FORMATS`, as written in a :class:`~kvpass.types.CacheSpec`.
        dtype: dtype of the tensor that holds the elements.
        bits: bits per element, without scales.
        largest: of a scaled format the largest code; of fp8 the largest number; None where neither is needed.
        settles: "key" or "value" of a settling format, which stores those alone; None for all others.
    """

    name: str
    dtype: torch.dtype
    bits: int
    largest: float | None = None
    settles: Literal["key", "value"] | None = None

    @property
    def coded(self) -> bool:
        """Whether a tensor holds codes and scales, as bytes, which its dtype does not tell from those of others."""
        return self.dtype is torch.uint8

    @property
    def scaled(self) -> bool:
        """Whether each row is complete by itself: codes, and a scale of its own behind the codes of its slab."""
        return self.coded and self.settles is None

    def stored_width(self, dim: int) -> int:
        """Size W of the cache tensor's last dim for rows of ``dim`` numbers; rows of none take nothing.

        Raises:
            ConfigError: if rows of that width cannot be stored.
        """
        if not self.coded or not dim:
            return dim
        if self.settles is not None:
            step = CHANNEL_GROUP if self.settles == "key" else 8 // self.bits
            if dim % step:
                raise ConfigError(f"cache format k4v2 needs head dims that are multiples of 16 (of keys) and of 4 (of "
                                  f"values), not {dim}: choose another format")  # fmt: skip
            channels = dim // CHANNEL_GROUP if self.settles == "key" else 0
            return dim * self.bits // 8 + channels + SETTLED_SCALE_BYTES
        if dim * self.bits % 8:
            raise ConfigError(f"cache format {self.name} needs an even head dim, not {dim}: choose another format")
        return dim * self.bits // 8 + SCALE_BYTES

    def row_width(self, stored: int) -> int:
        """Numbers D in a row of stored width ``stored``; the inverse of :meth:`stored_width`."""
        if self.settles is not None and stored:
            bits = self.bits * CHANNEL_GROUP + (8 if self.settles == "key" else 0)  # of 16 numbers
            return (stored - SETTLED_SCALE_BYTES) * 8 * CHANNEL_GROUP // bits
        return (stored - SCALE_BYTES) * 8 // self.bits if self.scaled and stored else stored

    def bytes_per_token(self, heads: int, dim: int) -> int:
        """Exact bytes that one token takes, scales included: ``heads`` rows of ``dim`` numbers each.

        Of a settling format, once its block has settled; before it is :meth:`wide_bytes_per_token`.
        """
        return heads * self.stored_width(dim) * self.dtype.itemsize

    def wide_bytes_per_token(self, heads: int, dim: int) -> int:
        """The same in a wide block; of formats that do not settle all blocks are alike."""
        return self.bytes_per_token(heads, dim) if self.settles is None else heads * dim * WIDE_BYTES

    def allocate(
        self,
        num_blocks: int,
        heads: int,
        block_size: int,
        dim: int,
        device: torch.device | str,
        wide_blocks: int = 0,
    ) -> Tensor:
        """Zeros of shape ``[B, heads, P, W]``. In main memory a block takes room only once it is written.

        A settling format has room for ``num_blocks`` settled blocks and for ``wide_blocks`` behind them, which takes as
        many places as they need.
        """
        if self.settles is not None:
            wide, settled = (size(heads, dim) for size in (self.wide_bytes_per_token, self.bytes_per_token))
            num_blocks += -(-wide_blocks * wide // settled)
        shape = (num_blocks, heads, block_size, self.stored_width(dim))
        if torch.device(device).type != "cpu" or not dim:
            return torch.zeros(shape, dtype=self.dtype, device=device)
        # numpy leaves zeroed pages to the operating system, where torch.zeros writes them all, and asks for huge pages
        count = num_blocks * block_size * self.bytes_per_token(heads, dim)
        memory = np.zeros(count + CACHE_LINE, dtype=np.uint8)
        start = -memory.ctypes.data % CACHE_LINE  # a row that begins within a line takes one more to read
        return torch.from_numpy(memory[start : start + count]).view(self.dtype).view(shape)


FORMATS: dict[str, CacheFormat] = {
    row.name: row
    for row in (
        CacheFormat("float32", torch.float32, 32),
        CacheFormat("bfloat16", torch.bfloat16, 16),
        CacheFormat("float16", torch.float16, 16),
        CacheFormat("fp8_e4m3", torch.float8_e4m3fn, 8, 448.0),
        CacheFormat("fp8_e5m2", torch.float8_e5m2, 8, 57344.0),
        CacheFormat("int8", torch.uint8, 8, 127.0),
        CacheFormat("int4", torch.uint8, 4, 7.0),
        CacheFormat("k4", torch.uint8, 4, 7.0, "key"),
        CacheFormat("v2", torch.uint8, 2, 1.5, "value"),
    )
}
_FLOATS = {row.dtype: row for row in FORMATS.values() if not row.coded}


def find_format(name: str) -> CacheFormat:
    """The row called ``name``.

    Raises:
        ConfigError: if there is none.
    """
    if name not in FORMATS:
        raise ConfigError(f"cache format {name!r} does not exist: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def format_for_dtype(dtype: torch.dtype) -> str:
    """Name of the format that stores elements of ``dtype`` unchanged.

    Raises:
        ConfigError: if no format does, as for float64.
    """
    for row in FORMATS.values():
        if row.dtype is dtype and not row.coded:
            return row.name
    kept = ", ".join(row.name for row in FORMATS.values() if not row.coded)
    raise ConfigError(f"no cache format keeps {dtype_name(dtype)} unchanged: choose one of {kept} as cache dtype")


def format_of(cache: Tensor, name: str | None) -> CacheFormat:
    """The format of a cache tensor that an op was given, with the name that came along.

    Args:
        cache: ``[..., W]``.
        name: None for the float formats, whose dtype says all (float64, which has no row, included).

    Raises:
        InputError: if name and dtype do not fit each other, or the dtype alone does not say enough.
    """
    if name is None:
        if not cache.dtype.is_floating_point:
            coded = ", ".join(row.name for row in FORMATS.values() if row.coded)
            raise InputError(f"a {dtype_name(cache.dtype)} cache needs the name of its format: one of {coded}")
        plain = CacheFormat(dtype_name(cache.dtype), cache.dtype, cache.dtype.itemsize * 8)
        return _FLOATS.get(cache.dtype, plain)
    row = find_format(name)
    if row.dtype is not cache.dtype:
        raise InputError(
            f"a cache of format {name} is a tensor of {dtype_name(row.dtype)}, not of {dtype_name(cache.dtype)}"
        )
    return row


def quantise_rows(rows: Tensor, form: CacheFormat) -> tuple[Tensor, Tensor | None]:
    """Store rows of numbers.

    Args:
        rows: float ``[..., D]``.
        form: the format.

    Returns:
        what a slab holds of the rows: the elements ``[..., D]`` in the format's dtype and None, or of a scaled format
        the codes uint8 ``[..., W - 4]`` and the tails uint8 ``[..., 4]``. A row that is not finite has codes of 0 as
        numbers.
    """
    if not form.scaled:
        if form.largest is not None:
            rows = rows.float().masked_fill(rows.isinf(), torch.nan).clamp(-form.largest, form.largest)
        return rows.to(form.dtype), None
    assert form.largest is not None, "a scaled format has a largest code"
    rows = rows.float()
    if form.bits == 4:
        codes, *parts = fit_codes(rows)
        low, high = (codes + 8).view(torch.uint8).chunk(2, -1)
        return low.bitwise_or(high << 4), torch.stack(parts, -1).view(torch.uint8)
    absmax = rows.abs().amax(-1, keepdim=True)
    scales = (absmax / form.largest).masked_fill(~absmax.isfinite(), torch.nan)
    codes = (rows / scales).nan_to_num(0.0).round_().clamp_(-form.largest, form.largest)
    return codes.masked_fill_(scales == 0, 0.0).to(torch.int8).view(torch.uint8), scales.view(torch.uint8)


def read_tails(tails: Tensor, form: CacheFormat) -> tuple[Tensor, Tensor | None]:
    """Scales and offsets float32 ``[...]`` of tails uint8 ``[..., 4]``; None for offsets of a format that has none."""
    if form.bits == 4:
        scales, offsets = tails.contiguous().view(torch.bfloat16).float().unbind(-1)
        return scales, offsets
    return tails.contiguous().view(torch.float32).squeeze(-1), None


def widen_codes(codes: Tensor, form: CacheFormat, dtype: torch.dtype) -> Tensor:
    """The elements of stored rows without their scales: ``[..., D]`` in ``dtype``, a fresh tensor."""
    if not form.scaled:
        return codes.to(dtype, copy=True)
    if form.bits == 8:
        return codes.view(torch.int8).to(dtype)
    half = codes.shape[-1]
    rows = torch.empty(*codes.shape[:-1], 2 * half, dtype=dtype, device=codes.device)
    rows[..., :half] = codes & 15
    rows[..., half:] = codes >> 4
    return rows.sub_(8)


def dequantise_rows(codes: Tensor, tails: Tensor | None, form: CacheFormat) -> Tensor:
    """The numbers that stored rows stand for, float32 ``[..., D]``; the inverse of :func:`quantise_rows`."""
    rows = widen_codes(codes, form, torch.float32)
    if tails is None:
        return rows
    scales, offsets = read_tails(tails, form)
    rows *= scales.unsqueeze(-1)
    return rows if offsets is None else rows.add_(offsets.unsqueeze(-1))


def split_slabs(slabs: Tensor, form: CacheFormat) -> tuple[Tensor, Tensor]:
    """Views of the two parts of slabs of a scaled format.

    Args:
        slabs: uint8 ``[..., P, W]``, contiguous in the last two dims.
        form: a scaled format.

    Returns:
        codes uint8 ``[..., P, W - 4]`` and tails uint8 ``[..., P, 4]``.
    """
    tokens, width = slabs.shape[-2:]
    flat, codes = slabs.flatten(-2), tokens * (width - SCALE_BYTES)
    return (
        flat[..., :codes].unflatten(-1, (tokens, width - SCALE_BYTES)),
        flat[..., codes:].unflatten(-1, (tokens, SCALE_BYTES)),
    )


def pack_slabs(rows: Tensor, form: CacheFormat) -> Tensor:
    """Whole slabs ``[..., P, W]``, as a cache of the format holds them, of rows ``[..., P, D]``."""
    codes, tails = quantise_rows(rows, form)
    if tails is None:
        return codes
    packed = torch.cat((codes.flatten(-2), tails.flatten(-2)), -1)
    return packed.view(*rows.shape[:-1], -1)


def unpack_slabs(slabs: Tensor, form: CacheFormat) -> Tensor:
    """The numbers ``[..., P, D]`` float32 that slabs ``[..., P, W]`` stand for."""
    if not form.scaled:
        return slabs.float()
    return dequantise_rows(*split_slabs(slabs, form), form)


def cache_bytes_per_token(spec: CacheSpec) -> int:
    """Exact bytes that one token takes in the cache ``spec``, keys and values together, scales included.

    In a settling format, once its block has settled.
    """
    return sum(_bytes_of_keys_and_values(spec))


def wide_bytes_per_token(spec: CacheSpec) -> int:
    """The same while the token's block is wide; of caches that do not settle all blocks are alike."""
    keys = find_format(spec.key_format).wide_bytes_per_token(spec.num_kv_heads, spec.key_dim)
    return keys + find_format(spec.value_format).wide_bytes_per_token(spec.num_kv_heads, spec.value_dim)


def shared_tensors(caches: Sequence[CacheSpec]) -> tuple[int, ...]:
    """For each cache the pair of tensors that it lives in, counted from 0.

    A block belongs to one group at a time, so a cache may share its tensors with one cache of each other group: the
    n-th of a group with the n-th of another among those whose tokens take the same bytes, keys and values each, in
    wide blocks too.
    """
    places: dict[tuple[tuple[int, ...], int], int] = {}
    found: list[int] = []
    counts: dict[tuple[int, tuple[int, ...]], int] = {}
    for spec in caches:
        size = (*_bytes_of_keys_and_values(spec), wide_bytes_per_token(spec))
        place = counts.get((spec.group, size), 0)
        counts[spec.group, size] = place + 1
        found.append(places.setdefault((size, place), len(places)))
    return tuple(found)


def allocate_caches(
    caches: Sequence[CacheSpec], num_blocks: int, block_size: int, device: torch.device | str, wide_blocks: int = 0
) -> tuple[tuple[Tensor, Tensor], ...]:
    """The two tensors of each cache, as :func:`allocate_cache` gives them; groups share memory."""
    owners: dict[int, tuple[CacheSpec, tuple[Tensor, Tensor]]] = {}
    pairs: list[tuple[Tensor, Tensor]] = []
    for spec, place in zip(caches, shared_tensors(caches), strict=True):
        if place not in owners:
            owners[place] = spec, allocate_cache(spec, num_blocks, block_size, device, wide_blocks)
        owner, (keys, values) = owners[place]
        if _layout(owner) != _layout(spec):
            keys = _seen_as(keys, spec.key_format, spec.num_kv_heads, spec.key_dim)
            values = _seen_as(values, spec.value_format, spec.num_kv_heads, spec.value_dim)
        pairs.append((keys, values))
    return tuple(pairs)


def _bytes_of_keys_and_values(spec: CacheSpec) -> tuple[int, int]:
    keys = find_format(spec.key_format).bytes_per_token(spec.num_kv_heads, spec.key_dim)
    return keys, find_format(spec.value_format).bytes_per_token(spec.num_kv_heads, spec.value_dim)


def _layout(spec: CacheSpec) -> tuple[object, ...]:
    return spec.num_kv_heads, spec.key_dim, spec.value_dim, spec.key_format, spec.value_format


def _seen_as(cache: Tensor, name: str, heads: int, dim: int) -> Tensor:
    """The memory of ``cache`` as a cache of another format and shape, whose tokens take as many bytes."""
    form = find_format(name)
    shape = (cache.shape[0], heads, cache.shape[2], form.stored_width(dim))
    return cache.flatten().view(torch.uint8).view(form.dtype).view(shape)


def allocate_cache(
    spec: CacheSpec, num_blocks: int, block_size: int, device: torch.device | str, wide_blocks: int = 0
) -> tuple[Tensor, Tensor]:
    """The two tensors of one cache, zero-initialised.

    Args:
        spec: the cache.
        num_blocks: blocks, of a settling format those for settled tokens.
        block_size: tokens per block, P.
        device: where.
        wide_blocks: of a settling format, how many blocks may be wide at a time.

    Returns:
        keys ``[B, Hkv, P, W]`` and values ``[B, Hkv, P, Wv]``, each in its format; W is D in the float formats.
    """
    keys = find_format(spec.key_format)
    values = find_format(spec.value_format)
    return (
        keys.allocate(num_blocks, spec.num_kv_heads, block_size, spec.key_dim, device, wide_blocks),
        values.allocate(num_blocks, spec.num_kv_heads, block_size, spec.value_dim, device, wide_blocks),
    )
