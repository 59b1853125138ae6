// From what is known when a call is made to what is known when the kernels are compiled: formats, and rows at once.
#pragma once

#include <type_traits>

#include "base/simd.h"

// Calls body(format constant) for the format of a cache.
template <class Body>
INLINE void with_format(int64_t format, Body body) {
    switch (format) {
        case kFloat32: return body(std::integral_constant<int, kFloat32>{});
        case kBFloat16: return body(std::integral_constant<int, kBFloat16>{});
        case kFloat16: return body(std::integral_constant<int, kFloat16>{});
        case kE4M3: return body(std::integral_constant<int, kE4M3>{});
        case kE5M2: return body(std::integral_constant<int, kE5M2>{});
        case kInt8: return body(std::integral_constant<int, kInt8>{});
        default: return body(std::integral_constant<int, kInt4>{});
    }
}

// The same for those that are exact in bfloat16.
template <class Body>
INLINE void with_pairs_format(int64_t format, Body body) {
    if (format == kBFloat16) return body(std::integral_constant<int, kBFloat16>{});
    if (format == kE4M3) return body(std::integral_constant<int, kE4M3>{});
    body(std::integral_constant<int, kE5M2>{});
}

// Calls body(first row, rows constant) for rows in fours, and a last two or one; three are served as four.
template <class Body>
INLINE void with_rows(int rows, Body body) {
    int r = 0;
    for (; rows - r >= 3; r += 4) body(r, std::integral_constant<int, 4>{});
    if (rows - r == 2) body(r, std::integral_constant<int, 2>{});
    if (rows - r == 1) body(r, std::integral_constant<int, 1>{});
}
