// Attention of a few query rows straight from the cache: every element is loaded once for up to four rows.
//
// This is decode. The rows of a chunk of keys are given by pointers, so that blocks of any size, anywhere, look alike.
// Meanwhile the rows of a later chunk are fetched into the second-level cache: the slabs of a sequence lie anywhere in
// memory, and no hardware prefetcher crosses from one to the next.
#pragma once

#include <array>

#include "base/simd.h"

constexpr int kChunk = 128;  // keys taken together
constexpr int kDirectRows = 4;

// Some rows of the cache.
struct RowList {
    const uint8_t* const* rows = nullptr;
    int64_t bytes = 0;
    int count = 0;
};

// Fetches the rows that are wanted next: keys, then values. All at once they would fill the queue of the cache, and stall
// it; so they are asked for little by little, all the while that something else is computed.
class Fetcher {
public:
    Fetcher(const RowList& keys, const RowList& values) : list_(keys), values_(values) {}

    // Portions in all: rows, or lines of rows that are long.
    int64_t wanted() const { return portions(list_) + portions(values_); }

    // The next `count` portions, as many as there are of the present list.
    INLINE void fetch(int64_t count) {
        if (row_ >= list_.count) {
            list_ = values_;
            values_.count = row_ = 0;
        }
        if (list_.bytes > kShort) return fetch_lines(count);
        int last = row_ + count < list_.count ? row_ + static_cast<int>(count) : list_.count;
        for (; row_ < last; row_++)
            for (int64_t b = 0; b < list_.bytes; b += 64) prefetch(list_.rows[row_] + b);
    }

private:
    static constexpr int64_t kShort = 256;
    static int64_t portions(const RowList& list) {
        return list.bytes > kShort ? list.count * ((list.bytes + 63) / 64) : list.count;
    }

    INLINE void fetch_lines(int64_t count) {
        for (; count > 0 && row_ < list_.count; count--) {
            prefetch(list_.rows[row_] + byte_);
            byte_ += 64;
            if (byte_ < list_.bytes) continue;
            byte_ = 0;
            row_++;
        }
    }

    RowList list_, values_;
    int64_t byte_ = 0;
    int row_ = 0;
};

// How many portions are to be fetched during one part of the work.
struct Share {
    Fetcher& fetcher;
    int64_t portions;

    Share part(int64_t of) const { return {fetcher, (portions + of - 1) / of}; }
    INLINE void fetch() const { fetcher.fetch(portions); }
};

// scores[r][j] = query[r] . key[j] for R rows; `query` is padded with zeros to a multiple of kLanes. Writes up to the
// multiple of kLanes above `count`; the pointers are valid that far.
template <int F, int R>
INLINE void direct_scores(
    const float* query, int64_t query_stride, const uint8_t* const* keys, int count, int64_t dim, float* scores,
    const Share& share
) {
    constexpr int K = kLanes / R;  // keys at once, so that the sums fill one vector
    const Share each = share.part((count + K - 1) / K);
    int64_t whole = dim / kLanes * kLanes;
    for (int j = 0; j < count; j += K) {
        each.fetch();
        vf sums[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) sums[i] = vf{};
        for (int64_t d = 0; d < whole; d += kLanes) {
            vf q[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) q[r] = load<vf>(query + r * query_stride + d);
#pragma GCC unroll 16
            for (int k = 0; k < K; k++) {
                vf element = load_elements<F>(keys[j + k], d);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) sums[r * K + k] += q[r] * element;
            }
        }
        if (whole < dim)
#pragma GCC unroll 16
            for (int k = 0; k < K; k++) {  // unrolled, or else the sums would lie in memory
                vf element = load_tail<F>(keys[j + k], whole, dim - whole);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) sums[r * K + k] += load<vf>(query + r * query_stride + whole) * element;
            }
        float flat[kLanes];
        store(flat, sum_each(sums));
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) std::memcpy(scores + r * kChunk + j, flat + r * K, 4 * K);
    }
}

// out[r] += sum over j of weights[r][j] * value[j], for NV vectors of dims from d on.
template <int F, int R, int NV>
INLINE void direct_stripe(
    const float* weights, const uint8_t* const* values, int count, int64_t d, int64_t tail, float* out,
    int64_t out_stride, const Share& share
) {
    const Share each = share.part((count + 1) / 2);
    vf sums[R][NV];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) sums[r][v] = load<vf>(out + r * out_stride + d + v * kLanes);
    for (int j = 0; j < count; j++) {
        if (j % 2 == 0) each.fetch();
        vf element[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++)
            element[v] = tail ? load_tail<F>(values[j], d, tail) : load_elements<F>(values[j], d + v * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            vf weight = splat(weights[r * kChunk + j]);
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) sums[r][v] += weight * element[v];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) store(out + r * out_stride + d + v * kLanes, sums[r][v]);
}

// All dims of `out`, which is padded to a multiple of kLanes.
template <int F, int R>
INLINE void direct_values(
    const float* weights, const uint8_t* const* values, int count, int64_t dim, float* out, int64_t out_stride,
    const Share& share
) {
    constexpr int NV = kLanes == 16 ? 4 : 2;
    int64_t d = 0, stripes = dim / (NV * kLanes) + (dim % (NV * kLanes) + kLanes - 1) / kLanes;
    const Share each = share.part(stripes);
    for (; d + NV * kLanes <= dim; d += NV * kLanes)
        direct_stripe<F, R, NV>(weights, values, count, d, 0, out, out_stride, each);
    for (; d < dim; d += kLanes)
        direct_stripe<F, R, 1>(weights, values, count, d, d + kLanes <= dim ? 0 : dim - d, out, out_stride, each);
}

#if KVPASS_DOT
INLINE __m512bh as_pairs(__m512i bits) { return (__m512bh)bits; }

// 32 numbers of fp8 as bfloat16, which holds them all. Exponents get another bias; the smallest numbers, among them those
// that have no exponent, are looked up.
template <int F>
INLINE __m512i widen_bytes(__m256i bytes) {
    constexpr int kMantissa = F == kE4M3 ? 3 : 2, kShift = 7 - kMantissa;
    constexpr int kBias = (F == kE4M3 ? 127 - 7 : 127 - 15) << 7;
    alignas(64) static constexpr auto kSmallest = [] {
        std::array<uint16_t, 32> table{};
        for (int code = 1; code < 32; code++) {
            int exponent = 1, number = code;  // number * 2^(exponent - bias - mantissa bits)
            if (code >> kMantissa) exponent = code >> kMantissa, number = (code & ((1 << kMantissa) - 1)) | (1 << kMantissa);
            while (number < 1 << kMantissa) number *= 2, exponent--;
            table[code] = static_cast<uint16_t>(exponent * 128 + kBias + ((number - (1 << kMantissa)) << kShift));
        }
        return table;
    }();
    __m512i code = _mm512_cvtepu8_epi16(bytes);
    __m512i magnitude = _mm512_and_si512(_mm512_slli_epi16(code, kShift), _mm512_set1_epi16(0x7f << kShift));
    __m512i pairs = _mm512_add_epi16(magnitude, _mm512_set1_epi16(kBias));
    __mmask32 small = _mm512_testn_epi16_mask(code, _mm512_set1_epi16(0x60));
    pairs = _mm512_mask_permutexvar_epi16(pairs, small, code, _mm512_load_si512(kSmallest.data()));
    constexpr int kSpecial = F == kE4M3 ? 0x7f : 0x7c;  // NaN, or infinity and NaN
    __mmask32 special = _mm512_cmpge_epu16_mask(magnitude, _mm512_set1_epi16(kSpecial << kShift));
    pairs = _mm512_mask_blend_epi16(special, pairs, _mm512_or_si512(pairs, _mm512_set1_epi16(0x7f80)));
    return _mm512_ternarylogic_epi32(pairs, _mm512_slli_epi16(code, 8), _mm512_set1_epi16(INT16_MIN), 0xf8);
}

// 32 neighbouring elements in bfloat16, which holds all numbers of these formats.
template <int F>
INLINE __m512i load_pairs(const uint8_t* row, int64_t i) {
    if constexpr (F == kBFloat16)
        return _mm512_loadu_si512(row + 2 * i);
    else if constexpr (F == kInt8)
        return (__m512i)_mm512_cvtne2ps_pbh((__m512)load_elements<F>(row, i + 16), (__m512)load_elements<F>(row, i));
    else
        return widen_bytes<F>(load<__m256i>(row + i));
}

// Reads rows of these formats: read(row, read.at(i)).
template <int F>
struct RowPairs {
    INLINE int64_t at(int64_t i) const { return i; }
    INLINE __m512i operator()(const uint8_t* row, int64_t i) const { return load_pairs<F>(row, i); }
};

// scores[r][j] = query[r] . key[j] for keys that are exact in bfloat16 and a query in bfloat16, in one part, or in two
// (high and low) when it is not exact in one.
template <int R, int Parts, class Read>
INLINE void dot_scores(
    const Read& read, const uint16_t* query, int64_t query_stride, const uint8_t* const* keys, int count, int64_t dim, float* scores,
    const Share& share
) {
    constexpr int K = kLanes / R;
    const Share each = share.part((count + K - 1) / K);
    for (int j = 0; j < count; j += K) {
        each.fetch();
        vf sums[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) sums[i] = vf{};
        for (int64_t d = 0; d < dim; d += 32) {
            const auto place = read.at(d);
            __m512bh q[R * Parts];
#pragma GCC unroll 8
            for (int r = 0; r < R * Parts; r++) q[r] = as_pairs(_mm512_loadu_si512(query + r * query_stride + d));
#pragma GCC unroll 16
            for (int k = 0; k < K; k++) {
                __m512bh element = as_pairs(read(keys[j + k], place));
#pragma GCC unroll 4
                for (int r = 0; r < R; r++)
#pragma GCC unroll 2
                    for (int p = 0; p < Parts; p++)
                        sums[r * K + k] =
                            (vf)_mm512_dpbf16_ps((__m512)sums[r * K + k], q[r * Parts + p], element);
            }
        }
        float flat[kLanes];
        store(flat, sum_each(sums));
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) std::memcpy(scores + r * kChunk + j, flat + r * K, 4 * K);
    }
}

// Words of two rows side by side: lanes 0..15 of the first, or of the second half.
INLINE __m512i interleave_words(__m512i a, __m512i b, bool high) {
    alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    __m512i index = _mm512_load_si512(kLow);
    if (high) index = _mm512_add_epi16(index, _mm512_set1_epi16(16));
    return _mm512_permutex2var_epi16(a, index, b);
}

// out[r] += sum over j of weights[r][j] * value[j]; weights are bfloat16 pairs of neighbouring keys, [R][Parts][kChunk / 2].
template <int R, int Parts, class Read>
INLINE void dot_values(
    const Read& read, const uint32_t* weights, const uint8_t* const* values, int count, int64_t dim, float* out, int64_t out_stride,
    const Share& share
) {
    const Share each = share.part((dim + 63) / 64 * (count / 2));
    for (int64_t d = 0; d < dim; d += 64) {
        bool wide = d + 64 <= dim;
        const auto places = std::make_pair(read.at(d), read.at(d + (wide ? 32 : 0)));
        __m512 sums[R][4];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++)
                sums[r][v] = v < 2 || wide ? _mm512_loadu_ps(out + r * out_stride + d + 16 * v) : _mm512_setzero_ps();
        for (int j = 0; j < count; j += 2) {
            each.fetch();
            __m512bh element[4];
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                const auto& place = half ? places.second : places.first;
                __m512i a = read(values[j], place), b = read(values[j + 1], place);
                element[2 * half] = as_pairs(interleave_words(a, b, false));
                element[2 * half + 1] = as_pairs(interleave_words(a, b, true));
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 2
                for (int p = 0; p < Parts; p++) {
                    __m512bh weight = as_pairs(_mm512_set1_epi32(weights[(r * Parts + p) * (kChunk / 2) + j / 2]));
#pragma GCC unroll 4
                    for (int v = 0; v < 4; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], weight, element[v]);
                }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++)
                if (v < 2 || wide) _mm512_storeu_ps(out + r * out_stride + d + 16 * v, sums[r][v]);
    }
}
#endif
