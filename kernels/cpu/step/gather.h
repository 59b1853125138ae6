// Reading back: what the caches hold for each sequence, as floats.
#pragma once

#include <algorithm>

#include "base/dispatch.h"
#include "products/pack.h"
#include "products/settled.h"
#include "base/threads.h"

// The rows [0, count) of one block of all heads, in order of tokens and heads; zeros for the rest of the block.
template <int F>
INLINE void gather_block(
    const GatherCall& call, const Layout& layout, int64_t block, int64_t count, float* row, float* out
) {
    int64_t dim = call.cache.dim;
    for (int64_t head = 0; count && head < call.kv_heads; head++) {
        const uint8_t* slab = call.cache.data + (block * call.kv_heads + head) * layout.slab_bytes;
        for (int64_t p = 0; p < count; p++) {
            expand_row<F>(slab + p * layout.row_bytes, dim, row);
            float* to = out + (p * call.kv_heads + head) * dim;
            if (!layout.scale_bytes) {
                std::memcpy(to, row, 4 * dim);
                continue;
            }
            const uint8_t* tail = slab + layout.scale_bytes + 4 * p;
            if constexpr (F == kInt4) {
                float scale = from_bfloat16(load<uint16_t>(tail)), offset = from_bfloat16(load<uint16_t>(tail + 2));
                for (int64_t i = 0; i < dim; i++) to[i] = row[i] * scale + offset;
            } else {
                float scale = load<float>(tail);
                for (int64_t i = 0; i < dim; i++) to[i] = row[i] * scale;
            }
        }
    }
    int64_t token = call.kv_heads * dim;
    std::fill(out + count * token, out + call.block_size * token, 0.0f);
}

// The same for settling formats.
INLINE void gather_settled(const GatherCall& call, const Layout& layout, int64_t block, int64_t count, float* row, float* out) {
    int64_t dim = call.cache.dim, token = call.kv_heads * dim;
    for (int64_t head = 0; count && head < call.kv_heads; head++) {
        const uint8_t* slab = settled_slab(call.cache, layout.slab_bytes, block, call.kv_heads, head, call.block_size);
        for (int64_t p = 0; p < count; p++) {
            SettledRow found = settled_row(call.cache, layout, slab, block < 0, call.block_size, p);
            expand_settled(call.cache.format, found.codes, found.units, dim, row);
            float scale = settled_scale(found.scale);
            for (int64_t i = 0; i < dim; i++) out[p * token + head * dim + i] = row[i] * scale;
        }
    }
    std::fill(out + count * token, out + call.block_size * token, 0.0f);
}

inline int64_t gather_cache(GatherCall& call) {
    int64_t size = call.block_size, width = call.table_width;
    auto held = [&](int64_t n, int64_t column) {  // tokens in this block of the sequence
        return std::clamp<int64_t>(call.lengths[n] - column * size, 0, size);
    };
    int64_t lowest = 0;
    if (settles(call.cache.format))
        lowest = -((call.cache.end - call.cache.data) / (2 * call.kv_heads * size * call.cache.dim));
    for (int64_t n = 0; n < call.sequences; n++)
        for (int64_t column = 0; column < width && held(n, column); column++) {
            int64_t block = call.tables[n * width + column];
            if (block < lowest || block >= call.blocks) {
                call.detail = n;
                call.value = block;
                return kBadBlock;
            }
        }
    const Layout layout = layout_of(call.cache, size);
    std::atomic<bool> failed{false};
    for_each(call.sequences * width, call.threads, [&](int64_t i) {
        static thread_local std::vector<float> row;
        try {
            if (static_cast<int64_t>(row.size()) < call.cache.dim + kLanes) row.resize(call.cache.dim + kLanes);
        } catch (const std::bad_alloc&) {
            failed = true;
            return;
        }
        int64_t count = held(i / width, i % width);
        float* out = call.out + i * size * call.kv_heads * call.cache.dim;
        if (settles(call.cache.format))
            return gather_settled(call, layout, count ? call.tables[i] : 0, count, row.data(), out);
        with_format(call.cache.format, [&](auto f) {
            gather_block<f>(call, layout, count ? call.tables[i] : 0, count, row.data(), out);
        });
    });
    return failed ? kOutOfMemory : kDone;
}
