"""What every Triton kernel of this room shares: reading and writing rows of a cache in each format, small searches.

A row is one token and one head. Tiles are powers of two wide, so a row is read in two *pieces*: A, and B for what is
left (head dim 96 is 64 + 32, a latent of 576 is 512 + 64).

int8 and int4 rows are read as 32-bit words and unpacked two numbers at a time: under the bits of the float16 number
1024 an integer below 1024 is that float16 plus 1024. That takes one or two instructions a number, where a conversion
takes six. The numbers of a word are a few positions apart, so a piece of words gives several *sets* of dims, each for a
dot of its own: four at most, counting pieces. :func:`set_dims` says which dims a set holds.

No element is multiplied by a scale: unpacking and :func:`decode` give the integers as they are.
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
    """The rows' tails, which follow the words of a slab; ``scales`` is the cache seen as float32."""
    return tl.load(scales + slabs * SLAB + P * ROW + offsets, mask=valid, other=0.0)


@triton.jit
def set_dims(cols, INDEX: tl.constexpr, FORMAT: tl.constexpr, A: tl.constexpr, ROW: tl.constexpr):
    """Dims of the columns of a set; past the row's end they are beyond any width.

    Set 0 is piece A and set 1 piece B. The upper numbers of words are sets 2 and 3; int4 has four sets and no piece B.
    """
    if FORMAT == "int8":
        word = cols // 2 + (A if INDEX % 2 else 0)
        return tl.where(word < ROW, 4 * word + 2 * (cols % 2) + INDEX // 2, 1 << 20)
    elif FORMAT == "int4":
        word = cols // 2
        return tl.where(word < ROW, (INDEX % 2) * (4 * ROW) + 4 * word + 2 * (cols % 2) + INDEX // 2, 1 << 20)
    else:
        return cols + (A if INDEX else 0)


@triton.jit
def unpack(raw, INDEX: tl.constexpr, FORMAT: tl.constexpr, DOT: tl.constexpr):
    """The numbers of a set, ``[R, columns]`` in ``DOT``, from stored elements or words; without their scale."""
    if FORMAT == "int8":
        bits = ((raw >> (8 * (INDEX // 2))) & 0x00FF00FF) ^ 0x64806480
        return (pair_halves(bits) - 1152.0).to(DOT)
    elif FORMAT == "int4":
        bits = ((raw >> (4 * INDEX)) & 0x000F000F) | 0x64006400
        return (pair_halves(bits) - 1032.0).to(DOT)
    else:
        return decode(raw, FORMAT, DOT)


@triton.jit
def pair_halves(bits):
    """The two float16 numbers of each int32 ``[R, C]``, side by side ``[R, 2 * C]``."""
    low = bits.to(tl.int16).to(tl.float16, bitcast=True)
    high = (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.reshape(tl.join(low, high), (bits.shape[0], 2 * bits.shape[1]))


@triton.jit
def decode(raw, FORMAT: tl.constexpr, DOT: tl.constexpr):
    """Elements of a float format as ``DOT``."""
    if FORMAT == "fp8_e4m3_bytes":
        # The bits of an e4m3 number, moved to where a float16 has them, are that number / 256; subnormals too.
        bits = raw.to(tl.int16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0).to(DOT)
    elif FORMAT == "fp8_e5m2_bytes":
        return (raw.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(DOT)
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
def fit_codes(low, high, inside, WIDTH: tl.constexpr):
    """Codes of -8..7 of rows in two halves ``[R, C]``, and their tails, int32 ``[R]``: see :func:`split_tails`.

    The same trials as :func:`kvpass.kernels.formats.fitted_codes.fit_codes`. ``inside``: columns that are part of a
    row, of WIDTH numbers. A row that is not finite has codes of 0, and NaN for scale and offset.
    """
    inside = inside[None, :]
    least = tl.minimum(tl.min(tl.where(inside, low, float("inf")), 1), tl.min(tl.where(inside, high, float("inf")), 1))
    most = tl.maximum(tl.max(tl.where(inside, low, float("-inf")), 1), tl.max(tl.where(inside, high, float("-inf")), 1))
    strange = tl.max((tl.abs(low) < float("inf")).to(tl.int32) ^ 1, 1)
    strange = tl.maximum(strange, tl.max((tl.abs(high) < float("inf")).to(tl.int32) ^ 1, 1)) > 0
    middle = least * 0.5 + most * 0.5
    half = most * 0.5 - least * 0.5
    usable = (half > 0) & (strange == 0)
    divisor = tl.where(usable, half, 1.0)[:, None]
    low = tl.where(usable[:, None] & inside, tl.div_rn(low - middle[:, None], divisor), 0.0)
    high = tl.where(usable[:, None] & inside, tl.div_rn(high - middle[:, None], divisor), 0.0)
    mean = tl.sum(low + high, 1) / WIDTH
    best = tl.zeros_like(half)
    slope = tl.zeros_like(half)
    mean_of_codes = tl.zeros_like(half)
    factor = tl.zeros_like(half)
    shift = tl.zeros_like(half)
    for trial in range(16):
        inverse = 15.0 / (2.0 - 0.08 * (trial // 4 + trial % 4))
        start = (1.0 - 0.08 * (trial // 4)) * inverse - 8.0
        low_code = tl.where(inside, nearest_code(low * inverse + start), 0.0)
        high_code = tl.where(inside, nearest_code(high * inverse + start), 0.0)
        mean_code = tl.sum(low_code + high_code, 1) / WIDTH
        along = tl.sum(low * low_code + high * high_code, 1) - WIDTH * mean * mean_code
        spread = tl.sum(low_code * low_code + high_code * high_code, 1) - WIDTH * mean_code * mean_code
        tried = along / tl.where(usable, spread, 1.0)
        better = along * tried > best
        best = tl.where(better, along * tried, best)
        slope = tl.where(better, tried, slope)
        mean_of_codes = tl.where(better, mean_code, mean_of_codes)
        factor = tl.where(better, inverse, factor)
        shift = tl.where(better, start, shift)
    low_code = nearest_code(low * factor[:, None] + shift[:, None])
    high_code = nearest_code(high * factor[:, None] + shift[:, None])
    scale = bfloat16_bits(slope * half)
    offset = mean * half + middle - (scale << 16).to(tl.float32, bitcast=True) * mean_of_codes
    tail = tl.where(strange, 0x7FC07FC0, scale | (bfloat16_bits(offset) << 16))
    return low_code.to(tl.int32), high_code.to(tl.int32), tail


@triton.jit
def bfloat16_bits(x):
    """The bits of a finite float32 as bfloat16, half to even, in the low half of an int32."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@triton.jit
def split_tails(tails):
    """Scales and offsets of int4, from tails seen as float32: two bfloat16, the scale in the low half."""
    bits = tails.to(tl.int32, bitcast=True)
    return (bits << 16).to(tl.float32, bitcast=True), (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def nearest_code(x):
    return tl.minimum(tl.maximum(round_half_even(x), -8.0), 7.0)


@triton.jit
def store_row_scales(scales, slabs, offsets, valid, scale, P: tl.constexpr, ROW: tl.constexpr, SLAB: tl.constexpr):
    """Counterpart of :func:`load_scales`, with ROW and SLAB in bytes."""
    tl.store(scales + slabs * (SLAB // 4) + (P * ROW // 4) + offsets, scale, mask=valid)
