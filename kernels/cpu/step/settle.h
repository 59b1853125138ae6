// Settling: full blocks of 16-bit rows are quantised into the slabs of k4 and v2. See kernels/settling.py.
#pragma once

#include "base/convert.h"
#include "products/settled.h"
#include "base/threads.h"

INLINE uint16_t bfloat16_above(float value) { return static_cast<uint16_t>((bits_of(value) + 0xffff) >> 16); }

// 16 tokens of keys, `rows [16][dim]` in floats, which are zeros where a token is not finite.
INLINE void settle_key_group(
    float* rows, int64_t dim, float* units, uint8_t* codes, uint8_t* channels, uint8_t* scales
) {
    bool finite[kChannelGroup];
    for (int t = 0; t < kChannelGroup; t++) {
        float check = 0;
        for (int64_t d = 0; d < dim; d++) check += rows[t * dim + d] * 0.0f;
        finite[t] = check == 0.0f;
        if (!finite[t]) std::fill(rows + t * dim, rows + (t + 1) * dim, 0.0f);
    }
    float most = 0;
    for (int64_t d = 0; d < dim; d++) {
        units[d] = 0;
        for (int t = 0; t < kChannelGroup; t++) units[d] = std::max(units[d], std::fabs(rows[t * dim + d]));
        most = std::max(most, units[d]);
    }
    for (int64_t d = 0; d < dim; d++) {
        uint32_t bits = bits_of(most > 0 ? units[d] / most : 0.0f);
        int64_t byte = static_cast<int64_t>((bits + 0xfffff) >> 20) - kChannelBias;
        channels[d] = static_cast<uint8_t>(std::clamp<int64_t>(byte, 0, 255));
        units[d] = channel_unit(channels[d]);
    }
    for (int t = 0; t < kChannelGroup; t++) {
        const float* row = rows + t * dim;
        float largest = 0;
        for (int64_t d = 0; d < dim; d++) largest = std::max(largest, std::fabs(row[d] / units[d]));
        uint16_t scale = bfloat16_above(largest / 7.0f);
        float step = from_bfloat16(scale);
        store(scales + 2 * t, finite[t] ? scale : static_cast<uint16_t>(0x7fc0));
        auto code = [&](int64_t d) {
            float ratio = step > 0 ? row[d] / (units[d] * step) : 0.0f;
            return static_cast<int>(std::nearbyint(ratio > 7.0f ? 7.0f : ratio < -7.0f ? -7.0f : ratio)) + 8;
        };
        for (int64_t i = 0; i < dim / 2; i++)
            codes[t * dim / 2 + i] = static_cast<uint8_t>(code(i) | code(dim / 2 + i) << 4);
    }
}

// One token's values: the scale is the best of eight 32nds of the largest magnitude up to sixteen.
INLINE void settle_value_row(float* row, int64_t dim, uint8_t* codes, uint8_t* scale) {
    float most = 0, check = 0;
    for (int64_t d = 0; d < dim; d++) {
        most = std::max(most, std::fabs(row[d]));
        check += row[d] * 0.0f;
    }
    std::memset(codes, 0, dim / 4);
    if (check != 0.0f || most == 0.0f) {
        store(scale, static_cast<uint16_t>(check != 0.0f ? 0x7fc0 : 0));
        return;
    }
    for (int64_t d = 0; d < dim; d++) row[d] /= most;
    float least = INFINITY, best = 1.0f;
    uint16_t chosen = 0;
    for (int n = 8; n <= 16; n++) {
        uint16_t narrow = to_bfloat16(most * (n / 32.0f));
        float step = from_bfloat16(narrow) / most, error = 0;
        for (int64_t d = 0; d < dim; d++) {
            float magnitude = std::fabs(row[d]);
            float off = magnitude - (magnitude >= step ? 1.5f : 0.5f) * step;
            error += off * off;
        }
        if (error < least) least = error, best = step, chosen = narrow;
    }
    store(scale, chosen);
    for (int64_t d = 0; d < dim; d++) {
        float level = std::floor(row[d] / best);
        int code = level < -1.0f ? 0 : level > 0.0f ? 3 : static_cast<int>(level) + 2;
        codes[d % (dim / 4)] |= static_cast<uint8_t>(code << d / (dim / 4) * 2);
    }
}

inline int64_t settle_blocks(SettleCall& call) {
    const CacheArgument& cache = call.cache;
    int64_t size = call.block_size, dim = cache.dim, heads = call.kv_heads;
    for (int64_t i = 0; i < call.count; i++)
        for (int64_t block : {call.source[i], call.target[i]})
            if ((block < 0) != (block == call.source[i]) || block < -call.wide_blocks || block >= call.blocks) {
                call.detail = i;
                call.value = block;
                return kBadBlock;
            }
    int64_t slab_bytes = layout_of(cache, size).slab_bytes;
    std::atomic<bool> failed{false};
    for_each(call.count * heads, call.threads, [&](int64_t item) {
        static thread_local std::vector<float> rows;
        try {
            if (static_cast<int64_t>(rows.size()) < (kChannelGroup + 1) * dim) rows.resize((kChannelGroup + 1) * dim);
        } catch (const std::bad_alloc&) {
            failed = true;
            return;
        }
        int64_t i = item / heads, head = item % heads;
        const uint8_t* from = settled_slab(cache, slab_bytes, call.source[i], heads, head, size);
        uint8_t* to = settled_slab(cache, slab_bytes, call.target[i], heads, head, size);
        uint8_t* scales = to + slab_bytes - 2 * size;
        for (int64_t t = 0; t < size; t += kChannelGroup) {
            read_row(from + 2 * t * dim, kBFloat16, kChannelGroup * dim, rows.data());
            if (cache.format == kK4) {
                uint8_t* channels = to + size * dim / 2 + t / kChannelGroup * dim;
                float* units = rows.data() + kChannelGroup * dim;
                settle_key_group(rows.data(), dim, units, to + t * dim / 2, channels, scales + 2 * t);
            } else {
                for (int64_t k = 0; k < kChannelGroup; k++)
                    settle_value_row(rows.data() + k * dim, dim, to + (t + k) * dim / 4, scales + 2 * (t + k));
            }
        }
    });
    return failed ? kOutOfMemory : kDone;
}
