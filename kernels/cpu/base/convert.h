// Floats into the formats of a cache, rounded half to even as torch does.
#pragma once

#include "base/simd.h"

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

INLINE float of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// A narrower float of `Exponent` and `Mantissa` bits, without its sign: `magnitude` is finite and in range.
template <int Exponent, int Mantissa>
INLINE uint32_t narrow_magnitude(float magnitude) {
    constexpr int kShift = 23 - Mantissa, kBias = (1 << (Exponent - 1)) - 1;
    constexpr uint32_t kSmallestNormal = static_cast<uint32_t>(128 - kBias) << 23;
    uint32_t bits = bits_of(magnitude);
    if (bits < kSmallestNormal) {  // adding a number whose last bit is the smallest step rounds to steps
        constexpr uint32_t kMagic = static_cast<uint32_t>(151 - kBias - Mantissa) << 23;
        return bits_of(magnitude + of_bits(kMagic)) - kMagic;
    }
    uint32_t odd = (bits >> kShift) & 1;
    bits += (static_cast<uint32_t>(kBias - 127) << 23) + (1u << (kShift - 1)) - 1 + odd;
    return bits >> kShift;
}

INLINE uint16_t to_half(float value) {
    uint32_t sign = bits_of(value) >> 16 & 0x8000;
    float magnitude = std::fabs(value);
    if (magnitude != magnitude) return static_cast<uint16_t>(sign | 0x7e00);
    if (magnitude >= 65536.0f) return static_cast<uint16_t>(sign | 0x7c00);
    return static_cast<uint16_t>(sign | narrow_magnitude<5, 10>(magnitude));
}

INLINE uint8_t to_e4m3(float value) {
    uint32_t sign = bits_of(value) >> 24 & 0x80;
    float magnitude = std::fabs(value);
    if (!(magnitude < INFINITY)) return static_cast<uint8_t>(sign | 0x7f);  // an infinity must stay visible
    return static_cast<uint8_t>(sign | narrow_magnitude<4, 3>(magnitude < 448.0f ? magnitude : 448.0f));
}

INLINE uint8_t to_e5m2(float value) {
    uint32_t sign = bits_of(value) >> 24 & 0x80;
    float magnitude = std::fabs(value);
    if (!(magnitude < INFINITY)) return static_cast<uint8_t>(sign | 0x7f);
    return static_cast<uint8_t>(sign | narrow_magnitude<5, 2>(magnitude < 57344.0f ? magnitude : 57344.0f));
}

// A row of a float tensor of torch as floats, element by element: nothing behind it is touched.
INLINE void read_row(const uint8_t* from, int64_t format, int64_t count, float* out) {
    if (format == kFloat32) {
        std::memcpy(out, from, 4 * count);
    } else if (format == kBFloat16) {
        for (int64_t i = 0; i < count; i++) out[i] = from_bfloat16(load<uint16_t>(from + 2 * i));
    } else {
        int64_t whole = count / kLanes * kLanes;
        for (int64_t i = 0; i < whole; i += kLanes) store(out + i, load_elements<kFloat16>(from, i));
        float tail[kLanes];
        store(tail, load_tail<kFloat16>(from, whole, count - whole));
        for (int64_t i = whole; i < count; i++) out[i] = tail[i - whole];
    }
}

// The same way back.
INLINE void write_row(const float* from, int64_t format, int64_t count, uint8_t* out) {
    switch (format) {
        case kFloat32:
            std::memcpy(out, from, 4 * count);
            return;
        case kBFloat16:
            for (int64_t i = 0; i < count; i++) store(out + 2 * i, to_bfloat16(from[i]));
            return;
        case kFloat16:
            for (int64_t i = 0; i < count; i++) store(out + 2 * i, to_half(from[i]));
            return;
        case kE4M3:
            for (int64_t i = 0; i < count; i++) out[i] = to_e4m3(from[i]);
            return;
        default:
            for (int64_t i = 0; i < count; i++) out[i] = to_e5m2(from[i]);
    }
}

// The largest magnitude of a row; NaN if an element is not finite.
INLINE float largest_of(const float* row, int64_t count) {
    float most = 0, check = 0;
    for (int64_t i = 0; i < count; i++) {
        float magnitude = std::fabs(row[i]);
        most = magnitude > most ? magnitude : most;
        check += row[i] * 0.0f;  // NaN unless all are finite
    }
    return check != 0.0f ? NAN : most;
}

// A row in int8: the codes into `codes`, the scale returned; NaN if an element is not finite.
INLINE float quantise_row(const float* row, int64_t count, int8_t* codes) {
    float most = largest_of(row, count);
    float scale = most / 127.0f;
    if (!(scale > 0.0f)) {
        for (int64_t i = 0; i < count; i++) codes[i] = 0;
        return most != most ? NAN : 0.0f;
    }
    for (int64_t i = 0; i < count; i++) {
        float code = std::nearbyint(row[i] / scale);
        codes[i] = static_cast<int8_t>(code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code);
    }
    return scale;
}

// Numbers below 2^22 to the nearest integer, half to even, of -8..7.
INLINE vf nearest_code(vf value) {
    value = (value + 12582912.0f) - 12582912.0f;
    return at_most(at_least(value, -8.0f), 7.0f);
}

// The smallest and the largest number of a row; NaN for both if an element is not finite.
INLINE void ends_of(const float* row, int64_t count, float& low, float& high) {
    float check = 0;
    low = high = row[0];
    for (int64_t i = 0; i < count; i++) {
        low = row[i] < low ? row[i] : low;
        high = row[i] > high ? row[i] : high;
        check += row[i] * 0.0f;  // NaN unless all are finite
    }
    if (check != 0.0f) low = high = NAN;
}

// Scale and offset of a row, in bfloat16, as they stand in its tail.
struct Fit {
    uint16_t scale, offset;
};

// A row in int4, with the scale and offset of least squared error of those tried: see kernels/fitted_codes.py. `unit`
// has room for `count` floats, padded to a multiple of kLanes.
INLINE Fit fit_codes(const float* row, int64_t count, float* unit, int8_t* codes) {
    float low, high;
    ends_of(row, count, low, high);
    float middle = low * 0.5f + high * 0.5f, half = high * 0.5f - low * 0.5f;
    if (!(half > 0.0f)) {
        for (int64_t i = 0; i < count; i++) codes[i] = 0;
        return {half != half ? to_bfloat16(NAN) : static_cast<uint16_t>(0), to_bfloat16(middle)};
    }
    vf total = vf{};
    for (int64_t i = 0; i < count; i++) unit[i] = (row[i] - middle) / half;
    int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = count; i < padded; i++) unit[i] = 0.0f;
    for (int64_t i = 0; i < padded; i += kLanes) total += load<vf>(unit + i);
    float width = static_cast<float>(count), extra = static_cast<float>(padded - count), mean = sum_lanes(total) / width;
    float best = 0, slope = 0, mean_of_codes = 0, factor = 0, shift = 0;
    for (int lower = 0; lower < 4; lower++)
        for (int upper = 0; upper < 4; upper++) {
            float inverse = 15.0f / (2.0f - 0.08f * static_cast<float>(lower + upper));
            float start = (1.0f - 0.08f * static_cast<float>(lower)) * inverse - 8.0f;
            vf along = vf{}, sum = vf{}, square = vf{};
            for (int64_t i = 0; i < padded; i += kLanes) {
                vf value = load<vf>(unit + i), code = nearest_code(value * inverse + start);
                along += value * code;
                sum += code;
                square += code * code;
            }
            float beyond = nearest_code(splat(start))[0];  // the code of the padding
            float mean_code = (sum_lanes(sum) - extra * beyond) / width;
            float product = sum_lanes(along) - width * mean * mean_code;
            float spread = sum_lanes(square) - extra * beyond * beyond - width * mean_code * mean_code;
            float gain = product * product / spread;
            if (!(gain > best)) continue;
            best = gain;
            slope = product / spread;
            mean_of_codes = mean_code;
            factor = inverse;
            shift = start;
        }
    for (int64_t i = 0; i < padded; i += kLanes) {
        float code[kLanes];
        store(code, nearest_code(load<vf>(unit + i) * factor + shift));
        for (int64_t j = i; j < count && j < i + kLanes; j++) codes[j] = static_cast<int8_t>(code[j - i]);
    }
    uint16_t scale = to_bfloat16(slope * half);
    return {scale, to_bfloat16(mean * half + middle - from_bfloat16(scale) * mean_of_codes)};
}
