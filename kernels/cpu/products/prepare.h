// What stands between a projection and an attention: RMS norm and rotary embedding of one row of floats.
#pragma once

#include "base/simd.h"

// x / sqrt(mean(x * x) + eps) * weight, https://arxiv.org/abs/1910.07467
INLINE void norm_row(float* row, int64_t dim, const float* weight, float eps) {
    vf squares = vf{};
    int64_t whole = dim / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) squares += load<vf>(row + i) * load<vf>(row + i);
    float sum = sum_lanes(squares);
    for (int64_t i = whole; i < dim; i++) sum += row[i] * row[i];
    float factor = 1.0f / std::sqrt(sum / static_cast<float>(dim) + eps);
    for (int64_t i = 0; i < dim; i++) row[i] = row[i] * factor * weight[i];
}

// The first `width` numbers turned by the angles of cos and sin: halves against each other, or neighbours.
// https://arxiv.org/abs/2104.09864
INLINE void rotate_row(float* row, int64_t width, const float* cos, const float* sin, bool interleaved) {
    int64_t half = width / 2;
    if (interleaved) {
        for (int64_t i = 0; i < width; i += 2) {
            float a = row[i], b = row[i + 1];
            row[i] = a * cos[i] - b * sin[i];
            row[i + 1] = b * cos[i + 1] + a * sin[i + 1];
        }
        return;
    }
    for (int64_t i = 0; i < half; i++) {
        float a = row[i], b = row[half + i];
        row[i] = a * cos[i] - b * sin[i];
        row[half + i] = b * cos[half + i] + a * sin[half + i];
    }
}
