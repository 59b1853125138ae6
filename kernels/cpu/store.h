// Writing: new tokens into the cache, in its format, and whole blocks from one place to another.
#pragma once

#include <algorithm>

#include "convert.h"
#include "threads.h"

// One row into the slot `offset` of a slab.
INLINE void store_row(
    const uint8_t* from, int64_t from_format, const CacheArgument& cache, const Layout& layout, uint8_t* slab,
    int64_t offset, float* row, int8_t* steps
) {
    uint8_t* to = slab + offset * layout.row_bytes;
    if (from_format == cache.format) {
        std::memcpy(to, from, layout.row_bytes);
        return;
    }
    read_row(from, from_format, cache.dim, row);
    if (!layout.scale_bytes) return write_row(row, cache.format, cache.dim, to);
    bool four = cache.format == kInt4;
    float scale = quantise_row(row, cache.dim, four ? 7.0f : 127.0f, steps);
    store(slab + layout.scale_bytes + 4 * offset, scale);
    if (!four) {
        std::memcpy(to, steps, cache.dim);
        return;
    }
    int64_t half = cache.dim / 2;
    for (int64_t i = 0; i < half; i++) to[i] = static_cast<uint8_t>((steps[i] + 8) | ((steps[half + i] + 8) << 4));
}

inline int64_t write_cache(WriteCall& call) {
    for (int64_t t = 0; t < call.tokens; t++)
        if (call.slots[t] < 0 || call.slots[t] >= call.blocks * call.block_size) {
            call.detail = t;
            call.value = call.slots[t];
            return kBadSlot;
        }
    Layout layouts[2] = {layout_of(call.cache[0], call.block_size), layout_of(call.cache[1], call.block_size)};
    int64_t widest = std::max(call.cache[0].dim, call.cache[1].dim);
    constexpr int64_t kStretch = 16;  // tokens that a thread takes at once
    int64_t stretches = (call.tokens + kStretch - 1) / kStretch;
    std::atomic<bool> failed{false};
    for_each(stretches, call.threads, [&](int64_t i) {
        static thread_local std::vector<float> row;
        static thread_local std::vector<int8_t> steps;
        try {
            if (static_cast<int64_t>(row.size()) < widest + kLanes) {
                row.resize(widest + kLanes);
                steps.resize(widest + kLanes);
            }
        } catch (const std::bad_alloc&) {
            failed = true;
            return;
        }
        for (int64_t t = i * kStretch; t < std::min(call.tokens, (i + 1) * kStretch); t++) {
            int64_t block = call.slots[t] / call.block_size, offset = call.slots[t] % call.block_size;
            for (int which = 0; which < 2; which++) {
                const CacheArgument& cache = call.cache[which];
                if (!cache.data) continue;
                int64_t size = call.source_format[which] == kFloat32 ? 4 : 2;
                for (int64_t head = 0; head < call.kv_heads; head++) {
                    int64_t at = t * call.token_stride[which] + head * call.head_stride[which];
                    uint8_t* slab = cache.data + (block * call.kv_heads + head) * layouts[which].slab_bytes;
                    store_row(
                        call.source[which] + at * size, call.source_format[which], cache, layouts[which], slab,
                        offset, row.data(), steps.data()
                    );
                }
            }
        }
    });
    return failed ? kOutOfMemory : kDone;
}

inline int64_t copy_blocks(CopyCall& call) {
    for (int64_t i = 0; i < call.count; i++)
        for (int64_t block : {call.source[i], call.target[i]})
            if (block < 0 || block >= call.blocks) {
                call.detail = i;
                call.value = block;
                return kBadBlock;
            }
    // A block that is both read and written is read first, as if all were read before any is written.
    std::vector<int64_t> written(call.target, call.target + call.count);
    std::sort(written.begin(), written.end());
    std::vector<uint8_t> kept;
    for (int64_t i = 0; i < call.count && kept.empty(); i++)
        if (call.source[i] != call.target[i] && std::binary_search(written.begin(), written.end(), call.source[i]))
            kept.resize(call.count * call.block_bytes);
    if (!kept.empty())
        for_each(call.count, call.threads, [&](int64_t i) {
            std::memcpy(&kept[i * call.block_bytes], call.data + call.source[i] * call.block_bytes, call.block_bytes);
        });
    for_each(call.count, call.threads, [&](int64_t i) {
        const uint8_t* from = kept.empty() ? call.data + call.source[i] * call.block_bytes : &kept[i * call.block_bytes];
        uint8_t* to = call.data + call.target[i] * call.block_bytes;
        if (from != to) std::memcpy(to, from, call.block_bytes);
    });
    return kDone;
}
