// Attention of a few query rows straight from k4v2 caches, in bfloat16 pairs. The channels' units multiply the query, once
// for all tokens that share them; tokens' scales multiply scores and weights, as those of other formats do. Wide rows,
// which are bfloat16, lie among the others.
#pragma once

#include "products/direct.h"
#include "products/settled.h"

#if KVPASS_DOT
// Reads 32 neighbouring codes of a row in bfloat16, which holds them all.
template <int F, bool Narrow>
struct CodePairs {
    static constexpr int kParts = F == kK4 ? 2 : 4, kBits = 8 / kParts;
    int64_t width;  // bytes of a row: a multiple of 32, or if Narrow 16

    struct Place {
        int64_t byte;
        __m512i shifts;
    };

    INLINE Place at(int64_t i) const {
        auto shift = [](int64_t part) { return _mm512_set1_epi16(static_cast<int16_t>(part * kBits)); };
        __m512i first = shift(i / width);
        if constexpr (Narrow) first = _mm512_mask_mov_epi16(first, 0xffff0000, shift(i / width + 1));
        return {i % width, first};
    }

    INLINE __m512i operator()(const uint8_t* row, const Place& place) const {
        alignas(64) static constexpr auto kNumbers = [] {  // by the lowest bits of a byte
            constexpr uint16_t kCodes[] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                           0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
            constexpr uint16_t kSteps[] = {0xbfc0, 0xbf00, 0x3f00, 0x3fc0};
            std::array<uint16_t, 32> table{};
            for (int n = 0; n < 32; n++) table[n] = F == kK4 ? kCodes[n % 16] : kSteps[n % 4];
            return table;
        }();
        __m512i words;
        if constexpr (Narrow)
            words = _mm512_broadcast_i64x4(_mm256_cvtepu8_epi16(load<__m128i>(row)));
        else
            words = _mm512_cvtepu8_epi16(load<__m256i>(row + place.byte));
        return _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, place.shifts), _mm512_load_si512(kNumbers.data()));
    }
};

inline bool has_code_pairs(int64_t format, int64_t dim) {
    int64_t width = dim / (format == kK4 ? 2 : 4);
    return dim % 64 == 0 && (width % 32 == 0 || width == 16);
}

// A query row times the units of a group's channels, in bfloat16 pairs of `Parts` parts.
template <int Parts>
INLINE void scale_query(const float* query, const uint8_t* units, int64_t dim, uint16_t* pairs) {
    for (int64_t i = 0; i < dim; i += 32) {
        __m512 value[2];
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            vi unit = (load_bytes<false>(units + i + 16 * k) + static_cast<int>(kChannelBias)) << 20;
            value[k] = (__m512)(load<vf>(query + i + 16 * k) * as_float(unit));
        }
        __m512bh rounded = _mm512_cvtne2ps_pbh(value[1], value[0]);
        store(pairs + i, rounded);
        if constexpr (Parts == 2) {
#pragma GCC unroll 2
            for (int k = 0; k < 2; k++) {
                __m512i half = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64((__m512i)rounded, k));
                value[k] = _mm512_sub_ps(value[k], (__m512)_mm512_slli_epi32(half, 16));
            }
            store(pairs + dim + i, _mm512_cvtne2ps_pbh(value[1], value[0]));
        }
    }
}

// scores[r][j] = query[r] . key[j] without the keys' scales; `pairs` is the query for wide rows, `scaled` room for one.
template <int R, int Parts>
INLINE void settled_scores(
    const float* query, const uint16_t* pairs, int64_t query_stride, const uint8_t* const* keys,
    const uint8_t* const* units, int count, int64_t dim, uint16_t* scaled, float* scores, const Share& share
) {
    const Share each = share.part((count + 15) / 16);
    for (int j = 0, n; j < count; j += n) {
        const uint8_t* rows[16];
        for (n = 0; n < 16 && j + n < count && units[j + n] == units[j]; n++) rows[n] = keys[j + n];
        for (int k = n; k < 16; k++) rows[k] = rows[n - 1];
        float found[R * kChunk];
        if (units[j]) {
            for (int r = 0; r < R; r++)
                scale_query<Parts>(query + r * query_stride, units[j], dim, scaled + r * Parts * dim);
            dot_scores<R, Parts>(CodePairs<kK4, false>{dim / 2}, scaled, dim, rows, n, dim, found, each);
        } else {
            dot_scores<R, Parts>(RowPairs<kBFloat16>{}, pairs, query_stride, rows, n, dim, found, each);
        }
        for (int r = 0; r < R; r++) {
            if (n == 16)
                std::memcpy(scores + r * kChunk + j, found + r * kChunk, 64);
            else
                std::memcpy(scores + r * kChunk + j, found + r * kChunk, 4 * n);
        }
    }
}

// As dot_values; blocks begin at even keys.
template <int R, int Parts>
INLINE void settled_values(
    const uint32_t* weights, const uint8_t* const* values, const uint8_t* const* units, int count, int64_t dim,
    float* out, int64_t out_stride, const Share& share
) {
    for (int j = 0, n; j < count; j += n) {
        for (n = 2; j + n < count && !units[j + n] == !units[j]; n += 2) {
        }
        auto add = [&](const auto& read) {
            dot_values<R, Parts>(read, weights + j / 2, values + j, n, dim, out, out_stride, share.part(count / n));
        };
        if (!units[j])
            add(RowPairs<kBFloat16>{});
        else if (dim % 128 == 0)
            add(CodePairs<kV2, false>{dim / 4});
        else
            add(CodePairs<kV2, true>{dim / 4});
    }
}
#endif
