// The inner product of packed tiles: out[R][columns] (+)= a[R][units] times b[units][columns].
//
// A unit is four bytes: one float, a pair of bfloat16, or four bytes of an 8-bit format. The row operand is broadcast unit
// by unit, so that lanes are columns and nothing has to be summed across a vector.
#pragma once

#include "products/direct.h"

struct FloatProduct {
    typedef vf Sum;
    typedef float Cell;
    static INLINE Sum add(Sum sum, const uint32_t* a, const uint32_t* b) {
        float unit;
        std::memcpy(&unit, a, 4);
        return sum + splat(unit) * load<vf>(b);
    }
};

#if KVPASS_DOT
struct PairProduct {  // bfloat16 pairs
    typedef vf Sum;
    typedef float Cell;
    static INLINE Sum add(Sum sum, const uint32_t* a, const uint32_t* b) {
        __m512bh unit = (__m512bh)_mm512_set1_epi32(load<int>(a));
        return (vf)_mm512_dpbf16_ps((__m512)sum, unit, (__m512bh)_mm512_loadu_si512(b));
    }
};

struct SignedRowProduct {  // rows hold signed bytes, columns unsigned ones
    typedef vi Sum;
    typedef int32_t Cell;
    static INLINE Sum add(Sum sum, const uint32_t* a, const uint32_t* b) {
        __m512i unit = _mm512_set1_epi32(load<int>(a));
        return (vi)_mm512_dpbusd_epi32((__m512i)sum, _mm512_loadu_si512(b), unit);
    }
};

struct UnsignedRowProduct {  // rows hold unsigned bytes, columns signed ones
    typedef vi Sum;
    typedef int32_t Cell;
    static INLINE Sum add(Sum sum, const uint32_t* a, const uint32_t* b) {
        __m512i unit = _mm512_set1_epi32(load<int>(a));
        return (vi)_mm512_dpbusd_epi32((__m512i)sum, unit, _mm512_loadu_si512(b));
    }
};
#endif

// Strides in units; b lies in panels of kPanel columns.
struct Strides {
    int64_t a, b, panel;
};

constexpr int kPanel = 2 * kLanes;

// Rows [r, r + R) and columns [c, c + NV * kLanes); finish(row, column, sum) takes one row of the result after the other.
template <class Product, int R, int NV, class Finish>
INLINE void multiply_block(
    const uint32_t* a, const uint32_t* b, int64_t r, int64_t c, int64_t units, const Strides& stride, const Finish& finish
) {
    typename Product::Sum sums[R][NV];
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) sums[i][v] = typename Product::Sum{};
    for (int64_t u = 0; u < units; u++)
#pragma GCC unroll 8
        for (int i = 0; i < R; i++)
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++)
                sums[i][v] = Product::add(sums[i][v], a + (r + i) * stride.a + u, b + u * stride.b + v * kLanes);
    if constexpr (Finish::kRows == 2 && R > 1) {
#pragma GCC unroll 4
        for (int i = 0; i < R; i += 2)
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) finish((r + i) / 2, c + v * kLanes, sums[i][v], sums[i + 1][v]);
    } else if constexpr (Finish::kRows == 1) {
#pragma GCC unroll 8
        for (int i = 0; i < R; i++)
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) finish(r + i, c + v * kLanes, sums[i][v]);
    }
}

// One panel of columns, for all rows: the panel stays in the first-level cache.
template <class Product, int NV, class Finish>
void multiply_panel(
    const uint32_t* a, const uint32_t* b, int64_t rows, int64_t c, int64_t units, const Strides& stride,
    const Share& share, const Finish& finish
) {
    constexpr int kMost = kLanes == 16 ? 8 : 4;
    int64_t r = 0;
    for (; r + kMost <= rows; r += kMost) {
        share.fetch();
        multiply_block<Product, kMost, NV>(a, b, r, c, units, stride, finish);
    }
    share.fetch();
    if (kMost > 4 && r + 4 <= rows) {
        multiply_block<Product, 4, NV>(a, b, r, c, units, stride, finish);
        r += 4;
    }
    if (r + 2 <= rows) {
        multiply_block<Product, 2, NV>(a, b, r, c, units, stride, finish);
        r += 2;
    }
    if (r < rows) multiply_block<Product, 1, NV>(a, b, r, c, units, stride, finish);
}

// `columns` is a multiple of kLanes. Meanwhile `share` is fetched.
template <class Product, class Finish>
void multiply(
    const uint32_t* a, const uint32_t* b, int64_t rows, int64_t units, int64_t columns, const Strides& stride,
    const Share& share, const Finish& finish
) {
    constexpr int kMost = kLanes == 16 ? 8 : 4;
    const Share each = share.part((rows / kMost + 1) * ((columns + kPanel - 1) / kPanel));
    int64_t c = 0;
    for (; c + kPanel <= columns; c += kPanel, b += stride.panel)
        multiply_panel<Product, 2>(a, b, rows, c, units, stride, each, finish);
    if (c < columns) multiply_panel<Product, 1>(a, b, rows, c, units, stride, each, finish);
}

// What becomes of the sums.

struct Set {
    static constexpr int kRows = 1;
    float* out;
    int64_t stride;
    INLINE void operator()(int64_t r, int64_t c, vf sum) const { store(out + r * stride + c, sum); }
};

struct Add {
    static constexpr int kRows = 1;
    float* out;
    int64_t stride;
    INLINE void operator()(int64_t r, int64_t c, vf sum) const {
        float* to = out + r * stride + c;
        store(to, load<vf>(to) + sum);
    }
};

#if KVPASS_DOT
// Scores of queries in one or two signed parts, from sums of products with unsigned bytes that are `offset` too large.
template <int Parts>
struct SetScores {
    static constexpr int kRows = Parts;
    float* out;
    int64_t stride;
    const float* units;
    const int32_t* query_sums;  // of each part, two for a row
    int32_t offset;
    INLINE void operator()(int64_t r, int64_t c, vi sum) const { write(r, c, number(sum, query_sums[2 * r])); }
    INLINE void operator()(int64_t r, int64_t c, vi high, vi low) const {
        write(r, c, number(high, query_sums[2 * r]) * 256.0f + number(low, query_sums[2 * r + 1]));
    }
    INLINE vf number(vi sum, int32_t query_sum) const { return __builtin_convertvector(sum - offset * query_sum, vf); }
    INLINE void write(int64_t r, int64_t c, vf score) const { store(out + r * stride + c, score * units[r]); }
};

// Weights in two bytes, times bytes that are `offset` too large.
struct AddValues {
    static constexpr int kRows = 2;
    float* out;
    int64_t stride;
    const float* units;
    const int32_t* weight_sums;
    int32_t offset;
    INLINE void operator()(int64_t r, int64_t c, vi high, vi low) const {
        float* to = out + r * stride + c;
        vi sum = (high << 8) + low - offset * weight_sums[r];
        store(to, load<vf>(to) + __builtin_convertvector(sum, vf) * units[r]);
    }
};
#endif
