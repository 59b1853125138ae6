// Writing: new tokens into the cache, in its format, and whole blocks from one place to another.
#pragma once

#include <algorithm>

#include "base/convert.h"
#include "products/prepare.h"
#include "base/threads.h"

// One row of floats into the slot `offset` of a slab.
INLINE void store_row(
    const float* row, const CacheArgument& cache, const Layout& layout, uint8_t* slab, int64_t offset, float* unit,
    int8_t* codes
) {
    uint8_t* to = slab + offset * layout.row_bytes;
    if (!layout.scale_bytes) return write_row(row, cache.format, cache.dim, to);
    uint8_t* tail = slab + layout.scale_bytes + 4 * offset;
    if (cache.format == kInt8) {
        store(tail, quantise_row(row, cache.dim, codes));
        std::memcpy(to, codes, cache.dim);
        return;
    }
    int64_t half = cache.dim / 2;
    store(tail, fit_codes(row, cache.dim, unit, codes));
    for (int64_t i = 0; i < half; i++) to[i] = static_cast<uint8_t>((codes[i] + 8) | ((codes[half + i] + 8) << 4));
}

// Where a thread works on one row.
struct RowSpace {
    std::vector<float> row, unit;
    std::vector<int8_t> codes;

    void make_room(int64_t width) {
        if (static_cast<int64_t>(codes.size()) >= width + kLanes) return;
        row.resize(width + kLanes);
        unit.resize(width + kLanes);
        codes.resize(width + kLanes);
    }
};

class Writer {
public:
    Writer(const WriteCall& call)
        : call_(call), layouts_{layout_of(call.cache[0], call.block_size), layout_of(call.cache[1], call.block_size)} {}

    // All rows of a token.
    void write(int64_t t, RowSpace& space) const {
        for (int64_t head = 0; head < call_.query_heads; head++) {
            float* row = prepare(kQuery, t, head, call_.query_weight, space);
            int64_t dim = call_.cache[kKey].dim, at = (t * call_.query_heads + head) * dim;
            write_row(row, call_.source_format[kQuery], dim, call_.query_out + at * bytes_of(kQuery));
        }
        bool unchanged = !call_.key_weight && !call_.cos;
        for (int64_t head = 0; head < call_.kv_heads; head++) {
            if (unchanged)
                copy_or_store(kKey, t, head, space);
            else
                store(kKey, prepare(kKey, t, head, call_.key_weight, space), t, head, space);
            if (call_.cache[kValue].data) copy_or_store(kValue, t, head, space);
        }
    }

private:
    enum Part { kKey, kValue, kQuery };

    int64_t bytes_of(Part part) const { return call_.source_format[part] == kFloat32 ? 4 : 2; }

    const uint8_t* source(Part part, int64_t t, int64_t head) const {
        int64_t at = t * call_.token_stride[part] + head * call_.head_stride[part];
        return call_.source[part] + at * bytes_of(part);
    }

    // A row of keys or queries after norm and rotation.
    float* prepare(Part part, int64_t t, int64_t head, const float* weight, RowSpace& space) const {
        float* row = space.row.data();
        int64_t dim = call_.cache[kKey].dim, angle = t * call_.rotary;
        read_row(source(part, t, head), call_.source_format[part], dim, row);
        if (weight) norm_row(row, dim, weight, static_cast<float>(call_.eps));
        if (call_.cos) rotate_row(row, call_.rotary, call_.cos + angle, call_.sin + angle, call_.interleaved);
        return row;
    }

    uint8_t* slab(Part part, int64_t t, int64_t head) const {
        int64_t block = call_.slots[t] / call_.block_size;
        return call_.cache[part].data + (block * call_.kv_heads + head) * layouts_[part].slab_bytes;
    }

    void store(Part part, const float* row, int64_t t, int64_t head, RowSpace& space) const {
        store_row(
            row, call_.cache[part], layouts_[part], slab(part, t, head), call_.slots[t] % call_.block_size,
            space.unit.data(), space.codes.data()
        );
    }

    void copy_or_store(Part part, int64_t t, int64_t head, RowSpace& space) const {
        const uint8_t* from = source(part, t, head);
        const CacheArgument& cache = call_.cache[part];
        if (call_.source_format[part] == cache.format) {
            int64_t offset = call_.slots[t] % call_.block_size * layouts_[part].row_bytes;
            std::memcpy(slab(part, t, head) + offset, from, layouts_[part].row_bytes);
            return;
        }
        read_row(from, call_.source_format[part], cache.dim, space.row.data());
        store(part, space.row.data(), t, head, space);
    }

    const WriteCall& call_;
    const Layout layouts_[2];
};

inline int64_t write_cache(WriteCall& call) {
    for (int64_t t = 0; t < call.tokens; t++)
        if (call.slots[t] < 0 || call.slots[t] >= call.blocks * call.block_size) {
            call.detail = t;
            call.value = call.slots[t];
            return kBadSlot;
        }
    const Writer writer(call);
    int64_t widest = std::max(call.cache[0].dim, call.cache[1].dim);
    constexpr int64_t kStretch = 16;  // tokens that a thread takes at once
    int64_t stretches = (call.tokens + kStretch - 1) / kStretch;
    std::atomic<bool> failed{false};
    for_each(stretches, call.threads, [&](int64_t i) {
        static thread_local RowSpace space;
        try {
            space.make_room(widest);
        } catch (const std::bad_alloc&) {
            failed = true;
            return;
        }
        for (int64_t t = i * kStretch; t < std::min(call.tokens, (i + 1) * kStretch); t++) writer.write(t, space);
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
