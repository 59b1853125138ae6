// The inner product of packed tiles: out[R][columns] (+)= a[R][units] times b[units][columns].
//
// A unit is four bytes: one float, a pair of bfloat16, or four bytes of an 8-bit format. The row operand is broadcast unit
// by unit, so that lanes are columns and nothing has to be summed across a vector.
#pragma once

#include "simd.h"

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

// Strides in units and cells.
struct Strides {
    int64_t a, b, out;
};

template <class Product, int R, int NV>
INLINE void multiply_block(
    const uint32_t* a, const uint32_t* b, typename Product::Cell* out, int64_t units, const Strides& stride, bool add
) {
    typename Product::Sum sums[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++)
            sums[r][v] = add ? load<typename Product::Sum>(out + r * stride.out + v * kLanes) : typename Product::Sum{};
    for (int64_t u = 0; u < units; u++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++)
                sums[r][v] = Product::add(sums[r][v], a + r * stride.a + u, b + u * stride.b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) store(out + r * stride.out + v * kLanes, sums[r][v]);
}

template <class Product, int R>
void multiply_rows(
    const uint32_t* a, const uint32_t* b, typename Product::Cell* out, int64_t units, int64_t columns,
    const Strides& stride, bool add
) {
    int64_t c = 0;
    for (; c + 2 * kLanes <= columns; c += 2 * kLanes)
        multiply_block<Product, R, 2>(a, b + c, out + c, units, stride, add);
    if (c < columns) multiply_block<Product, R, 1>(a, b + c, out + c, units, stride, add);
}

// `columns` is a multiple of kLanes.
template <class Product>
void multiply(
    const uint32_t* a, const uint32_t* b, typename Product::Cell* out, int64_t rows, int64_t units, int64_t columns,
    const Strides& stride, bool add
) {
    constexpr int kMost = kLanes == 16 ? 8 : 4;
    int64_t r = 0;
    for (; r + kMost <= rows; r += kMost)
        multiply_rows<Product, kMost>(a + r * stride.a, b, out + r * stride.out, units, columns, stride, add);
    if (kMost > 4 && r + 4 <= rows) {
        multiply_rows<Product, 4>(a + r * stride.a, b, out + r * stride.out, units, columns, stride, add);
        r += 4;
    }
    if (r + 2 <= rows) {
        multiply_rows<Product, 2>(a + r * stride.a, b, out + r * stride.out, units, columns, stride, add);
        r += 2;
    }
    if (r < rows) multiply_rows<Product, 1>(a + r * stride.a, b, out + r * stride.out, units, columns, stride, add);
}
