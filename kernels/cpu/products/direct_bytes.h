// Attention of a few query rows straight from int8 and int4 caches, in integers; every element is loaded once for up to
// four rows. See direct.h for how rows are given, and what is fetched meanwhile.
#pragma once

#include "products/pack.h"

#if KVPASS_DOT
// What a row's weights count, times 8 and what one counts, is taken off `shift`: codes of int4 are that much too large.
INLINE void take_eights(__m512i counts, float step, float* shift) {
    store(shift, load<vf>(shift) - (vf)_mm512_cvtepi32_ps(counts) * (8.0f * step));
}

// A row of weights, none negative, as 8-bit fractions of the largest. Returns whether what that rounds off is less than a
// 64th of the weights: a quarter of what int4 itself may round.
INLINE bool weights_to_bytes(const float* row, uint8_t* bytes, float& step, float* shift) {
    const Steps steps(row, kChunk, 255.0f);
    vf left = vf{};
    __m512i all = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int i = 0; i < kChunk; i += 64) {
        __m512i fraction[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            __m512 count = steps.count(row + i + 16 * k);
            fraction[k] = _mm512_cvtps_epi32(count);
            left += (vf)_mm512_abs_ps(_mm512_sub_ps(count, _mm512_cvtepi32_ps(fraction[k])));
            all = _mm512_add_epi32(all, fraction[k]);
        }
        __m512i ab = _mm512_packus_epi32(fraction[0], fraction[1]), cd = _mm512_packus_epi32(fraction[2], fraction[3]);
        store(bytes + i, merge_bytes(ab, cd));
    }
    step = steps.step;
    take_eights(all, step, shift);
    return sum_lanes((vf)_mm512_cvtepi32_ps(all) - left * 64.0f) >= 0.0f;
}

// What weights_to_bytes has rounded off, signed, in steps 254 times as fine.
INLINE void rest_to_bytes(const float* row, const uint8_t* bytes, uint8_t* rest, float& step, float* shift) {
    const Steps steps(row, kChunk, 255.0f);
    __m512i all = _mm512_setzero_si512();
    for (int i = 0; i < kChunk; i += 16) {
        __m512 back = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load<__m128i>(bytes + i)));
        __m512 left = _mm512_sub_ps(steps.count(row + i), back);
        __m512i lower = _mm512_cvtps_epi32(_mm512_mul_ps(left, _mm512_set1_ps(254.0f)));
        all = _mm512_add_epi32(all, lower);
        store(rest + i, _mm512_cvtepi32_epi8(lower));
    }
    step *= 1.0f / 254.0f;
    take_eights(all, step, shift);
}

// Products of R byte rows with 16 NV keys, whose lanes they become: finish(row, column, sums) takes those of a row's parts.
template <int F, int R, int NV, class Finish>
INLINE void multiply_byte_keys(
    const int8_t* query, int64_t query_stride, const uint8_t* const* keys, int64_t dim, int64_t r, int64_t c,
    const Share& each, const Finish& finish
) {
    const __m512i low = _mm512_set1_epi8(15), sign = _mm512_set1_epi8(static_cast<char>(0x80));
    constexpr int kParts = Finish::kRows;
    __m512i sums[R][NV];
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) sums[i][v] = _mm512_setzero_si512();
    int64_t bytes = F == kInt4 ? dim / 2 : dim;
    for (int64_t at = 0; at < bytes; at += 16) {
        each.fetch();
        __m512i unit[NV][4];
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) gather_units(keys + c + 16 * v, at, unit[v]);
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) {
            __m512i first[NV], second[NV];  // of int4: the nibbles
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) {
                first[v] = F == kInt4 ? _mm512_and_si512(unit[v][u], low) : _mm512_xor_si512(unit[v][u], sign);
                second[v] = _mm512_and_si512(_mm512_srli_epi16(unit[v][u], 4), low);
            }
#pragma GCC unroll 8
            for (int i = 0; i < R; i++) {
                const int8_t* from = query + i * query_stride + at + 4 * u;
                __m512i q = _mm512_set1_epi32(load<int32_t>(from));
#pragma GCC unroll 2
                for (int v = 0; v < NV; v++) sums[i][v] = _mm512_dpbusd_epi32(sums[i][v], first[v], q);
                if constexpr (F == kInt4) {
                    q = _mm512_set1_epi32(load<int32_t>(from + bytes));
#pragma GCC unroll 2
                    for (int v = 0; v < NV; v++) sums[i][v] = _mm512_dpbusd_epi32(sums[i][v], second[v], q);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i += kParts)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) {
            if constexpr (kParts == 2)
                finish(r + i / 2, c + 16 * v, (vi)sums[i][v], (vi)sums[i + 1][v]);
            else
                finish(r + i, c + 16 * v, (vi)sums[i][v]);
        }
}

// Scores of some rows from r on, in R rows of bytes, with `count` keys, a multiple of 16, whose rows have a multiple of 16
// bytes: int8 with 128 added, int4 with 8 added.
template <int F, int R, class Finish>
INLINE void byte_scores(
    const int8_t* query, int64_t query_stride, const uint8_t* const* keys, int count, int64_t dim, int64_t r,
    const Share& share, const Finish& finish
) {
    const Share each = share.part((count + 31) / 32 * (dim / (F == kInt4 ? 32 : 16)));
    int c = 0;
    for (; c + 32 <= count; c += 32)
        multiply_byte_keys<F, R, 2>(query, query_stride, keys, dim, r, c, each, finish);
    if (c < count) multiply_byte_keys<F, R, 1>(query, query_stride, keys, dim, r, c, each, finish);
}

// Two rows of 32 bytes side by side.
INLINE __m512i two_rows(const uint8_t* a, const uint8_t* b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(load<__m256i>(a)), load<__m256i>(b), 1);
}

// out[0 .. 7] and out[16 .. 23] += step * sums
INLINE void add_eights(float* out, __m512i sums, float step) {
    __m512 added = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(step));
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), _mm512_castps512_ps256(added)));
    _mm256_storeu_ps(out + 16, _mm256_add_ps(_mm256_loadu_ps(out + 16), _mm512_extractf32x8_ps(added, 1)));
}

// Bytes of weights, [R][kChunk].
struct WeightBytes {
    const uint8_t* bytes;
    int64_t low;         // of int8: how far behind them the low bytes lie
    const float* steps;  // what one stands for, of each row
};

// out[r] += step[r] * sum over j of weights[r][j] * value[j], for rows of a multiple of 64 bytes, or of 32 as Twins: then
// a vector holds two rows, four apart. Weights of int8 have two bytes, those of int4 one, which may be Signed.
template <int F, int R, bool Twins, bool Signed>
INLINE void direct_byte_values(
    const WeightBytes& weights, const uint8_t* const* values, int count, int64_t dim, float* out, int64_t out_stride,
    const Share& share
) {
    constexpr int kKeys = Twins ? 8 : 4, kWidth = Twins ? 32 : 64, kPasses = F == kInt4 ? 2 : 1;
    const __m512i low = _mm512_set1_epi8(15);
    // of two vectors that hold four neighbouring bytes of each 16, the first and the last 32
    const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i back = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    int64_t width = dim / kPasses;
    const Share each = share.part(2 * width / kWidth * ((count + kKeys - 1) / kKeys));
    for (int64_t d = 0; d < width; d += kWidth)
#pragma GCC unroll 2
        for (int part = 0; part < 2; part++) {  // the first or the last eight of each 16 bytes
            // bytes 0..3 and 4..7 of them: by high and low bytes of weights, or of low and high nibbles
            __m512i sums[R][4];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int v = 0; v < 4; v++) sums[r][v] = _mm512_setzero_si512();
            for (int j = 0; j < count; j += kKeys) {
                each.fetch();
                __m512i row[4];
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++)
                    row[k] = Twins ? two_rows(values[j + k] + d, values[j + k + kKeys - 4] + d)
                                   : _mm512_loadu_si512(values[j + k] + d);
                __m512i ab = part ? _mm512_unpackhi_epi8(row[0], row[1]) : _mm512_unpacklo_epi8(row[0], row[1]);
                __m512i cd = part ? _mm512_unpackhi_epi8(row[2], row[3]) : _mm512_unpacklo_epi8(row[2], row[3]);
                __m512i near = _mm512_unpacklo_epi16(ab, cd), far = _mm512_unpackhi_epi16(ab, cd);
                __m512i element[4] = {near, far, near, far};
                if constexpr (F == kInt4) {
                    element[0] = _mm512_and_si512(near, low);
                    element[1] = _mm512_and_si512(far, low);
                    element[2] = _mm512_and_si512(_mm512_srli_epi16(near, 4), low);
                    element[3] = _mm512_and_si512(_mm512_srli_epi16(far, 4), low);
                }
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) {
                    __m512i weight[2];
#pragma GCC unroll 2
                    for (int p = 0; p < 2; p++) {
                        const uint8_t* from = weights.bytes + (F == kInt4 ? 0 : p * weights.low) + r * kChunk + j;
                        weight[p] = _mm512_set1_epi32(load<int32_t>(from));
                        if (Twins)
                            weight[p] = _mm512_inserti64x4(
                                weight[p], _mm256_set1_epi32(load<int32_t>(from + kKeys - 4)), 1
                            );
                    }
#pragma GCC unroll 4
                    for (int v = 0; v < 4; v++)  // the first factor counts as unsigned
                        sums[r][v] = Signed ? _mm512_dpbusd_epi32(sums[r][v], element[v], weight[v / 2])
                                            : _mm512_dpbusd_epi32(sums[r][v], weight[v / 2], element[v]);
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 2
                for (int pass = 0; pass < kPasses; pass++) {
                    __m512i near = sums[r][2 * pass], far = sums[r][2 * pass + 1];
                    if constexpr (F == kInt8) {
                        near = _mm512_add_epi32(_mm512_slli_epi32(near, 8), sums[r][2]);
                        far = _mm512_add_epi32(_mm512_slli_epi32(far, 8), sums[r][3]);
                    }
                    float* to = out + r * out_stride + pass * width + d + 8 * part;
                    if (Twins) {
                        near = _mm512_add_epi32(near, _mm512_shuffle_i32x4(near, near, 0x4e));
                        far = _mm512_add_epi32(far, _mm512_shuffle_i32x4(far, far, 0x4e));
                    }
                    add_eights(to, _mm512_permutex2var_epi32(near, front, far), weights.steps[r]);
                    if (!Twins) add_eights(to + 32, _mm512_permutex2var_epi32(near, back, far), weights.steps[r]);
                }
        }
}
#endif
