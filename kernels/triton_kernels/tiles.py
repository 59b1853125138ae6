"""What every Triton kernel of this room shares: reading and writing rows of a cache in each format, small searches.

A row is one token and one head; its elements are split into *pieces* whose widths are powers of two, as tiles must be:
piece A, and piece B for what is left (head dim 96 is 64 + 32, a latent of 576 is 512 + 64). An int4 row is split-half,
so that a piece of its bytes gives two pieces of elements, low and high nibbles, and two dots.

No element is multiplied by a scale: :func:`decode` gives the integers as they are, in the dtype of the dot.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_last(starts, wanted, count):
    """Largest i with ``starts[i] <= wanted``, for ascending ``starts [count]`` that begin at or below ``wanted``."""
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) <= wanted:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def find_slabs(table, keys, valid, head, heads, P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Slab ``block * Hkv + head`` of each key, int64 ``[BLOCK_N]`` (or one for all where a tile lies in one block)."""
    if P % BLOCK_N == 0:
        block = tl.load(table + tl.min(keys, 0) // P)
        return tl.full((BLOCK_N,), 0, tl.int64) + (block.to(tl.int64) * heads + head)
    else:
        blocks = tl.load(table + keys // P, mask=valid, other=0)
        return blocks.to(tl.int64) * heads + head


@triton.jit
def load_rows(cache, slabs, offsets, valid, cols, ROW: tl.constexpr, SLAB: tl.constexpr):
    """Columns ``cols`` of the rows ``offsets`` of ``slabs``, as stored; zeros where not ``valid``."""
    places = slabs[:, None] * SLAB + (offsets * ROW)[:, None] + cols[None, :]
    return tl.load(cache + places, mask=valid[:, None] & (cols < ROW)[None, :], other=0.0)


@triton.jit
def load_scales(scales, slabs, offsets, valid, P: tl.constexpr, ROW: tl.constexpr, SLAB: tl.constexpr):
    """The rows' scales, which follow the elements of a slab; ``scales`` is the cache seen as float32."""
    return tl.load(scales + slabs * (SLAB // 4) + (P * ROW // 4) + offsets, mask=valid, other=0.0)


@triton.jit
def decode(raw, FORMAT: tl.constexpr, HIGH: tl.constexpr, DOT: tl.constexpr):
    """Stored elements as ``DOT``, without their scale. HIGH picks the nibble of an int4 byte."""
    if FORMAT == "int8":
        return raw.to(tl.int8, bitcast=True).to(DOT)
    elif FORMAT == "int4":
        nibble = (raw >> 4) if HIGH else (raw & 15)
        return (nibble.to(tl.int8, bitcast=True) - 8).to(DOT)
    elif FORMAT == "fp8_e4m3_bytes":
        # The bits of an e4m3 number, moved to where a float16 has them, are that number / 256; subnormals too.
        bits = raw.to(tl.int16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0).to(DOT)
    elif FORMAT == "fp8_e5m2_bytes":
        return (raw.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32).to(DOT)
    else:
        return raw.to(DOT)


@triton.jit
def round_half_even(x):
    """Nearest integer of a float32 below 2^22, ties to even: adding 1.5 * 2^23 leaves no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def encode_fp8(x, MANTISSA: tl.constexpr):
    """float32 as the byte of e4m3 (MANTISSA 3) or e5m2 (2): ties to even, saturating; NaN unless finite.

    In integers, and so the same on every device, with or without fp8 instructions.
    """
    largest: tl.constexpr = 448.0 if MANTISSA == 3 else 57344.0
    smallest: tl.constexpr = 0.015625 if MANTISSA == 3 else 0.00006103515625  # below it, subnormal
    unit: tl.constexpr = 512.0 if MANTISSA == 3 else 65536.0  # 1 / the smallest subnormal
    rebias: tl.constexpr = 120 if MANTISSA == 3 else 112
    drop: tl.constexpr = 23 - MANTISSA
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(tl.abs(x), largest)
    raw = magnitude.to(tl.int32, bitcast=True)
    rounded = (raw + ((1 << (drop - 1)) - 1) + ((raw >> drop) & 1)) >> drop
    small = round_half_even(tl.where(magnitude < smallest, magnitude, 0.0) * unit).to(tl.int32)
    code = tl.where(magnitude < smallest, small, rounded - (rebias << MANTISSA))
    code = tl.where(tl.abs(x) < float("inf"), code, 0x7F)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def row_scale(largest, finite, LEVELS: tl.constexpr):
    """Scale of a row whose largest magnitude is ``largest``: NaN if an element was not finite, so that it shows."""
    return tl.where(finite, tl.div_rn(largest, LEVELS), float("nan"))


@triton.jit
def quantize(x, scale, LEVELS: tl.constexpr):
    """``round(x / scale)`` in -LEVELS..LEVELS, for ``x [R, C]`` and ``scale [R]``; 0 where the scale is 0 or NaN."""
    usable = scale > 0
    ratio = tl.div_rn(x, tl.where(usable, scale, 1.0)[:, None])
    ratio = tl.minimum(tl.maximum(ratio, -LEVELS), LEVELS)
    return tl.where(usable[:, None], round_half_even(ratio), 0.0).to(tl.int32)


@triton.jit
def store_row_scales(scales, slabs, offsets, valid, scale, P: tl.constexpr, ROW: tl.constexpr, SLAB: tl.constexpr):
    """Counterpart of :func:`load_scales`."""
    tl.store(scales + slabs * (SLAB // 4) + (P * ROW // 4) + offsets, scale, mask=valid)
