// Vectors of floats for whatever the object is compiled for, and how each format's elements become floats.
//
// GCC's and Clang's vector types carry most of it, so that one source serves every level; intrinsics stand only where
// the compilers find no single instruction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "base/call.h"

#define INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define KVPASS_DOT 1  // dot products of bytes and of bfloat16 pairs
#else
#define KVPASS_DOT 0
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));

template <class V>
INLINE V load(const void* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class V>
INLINE void store(void* to, V value) {
    std::memcpy(to, &value, sizeof value);
}

INLINE vf splat(float value) { return value - vf{}; }
INLINE vi splat_int(int32_t value) { return value - vi{}; }
INLINE vf as_float(vi bits) { return (vf)bits; }
INLINE vi as_int(vf value) { return (vi)value; }
INLINE vf select(vi mask, vf yes, vf no) { return as_float((mask & as_int(yes)) | (~mask & as_int(no))); }

template <int... I>
INLINE vi make_iota(std::integer_sequence<int, I...>) {
    return vi{I...};
}
INLINE vi iota() { return make_iota(std::make_integer_sequence<int, kLanes>{}); }

INLINE void prefetch(const uint8_t* address) { __builtin_prefetch(address, 0, 2); }  // into the second level

INLINE void prefetch_run(const uint8_t* from, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += 64) prefetch(from + b);
    if (reinterpret_cast<uintptr_t>(from) % 64) prefetch(from + bytes - 1);
}

// A NaN passes: the comparison is false for it, and the second value is taken.
INLINE vf at_least(vf value, float bound) { return value < bound ? splat(bound) : value; }
INLINE vf at_most(vf value, float bound) { return value > bound ? splat(bound) : value; }

// Of each four lanes the first or the last two of both, interleaved one by one (Width 1) or in pairs (Width 2).
template <int Width, bool High, class V, int... I>
INLINE V interleave(V a, V b, std::integer_sequence<int, I...>) {
    constexpr int kFrom = High ? 2 : 0;
    if (Width == 1)
        return __builtin_shufflevector(a, b, (I / 4 * 4 + kFrom + I % 4 / 2 + (I % 2 ? kLanes : 0))...);
    return __builtin_shufflevector(a, b, (I / 4 * 4 + kFrom + I % 2 + (I % 4 / 2 ? kLanes : 0))...);
}

// The even or the odd ones of the fours of both.
template <bool Odd, class V, int... I>
INLINE V every_second_four(V a, V b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, ((I / 4 * 2 + (Odd ? 1 : 0)) * 4 + I % 4)...);
}

// Lane i of the result is the sum of the lanes of rows[i]; the rows, floats or integers, are overwritten.
template <class V>
INLINE V sum_each(V* rows) {
    constexpr auto all = std::make_integer_sequence<int, kLanes>{};
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; i++)
        rows[i] = interleave<1, false>(rows[2 * i], rows[2 * i + 1], all) +
                  interleave<1, true>(rows[2 * i], rows[2 * i + 1], all);
#pragma GCC unroll 4
    for (int i = 0; i < kLanes / 4; i++)
        rows[i] = interleave<2, false>(rows[2 * i], rows[2 * i + 1], all) +
                  interleave<2, true>(rows[2 * i], rows[2 * i + 1], all);
    if constexpr (kLanes >= 8)
#pragma GCC unroll 2
        for (int i = 0; i < kLanes / 8; i++)
            rows[i] = every_second_four<false>(rows[2 * i], rows[2 * i + 1], all) +
                      every_second_four<true>(rows[2 * i], rows[2 * i + 1], all);
    if constexpr (kLanes == 16)
        rows[0] = every_second_four<false>(rows[0], rows[1], all) + every_second_four<true>(rows[0], rows[1], all);
    return rows[0];
}

template <int Stride, bool High, int... I>
INLINE vf exchange(vf a, vf b, std::integer_sequence<int, I...>) {
    if (High) return __builtin_shufflevector(a, b, ((I & Stride) ? kLanes + I : I + Stride)...);
    return __builtin_shufflevector(a, b, ((I & Stride) ? kLanes + I - Stride : I)...);
}

template <int Stride>
INLINE void transpose_stage(vf* rows) {
    constexpr auto all = std::make_integer_sequence<int, kLanes>{};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++)
        if (!(i & Stride)) {
            vf a = rows[i], b = rows[i + Stride];
            rows[i] = exchange<Stride, false>(a, b, all);
            rows[i + Stride] = exchange<Stride, true>(a, b, all);
        }
}

// Lane j of row i becomes lane i of row j.
INLINE void transpose(vf* rows) {
    if constexpr (kLanes == 16) transpose_stage<8 % kLanes>(rows);
    if constexpr (kLanes >= 8) transpose_stage<4 % kLanes>(rows);
    transpose_stage<2>(rows);
    transpose_stage<1>(rows);
}

template <int Stride, int... I>
INLINE vf swap_lanes(vf value, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(value, value, (I ^ Stride)...);
}

template <class Join>
INLINE float join_lanes(vf value, Join join) {
    constexpr auto all = std::make_integer_sequence<int, kLanes>{};
    if constexpr (kLanes == 16) value = join(value, swap_lanes<8 % kLanes>(value, all));
    if constexpr (kLanes >= 8) value = join(value, swap_lanes<4 % kLanes>(value, all));
    value = join(value, swap_lanes<2>(value, all));
    value = join(value, swap_lanes<1>(value, all));
    return value[0];
}

INLINE float sum_lanes(vf value) {
    return join_lanes(value, [](vf a, vf b) { return a + b; });
}

INLINE float max_lanes(vf value) {
    return join_lanes(value, [](vf a, vf b) { return a > b ? a : b; });
}

// Whether any lane is greater.
INLINE bool any_above(vf value, float bound) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)value, _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
#else
    return max_lanes(value) > bound;
#endif
}

// exp(x) for x up to 88, as 2^n times 2^r: relative error at most 2e-7, and 1.4e-8 more for each unit of |x|. 0 for what
// is too small and for -inf; a NaN stays one.
INLINE vf exp_of(vf x) {
    // 2^r for r from -1/2 to 1/2, with the least relative error that a polynomial of this degree has if it is 1 at zero
    auto power = [](vf r) {
        vf p = r * 1.3264727e-3f + 9.6715130e-3f;
        p = p * r + 5.5507336e-2f;
        p = p * r + 2.4022242e-1f;
        p = p * r + 6.9314700e-1f;
        return p * r + 1.0f;
    };
#if defined(__AVX512F__)
    __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-105.0f), (__m512)x);  // the second operand where one is NaN
    __m512 n = _mm512_roundscale_ps(bounded * 1.44269504f, 8);
    return (vf)_mm512_scalef_ps((__m512)power((vf)(bounded * 1.44269504f - n)), n);
#else
    vf bounded = at_least(x, -87.33f);
    vf n = bounded * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to the nearest integer
    vi exponent = as_int(n) << 23;
    n -= 12582912.0f;
#if defined(__FMA__)
    vf r = bounded * 1.44269504f - n;
#else
    vf r = (bounded - n * 0.693359375f + n * 2.12194440e-4f) * 1.44269504f;  // the product would be rounded
#endif
    vf result = as_float(as_int(power(r)) + exponent);
    result = select(x < -87.33f, vf{}, result);
    return select(x == x, result, x);
#endif
}

// tanh(x): its series near zero, where 1 - 2 / (exp(2x) + 1) would lose digits.
INLINE vf tanh_of(vf x) {
    vf s = x * x;
    vf series = splat(-1382.0f / 155925.0f);
    series = series * s + 62.0f / 2835.0f;
    series = series * s - 17.0f / 315.0f;
    series = series * s + 2.0f / 15.0f;
    series = series * s - 1.0f / 3.0f;
    series = (series * s) * x + x;
    vf far = 1.0f - 2.0f / (exp_of(at_most(x + x, 40.0f)) + 1.0f);
    return select((x < 0.35f) & (x > -0.35f), series, far);
}

// The bits of kLanes halves, one in each lane, as floats.
INLINE vf half_bits_to_float(vi half) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)half));
#elif defined(__F16C__) && defined(__AVX2__)
    __m128i low = _mm256_castsi256_si128((__m256i)half), high = _mm256_extracti128_si256((__m256i)half, 1);
    return (vf)_mm256_cvtph_ps(_mm_packus_epi32(low, high));
#else
    vf value = as_float((half & 0x7fff) << 13) * 0x1p112f;  // exact, and right for subnormals
    vi special = (half & 0x7c00) == 0x7c00;
    return as_float(as_int(value) | (special & 0x7f800000) | ((half & 0x8000) << 16));
#endif
}

// kLanes bytes as integers. The compilers convert such vectors element by element.
template <bool Signed>
INLINE vi load_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
    __m128i bytes = load<__m128i>(from);
    return (vi)(Signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
    __m128i bytes = _mm_loadl_epi64((const __m128i*)from);
    return (vi)(Signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
    uint32_t bytes = load<uint32_t>(from);
    vi spread = {static_cast<int32_t>(bytes << 24), static_cast<int32_t>(bytes << 16), static_cast<int32_t>(bytes << 8),
                 static_cast<int32_t>(bytes)};
    return Signed ? spread >> 24 : (vi)((vu)spread >> 24);
#endif
}

// kLanes elements of a format as floats. int4 is not here: its halves lie apart, see expand_row.
template <int F>
INLINE vf load_elements(const uint8_t* row, int64_t i) {
    if constexpr (F == kFloat32) {
        return load<vf>(row + 4 * i);
    } else if constexpr (F == kBFloat16) {
        return as_float((vi)(__builtin_convertvector(load<vh>(row + 2 * i), vu) << 16));
    } else if constexpr (F == kFloat16) {
#if defined(__AVX512F__)
        return (vf)_mm512_cvtph_ps(load<__m256i>(row + 2 * i));
#elif defined(__F16C__) && defined(__AVX2__)
        return (vf)_mm256_cvtph_ps(load<__m128i>(row + 2 * i));
#else
        return half_bits_to_float(__builtin_convertvector(load<vh>(row + 2 * i), vi));
#endif
    } else if constexpr (F == kE4M3) {
        // its bits are those of a half but for a bias that is 8 less
        vi byte = load_bytes<true>(row + i);
        vf value = half_bits_to_float(((byte << 7) & 0x3f80) | (byte & 0x8000)) * 256.0f;
        return as_float(as_int(value) | (((byte & 0x7f) == 0x7f) & 0x7fc00000));
    } else if constexpr (F == kE5M2) {
        return half_bits_to_float(load_bytes<false>(row + i) << 8);
    } else {
        static_assert(F == kInt8, "no elements of this format can be loaded in order");
        return __builtin_convertvector(load_bytes<true>(row + i), vf);
    }
}

template <int F>
constexpr int64_t kElementBytes = F == kFloat32 ? 4 : F == kBFloat16 || F == kFloat16 ? 2 : 1;

// The same where only `count` elements of the row are left: what lies behind them is not touched.
template <int F>
INLINE vf load_tail(const uint8_t* row, int64_t i, int64_t count) {
    uint8_t bytes[kLanes * kElementBytes<F>] = {};
    std::memcpy(bytes, row + i * kElementBytes<F>, count * kElementBytes<F>);
    return load_elements<F>(bytes, 0);
}

INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float from_bfloat16(uint16_t value) {
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

INLINE float from_bits(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
