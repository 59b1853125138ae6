// Attention of a few query rows straight from int8 and int4 caches, in integers; every element is loaded once for up to
// four rows. See direct.h for how rows are given, and what is fetched meanwhile.
#pragma once

#include "pack.h"

#if KVPASS_DOT
// The largest magnitude of a chunk's weights as `levels` steps; returns the step, NaN if a weight is none.
INLINE float find_step(const float* row, float levels) {
    vf most = vf{}, sum = vf{};
#pragma GCC unroll 8
    for (int i = 0; i < kChunk; i += kLanes) {
        vf weight = as_float(as_int(load<vf>(row + i)) & 0x7fffffff);
        most = weight > most ? weight : most;
        sum += weight;
    }
    float largest = max_lanes(most);
    return sum_lanes(sum) <= 3e38f ? largest / levels : NAN;
}

INLINE float invert_step(float step) { return step > 1e-30f ? 1.0f / step : 0.0f; }  // 0 for NaN

// A row of weights, none negative, as 16-bit fractions of the largest, in two bytes each; returns what one stands for.
INLINE float weights_to_two_bytes(const float* row, uint8_t* high, uint8_t* low) {
    float step = find_step(row, 65535.0f);
    vf inverse = splat(invert_step(step));
#pragma GCC unroll 8
    for (int i = 0; i < kChunk; i += kLanes) {
        __m512i fraction = _mm512_cvtps_epi32((__m512)(load<vf>(row + i) * inverse));
        store(high + i, _mm512_cvtepi32_epi8(_mm512_srli_epi32(fraction, 8)));
        store(low + i, _mm512_cvtepi32_epi8(fraction));
    }
    return step;
}

// A row of weights, none negative, as 8-bit fractions of the largest; `sum` gets the sum of the fractions. Returns whether
// what that rounds off is less than a 64th of the weights: a quarter of what int4 itself may round.
INLINE bool weights_to_bytes(const float* row, uint8_t* high, float& step, int32_t& sum) {
    step = find_step(row, 255.0f);
    vf inverse = splat(invert_step(step)), left = vf{}, total = vf{};
    vi all = vi{};
#pragma GCC unroll 8
    for (int i = 0; i < kChunk; i += kLanes) {
        vf weight = load<vf>(row + i) * inverse;
        __m512i upper = _mm512_cvtps_epi32((__m512)weight);
        total += weight;
        left += (vf)_mm512_abs_ps((__m512)(weight - (vf)_mm512_cvtepi32_ps(upper)));
        all += (vi)upper;
        store(high + i, _mm512_cvtepi32_epi8(upper));
    }
    sum = _mm512_reduce_add_epi32((__m512i)all);
    return sum_lanes(total - left * 64.0f) >= 0.0f;
}

// What weights_to_bytes has rounded off, signed, in steps 254 times as fine.
INLINE void rest_to_bytes(const float* row, const uint8_t* high, uint8_t* low, float& step, int32_t& sum) {
    vf inverse = splat(invert_step(step));
    vi all = vi{};
    for (int i = 0; i < kChunk; i += kLanes) {
        vf rest = load<vf>(row + i) * inverse - (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load<__m128i>(high + i)));
        __m512i lower = _mm512_cvtps_epi32((__m512)(rest * 254.0f));
        all += (vi)lower;
        store(low + i, _mm512_cvtepi32_epi8(lower));
    }
    sum = _mm512_reduce_add_epi32((__m512i)all);
    step *= 1.0f / 254.0f;
}

// A query row in 16-bit integers, as fine as the sums of products with int8 allow; returns the step.
INLINE float query_to_words(const float* row, int64_t dim, int64_t width, uint16_t* words) {
    float most = 0, total = 0;
    for (int64_t i = 0; i < dim; i++) {
        float magnitude = std::fabs(row[i]);
        most = magnitude > most ? magnitude : most;
        total += magnitude;
    }
    float levels = std::fmin(32767.0f, 2147483647.0f / (128.0f * static_cast<float>(dim)) - 1.0f);
    float step = total <= 3e38f ? most / levels : NAN, inverse = invert_step(step);
    for (int64_t i = 0; i < width; i++)
        words[i] = i < dim ? static_cast<uint16_t>(static_cast<int32_t>(std::nearbyint(row[i] * inverse))) : 0;
    return step;
}

INLINE __m512i words_of(const uint8_t* bytes) { return _mm512_cvtepi8_epi16(load<__m256i>(bytes)); }

// scores[r][j] = query[r] . key[j], times the query's step, for int8 rows of a multiple of 32 elements.
template <int R>
INLINE void word_scores(
    const uint16_t* query, int64_t query_stride, const float* steps, const uint8_t* const* keys, int count, int64_t dim,
    float* scores, const Share& share
) {
    constexpr int K = kLanes / R;
    const Share each = share.part((count + K - 1) / K);
    float step_of[kLanes];
    for (int i = 0; i < kLanes; i++) step_of[i] = steps[i / K];
    for (int j = 0; j < count; j += K) {
        each.fetch();
        vi sums[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) sums[i] = vi{};
        for (int64_t d = 0; d < dim; d += 32) {
            __m512i q[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) q[r] = _mm512_loadu_si512(query + r * query_stride + d);
#pragma GCC unroll 16
            for (int k = 0; k < K; k++) {
                __m512i element = words_of(keys[j + k] + d);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++)
                    sums[r * K + k] = (vi)_mm512_dpwssd_epi32((__m512i)sums[r * K + k], q[r], element);
            }
        }
        float flat[kLanes];
        store(flat, __builtin_convertvector(sum_each(sums), vf) * load<vf>(step_of));
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) std::memcpy(scores + r * kChunk + j, flat + r * K, 4 * K);
    }
}

// Two rows of 32 bytes side by side.
INLINE __m512i two_rows(const uint8_t* a, const uint8_t* b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(load<__m256i>(a)), load<__m256i>(b), 1);
}

// sums[r][j] = query[r] . (key[j] + 8), for int4 rows of a multiple of 64 elements. Eight keys are taken at once, two in
// a vector, so that only eight lanes have to be summed up for each; `query` holds each 32 bytes twice.
template <int R>
INLINE void nibble_scores(
    const int8_t* query, int64_t query_stride, const uint8_t* const* keys, int count, int64_t dim, int32_t* scores,
    const Share& share
) {
    const __m512i low = _mm512_set1_epi8(15);
    constexpr auto all = std::make_integer_sequence<int, kLanes>{};
    constexpr int P = R == 4 ? 4 : 8;  // pairs of keys at once
    const Share each = share.part((count + 2 * P - 1) / (2 * P));
    int64_t half = dim / 2;
    for (int j = 0; j < count; j += 2 * P) {
        each.fetch();
        vi sums[R][P];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int p = 0; p < P; p++) sums[r][p] = vi{};
        for (int64_t d = 0; d < half; d += 32) {
            __m512i q[R][2];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                q[r][0] = _mm512_loadu_si512(query + r * query_stride + 2 * d);
                q[r][1] = _mm512_loadu_si512(query + r * query_stride + 2 * (half + d));
            }
#pragma GCC unroll 8
            for (int p = 0; p < P; p++) {
                __m512i both = two_rows(keys[j + 2 * p] + d, keys[j + 2 * p + 1] + d);
                __m512i first = _mm512_and_si512(both, low);
                __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) {
                    __m512i sum = _mm512_dpbusd_epi32((__m512i)sums[r][p], first, q[r][0]);
                    sums[r][p] = (vi)_mm512_dpbusd_epi32(sum, second, q[r][1]);
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int p = 0; p < P; p += 4) {
                vi* s = sums[r] + p;
                vi ab = interleave<1, false>(s[0], s[1], all) + interleave<1, true>(s[0], s[1], all);
                vi cd = interleave<1, false>(s[2], s[3], all) + interleave<1, true>(s[2], s[3], all);
                vi abcd = interleave<2, false>(ab, cd, all) + interleave<2, true>(ab, cd, all);
                // fours: the two halves of the first keys of the pairs, then of the second keys
                __m512i swapped = _mm512_shuffle_i32x4((__m512i)abcd, (__m512i)abcd, 0xb1);
                __m512i keys_of_pairs = _mm512_add_epi32((__m512i)abcd, swapped);
                const __m512i order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 0, 8, 1, 9, 2, 10, 3, 11);
                __m256i sorted = _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, keys_of_pairs));
                store(scores + r * kChunk + j + 2 * p, sorted);
            }
    }
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
    int64_t low;          // of int8: how far behind them the low bytes lie
    const int32_t* sums;  // of int4: of each row
    const float* steps;
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
                for (int v = 0; v < 4; v++)
                    sums[r][v] = _mm512_set1_epi32(F == kInt4 ? (Twins ? -4 : -8) * weights.sums[r] : 0);
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
