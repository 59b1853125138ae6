// A chunk of keys or values brought into the form that gemm.h multiplies: panels of kPanel columns, which are keys, or
// elements of values: [panels][units][kPanel]. Every element is loaded from the cache once for all rows of a tile.
#pragma once

#include "products/gemm.h"

// Where column c, the first of a vector, of unit 0 stands among panels of so many units.
INLINE int64_t in_panels(int64_t c, int64_t units) { return c / kPanel * kPanel * units + c % kPanel; }

// One row as floats, padded with zeros to a multiple of kLanes.
template <int F>
INLINE void expand_row(const uint8_t* row, int64_t dim, float* out) {
    if constexpr (F == kInt4) {
        int64_t half = dim / 2;
        for (int64_t i = 0; i < half; i++) {
            out[i] = static_cast<float>((row[i] & 15) - 8);
            out[half + i] = static_cast<float>((row[i] >> 4) - 8);
        }
        for (int64_t i = dim; i % kLanes; i++) out[i] = 0.0f;
    } else {
        int64_t whole = dim / kLanes * kLanes;
        for (int64_t i = 0; i < whole; i += kLanes) store(out + i, load_elements<F>(row, i));
        if (whole < dim) store(out + whole, load_tail<F>(row, whole, dim - whole));
    }
}

// rows[j] holds `dim` floats, padded to `stride`; the elements are the units of `count` keys, a multiple of kLanes.
INLINE void transpose_floats(const float* rows, int64_t stride, int count, int64_t dim, float* out) {
    for (int j = 0; j < count; j += kLanes) {
        float* column = out + in_panels(j, stride);
        for (int64_t d = 0; d < dim; d += kLanes) {
            vf block[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; i++) block[i] = load<vf>(rows + (j + i) * stride + d);
            transpose(block);
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; i++) store(column + (d + i) * kPanel, block[i]);
        }
    }
}

#if KVPASS_DOT
// 16 rows, of which 16 bytes at `at` are taken, as four vectors: unit u of all rows in vector u.
INLINE void gather_units(const uint8_t* const* rows, int64_t at, __m512i* out) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)(rows[i] + at)));
        v[i] = _mm512_mask_broadcast_i32x4(v[i], 0x00f0, _mm_loadu_si128((const __m128i*)(rows[4 + i] + at)));
        v[i] = _mm512_mask_broadcast_i32x4(v[i], 0x0f00, _mm_loadu_si128((const __m128i*)(rows[8 + i] + at)));
        v[i] = _mm512_mask_broadcast_i32x4(v[i], 0xf000, _mm_loadu_si128((const __m128i*)(rows[12 + i] + at)));
    }
    __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpacklo_epi32(v[2], v[3]);
    __m512i c = _mm512_unpackhi_epi32(v[0], v[1]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    out[0] = _mm512_unpacklo_epi64(a, b);
    out[1] = _mm512_unpackhi_epi64(a, b);
    out[2] = _mm512_unpacklo_epi64(c, d);
    out[3] = _mm512_unpackhi_epi64(c, d);
}

// Keys, a multiple of 16, whose rows have `bytes` bytes, a multiple of 16.
INLINE void transpose_units(const uint8_t* const* rows, int count, int64_t bytes, uint32_t* out) {
    for (int j = 0; j < count; j += 16) {
        uint32_t* column = out + in_panels(j, bytes / 4);
        for (int64_t at = 0; at < bytes; at += 16) {
            __m512i unit[4];
            gather_units(rows + j, at, unit);
#pragma GCC unroll 4
            for (int u = 0; u < 4; u++) _mm512_storeu_si512(column + (at / 4 + u) * kPanel, unit[u]);
        }
    }
}

// Keys as unsigned bytes: int8 with 128 added, int4 with 8 added.
template <int F>
INLINE void pack_byte_keys(const uint8_t* const* rows, int count, int64_t dim, uint32_t* out) {
    const __m512i low = _mm512_set1_epi8(15), sign = _mm512_set1_epi8(static_cast<char>(0x80));
    int64_t bytes = F == kInt4 ? dim / 2 : dim;
    for (int j = 0; j < count; j += 16) {
        uint32_t* column = out + in_panels(j, dim / 4);
        for (int64_t at = 0; at < bytes; at += 16) {
            __m512i unit[4];
            gather_units(rows + j, at, unit);
#pragma GCC unroll 4
            for (int u = 0; u < 4; u++) {
                uint32_t* to = column + (at / 4 + u) * kPanel;
                if constexpr (F == kInt4) {
                    _mm512_storeu_si512(to, _mm512_and_si512(unit[u], low));
                    _mm512_storeu_si512(
                        to + dim / 8 * kPanel, _mm512_and_si512(_mm512_srli_epi16(unit[u], 4), low)
                    );
                } else {
                    _mm512_storeu_si512(to, _mm512_xor_si512(unit[u], sign));
                }
            }
        }
    }
}

// Values as bytes, four neighbouring keys in a unit. int8 is signed, int4 has 8 added.
template <int F>
INLINE void pack_byte_values(const uint8_t* const* rows, int count, int64_t dim, uint32_t* out) {
    const __m512i low = _mm512_set1_epi8(15);
    // unit i of the four lanes into lane i; then the bytes of a lane's four units transposed
    const __m512i across = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i within =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    int64_t bytes = F == kInt4 ? dim / 2 : dim;
    for (int j = 0; j < count; j += 4) {
        uint32_t* line = out + j / 4 * kPanel;
        for (int64_t at = 0; at < bytes; at += 16) {
            __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)(rows[j] + at)));
            v = _mm512_mask_broadcast_i32x4(v, 0x00f0, _mm_loadu_si128((const __m128i*)(rows[j + 1] + at)));
            v = _mm512_mask_broadcast_i32x4(v, 0x0f00, _mm_loadu_si128((const __m128i*)(rows[j + 2] + at)));
            v = _mm512_mask_broadcast_i32x4(v, 0xf000, _mm_loadu_si128((const __m128i*)(rows[j + 3] + at)));
            v = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(across, v), within);
            if constexpr (F == kInt4) {
                uint32_t* second = line + in_panels(dim / 2 + at, count / 4);
                _mm512_storeu_si512(line + in_panels(at, count / 4), _mm512_and_si512(v, low));
                _mm512_storeu_si512(second, _mm512_and_si512(_mm512_srli_epi16(v, 4), low));
            } else {
                _mm512_storeu_si512(line + in_panels(at, count / 4), v);
            }
        }
    }
}

// Pairs of neighbouring keys side by side, from rows of bfloat16 whose elements, a multiple of 32, are the columns.
INLINE void interleave_pairs(const uint8_t* const* rows, int count, int64_t columns, uint32_t* out) {
    for (int j = 0; j < count; j += 2)
        for (int64_t d = 0; d < columns; d += 32) {
            uint32_t* to = out + in_panels(d, count / 2) + j / 2 * kPanel;
            __m512i a = _mm512_loadu_si512(rows[j] + 2 * d), b = _mm512_loadu_si512(rows[j + 1] + 2 * d);
            _mm512_storeu_si512(to, interleave_words(a, b, false));
            _mm512_storeu_si512(to + 16, interleave_words(a, b, true));
        }
}

// Floats into bfloat16, in one part or in two: the rounded value, and what rounding left. A multiple of 16 elements.
INLINE void split_row(const float* row, int64_t count, int parts, uint16_t* high, uint16_t* low) {
    for (int64_t i = 0; i < count; i += 16) {
        __m512 value = _mm512_loadu_ps(row + i);
        __m256bh rounded = _mm512_cvtneps_pbh(value);
        store(high + i, rounded);
        if (parts == 1) continue;
        __m512 back = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)rounded), 16);
        store(low + i, _mm512_cvtneps_pbh(_mm512_sub_ps(value, back)));
    }
}

// In how many steps the largest weight of a row is counted. The bits of what is no finite number count as more than those
// of any that is: then the step is none either, and all weights count as none.
struct Steps {
    float step, inverse;

    Steps(const float* row, int count, float levels) {
        __m512i most = _mm512_setzero_si512();
        for (int i = 0; i < count; i += 16)
            most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_loadu_si512(row + i), _mm512_set1_epi32(INT32_MAX)));
        float largest = from_bits(_mm512_reduce_max_epi32(most));
        step = largest * (1.0f / levels);
        inverse = largest > 1e-30f ? levels / largest : 0.0f;
    }

    INLINE __m512 count(const float* row) const { return _mm512_mul_ps(_mm512_loadu_ps(row), _mm512_set1_ps(inverse)); }
};

// The numbers of two times 32 words, which _mm512_packus_epi32 has put together, as 64 bytes in their order before that.
INLINE __m512i merge_bytes(__m512i ab, __m512i cd) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(ab, cd));
}

// A row of weights, none negative, as 16-bit fractions of the largest, in two unsigned bytes each; `count` is a multiple
// of 16. Returns what one fraction stands for.
INLINE float split_weights(const float* row, int count, uint8_t* high, uint8_t* low) {
    const Steps steps(row, count, 65535.0f);
    const __m512i byte = _mm512_set1_epi16(255);
    int i = 0;
    for (; i + 64 <= count; i += 64) {
        __m512i fraction[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) fraction[k] = _mm512_cvtps_epi32(steps.count(row + i + 16 * k));
        __m512i ab = _mm512_packus_epi32(fraction[0], fraction[1]), cd = _mm512_packus_epi32(fraction[2], fraction[3]);
        store(high + i, merge_bytes(_mm512_srli_epi16(ab, 8), _mm512_srli_epi16(cd, 8)));
        store(low + i, merge_bytes(_mm512_and_si512(ab, byte), _mm512_and_si512(cd, byte)));
    }
    for (; i < count; i += 16) {
        __m512i fraction = _mm512_cvtps_epi32(steps.count(row + i));
        store(high + i, _mm512_cvtepi32_epi8(_mm512_srli_epi32(fraction, 8)));
        store(low + i, _mm512_cvtepi32_epi8(fraction));
    }
    return steps.step;
}

// A row of weights of either sign in steps of the largest / 32512: two signed bytes each. `sum` gets the sum of all steps.
// Returns what one step stands for; NaN if a weight is none.
INLINE float split_signed_weights(const float* row, int count, uint8_t* high, uint8_t* low, int32_t* sum) {
    const Steps steps(row, count, 32512.0f);
    __m512i all = _mm512_setzero_si512();
    for (int i = 0; i < count; i += 16) {
        __m512i step = _mm512_cvtps_epi32(steps.count(row + i));
        all = _mm512_add_epi32(all, step);
        __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(step, _mm512_set1_epi32(128)), 8);
        store(high + i, _mm512_cvtepi32_epi8(upper));
        store(low + i, _mm512_cvtepi32_epi8(step));  // what is left, from -128 to 127
    }
    *sum = _mm512_reduce_add_epi32(all);
    return steps.step;
}

// A query row as signed bytes in `parts` parts; `sums` gets the sum of each part, needed to undo the offset of unsigned
// keys. Returns what one step of the lowest part stands for.
INLINE float quantise_query(const float* row, int64_t dim, int parts, int8_t* high, int8_t* low, int32_t* sums) {
    float most = 0, total = 0;
    for (int64_t i = 0; i < dim; i++) {
        float magnitude = std::fabs(row[i]);
        most = magnitude > most ? magnitude : most;
        total += magnitude;
    }
    float steps = parts == 2 ? 127.0f * 256.0f : 127.0f;
    float inverse = most > 1e-30f && total <= 3e38f ? steps / most : 0.0f;
    sums[0] = sums[1] = 0;
    for (int64_t i = 0; i < dim; i++) {
        int32_t step = inverse == 0.0f ? 0 : static_cast<int32_t>(std::nearbyint(row[i] * inverse));
        int32_t upper = parts == 2 ? (step + 128) >> 8 : step;
        high[i] = static_cast<int8_t>(upper);
        sums[0] += upper;
        if (parts == 2) {
            low[i] = static_cast<int8_t>(step - 256 * upper);
            sums[1] += low[i];
        }
    }
    return total <= 3e38f ? most / steps : NAN;
}
#endif
