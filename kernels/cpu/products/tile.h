// Attention of one item: some rows of queries that read the same keys, chunk by chunk.
#pragma once

#include <cstdlib>
#include <new>

#include "products/direct_bytes.h"
#include "products/direct_settled.h"
#include "products/weigh.h"

// Memory that a thread keeps between calls; each call lays it out anew.
class Arena {
public:
    ~Arena() { std::free(memory_); }

    void restart() { used_ = 0; }

    void reserve(int64_t bytes) {
        used_ = 0;
        if (bytes <= size_) return;
        std::free(memory_);
        size_ = 0;
        memory_ = static_cast<uint8_t*>(std::aligned_alloc(64, round_up(bytes, 64)));
        if (!memory_) throw std::bad_alloc();
        size_ = bytes;
    }

    template <class T>
    T* take(int64_t count) {
        T* taken = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(memory_) + used_);
        used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return taken;
    }

    int64_t used() const { return used_; }

private:
    uint8_t* memory_ = nullptr;
    int64_t size_ = 0, used_ = 0;
};

// How a product is computed: from the cache itself, or packed, in floats, bfloat16 pairs or bytes.
enum class Way { kDirect, kDirectPairs, kDirectBytes, kPackFloats, kPackPairs, kPackBytes };

constexpr int kMostDirectRows = 8;
constexpr int kManyRows = 64;  // from which int8 is sooner made bfloat16 than that weights are split into bytes

inline Way choose_way(int64_t format, int64_t query_format, int64_t dim, int64_t rows) {
    bool few = rows <= kMostDirectRows;
#if KVPASS_DOT
    if (settles(format) && few) return has_code_pairs(format, dim) ? Way::kDirectPairs : Way::kDirect;
    if (few && (format == kInt8 && dim % 32 == 0 || format == kInt4 && dim % 64 == 0)) return Way::kDirectBytes;
    bool pairs = query_format == kBFloat16 && rows >= kManyRows;
    if (format == kInt8 && dim % 16 == 0 && !pairs) return Way::kPackBytes;
    if (format == kInt4 && dim % 32 == 0) return Way::kPackBytes;
    bool exact = format != kFloat32 && format != kFloat16;  // in bfloat16
    if (few && exact && dim % 32 == 0) return Way::kDirectPairs;
    if (!few && query_format == kBFloat16 && exact) return Way::kPackPairs;
#else
    (void)format, (void)query_format, (void)dim;
#endif
    return few ? Way::kDirect : Way::kPackFloats;
}

// Where a thread works: what each head keeps, and below it what all heads use in turn. Rows are padded to a multiple of
// four.
struct Workspace {
    int64_t width, out_width;  // D and Dv, padded
    int64_t rows;
    float *query, *out, *most, *query_unit;
    float* query_total;    // sums of the queries' elements
    float *total, *shift;  // [rows][kLanes], see RowSums
    uint16_t* query_pairs;
    uint8_t* query_bytes;
    int32_t* query_sums;

    float *scores, *expanded, *weight_unit;
    uint32_t *packed_keys, *packed_values;
    uint16_t *weight_pairs, *narrow;
    uint8_t* weight_bytes;
    int32_t* weight_sums;

    // The part of another head.
    Workspace of_head(int64_t head) const {
        Workspace part = *this;
        part.query += head * rows * width;
        part.out += head * rows * out_width;
        part.most += head * rows;
        part.total += head * rows * kLanes;
        part.query_unit += head * rows;
        part.query_total += head * rows;
        part.shift += head * rows * kLanes;
        part.query_pairs += head * 2 * rows * width;
        part.query_bytes += head * 4 * rows * width;
        part.query_sums += head * 2 * rows;
        return part;
    }

    void lay_out(Arena& arena, const AttentionCall& call, int64_t heads, int64_t rows_needed) {
        width = round_up(call.keys.dim, 32);
        out_width = round_up(call.values.dim, 32);
        int64_t both = width > out_width ? width : out_width;
        rows = round_up(rows_needed, 4);
        arena.restart();
        for (int pass = 0; pass < 2; pass++) {  // first to measure
            query = arena.take<float>(heads * rows * width);
            out = arena.take<float>(heads * rows * out_width);
            most = arena.take<float>(heads * rows);
            total = arena.take<float>(heads * rows * kLanes);
            query_unit = arena.take<float>(heads * rows);
            query_total = arena.take<float>(heads * rows);
            shift = arena.take<float>(heads * rows * kLanes);
            query_pairs = arena.take<uint16_t>(heads * 2 * rows * width);
            query_bytes = arena.take<uint8_t>(heads * 4 * rows * width);
            query_sums = arena.take<int32_t>(heads * 2 * rows);
            scores = arena.take<float>(rows * kChunk);
            expanded = arena.take<float>(kChunk * both);
            weight_unit = arena.take<float>(rows);
            packed_keys = arena.take<uint32_t>(width * kChunk);
            packed_values = arena.take<uint32_t>(kChunk * both);
            weight_pairs = arena.take<uint16_t>(2 * rows * kChunk);
            narrow = arena.take<uint16_t>(kChunk * both);
            weight_bytes = arena.take<uint8_t>(2 * rows * kChunk);
            weight_sums = arena.take<int32_t>(rows);
            if (pass == 0) arena.reserve(arena.used());
        }
    }
};

// The rows of the cache that hold a chunk; past its end the last one again, so that no pointer leads elsewhere.
struct ChunkRows {
    int64_t start;
    int count = 0;
    const uint8_t* keys[kChunk];
    const uint8_t* values[kChunk];
    // the scales, of neighbouring slots together
    int runs = 0;
    int run_length[kChunk];
    const uint8_t* key_scales[kChunk];
    const uint8_t* value_scales[kChunk];
    // of settling formats: the channels of each row; null in a wide block, as the scales are
    const uint8_t* key_units[kChunk];
    const uint8_t* value_units[kChunk];
};

class Locator {
public:
    Locator(const AttentionCall& call)
        : call_(call), key_(layout_of(call.keys, call.block_size)), value_(layout_of(call.values, call.block_size)) {
        if (call.latent) value_ = key_;
        scaled_ = key_.scale_bytes || value_.scale_bytes;
        settled_ = settles(call.keys.format);
    }

    void locate(const Item& item, int64_t head, int64_t start, ChunkRows& rows) const {
        rows.start = start;
        rows.runs = 0;
        rows.count = static_cast<int>(std::clamp<int64_t>(item.end - start, 0, kChunk));
        const int64_t* table = call_.tables + item.sequence * call_.table_stride;
        if (settled_) return locate_settled(table, head, rows);
        int64_t size = call_.block_size;
        for (int j = 0; j < rows.count;) {
            int64_t key = start + j, offset = key % size;
            int64_t slab = table[key / size] * call_.kv_heads + head;
            const uint8_t* keys = call_.keys.data + slab * key_.slab_bytes;
            const uint8_t* values = call_.values.data + slab * value_.slab_bytes;
            int run = static_cast<int>(std::min<int64_t>(size - offset, rows.count - j));
            if (scaled_) {
                rows.key_scales[rows.runs] = keys + key_.scale_bytes + 4 * offset;
                rows.value_scales[rows.runs] = values + value_.scale_bytes + 4 * offset;
                prefetch_run(rows.key_scales[rows.runs], 4 * run);
                prefetch_run(rows.value_scales[rows.runs], 4 * run);
                rows.run_length[rows.runs++] = run;
            }
            keys += offset * key_.row_bytes;
            values += offset * value_.row_bytes;
            for (int last = j + run; j < last; j++, keys += key_.row_bytes, values += value_.row_bytes) {
                rows.keys[j] = keys;
                rows.values[j] = values;
            }
        }
        for (int j = rows.count; j < kChunk && rows.count; j++) {
            rows.keys[j] = rows.keys[rows.count - 1];
            rows.values[j] = rows.values[rows.count - 1];
        }
    }

    const Layout& key() const { return key_; }
    const Layout& value() const { return value_; }

private:
    void locate_settled(const int64_t* table, int64_t head, ChunkRows& rows) const {
        for (int j = 0; j < rows.count;) {
            int64_t key = rows.start + j, block = table[key / call_.block_size], offset = key % call_.block_size;
            int64_t left = std::min<int64_t>(call_.block_size - offset, rows.count - j);
            int run = static_cast<int>(std::min(left, kChannelGroup - offset % kChannelGroup));
            SettledRow of_key = find_settled(call_.keys, key_, block, head, offset);
            SettledRow of_value = find_settled(call_.values, value_, block, head, offset);
            rows.key_scales[rows.runs] = of_key.scale;
            rows.value_scales[rows.runs] = of_value.scale;
            rows.run_length[rows.runs++] = run;
            for (int last = j + run; j < last; j++) {
                rows.keys[j] = of_key.codes;
                rows.values[j] = of_value.codes;
                rows.key_units[j] = of_key.units;
                rows.value_units[j] = of_value.units;
                of_key.codes += of_key.row_bytes;
                of_value.codes += of_value.row_bytes;
            }
        }
        for (int j = rows.count; j < kChunk && rows.count; j++) {
            rows.keys[j] = rows.keys[rows.count - 1];
            rows.values[j] = rows.values[rows.count - 1];
            rows.key_units[j] = rows.key_units[rows.count - 1];
            rows.value_units[j] = rows.value_units[rows.count - 1];
        }
    }

    // A row of a block, whose units and scales are fetched; its codes are when their turn comes.
    SettledRow find_settled(
        const CacheArgument& cache, const Layout& layout, int64_t block, int64_t head, int64_t offset
    ) const {
        const uint8_t* slab = settled_slab(cache, layout.slab_bytes, block, call_.kv_heads, head, call_.block_size);
        int64_t codes = call_.block_size * layout.row_bytes;
        if (block >= 0 && offset % call_.block_size == 0) prefetch_run(slab + codes, layout.slab_bytes - codes);
        return settled_row(cache, layout, slab, block < 0, call_.block_size, offset);
    }

    const AttentionCall& call_;
    Layout key_, value_;
    bool scaled_, settled_;
};

// The tails of a chunk, times a number.
INLINE void read_tails(
    const ChunkRows& rows, const uint8_t* const* from, int64_t format, double times, RowTails& tails
) {
    int at = 0;
    for (int i = 0; i < rows.runs; i++) {
        const uint8_t* run = from[i];
        int last = at + rows.run_length[i];
        if (settles(format)) {
            for (; run && at + kLanes <= last; at += kLanes, run += 2 * kLanes)
                store(tails.scales + at, load_elements<kBFloat16>(run, 0));
            for (; at < last; at++, run += run ? 2 : 0) tails.scales[at] = settled_scale(run);
            continue;
        }
        for (; at + 16 <= last; at += 16, run += 64) std::memcpy(tails.scales + at, run, 64);
        for (; at < last; at++, run += 4) std::memcpy(tails.scales + at, run, 4);
    }
    for (; at < kChunk; at++) tails.scales[at] = 0.0f;
    tails.shifted = format == kInt4;
    float factor = static_cast<float>(times);
    for (int i = 0; i < kChunk; i += kLanes) {
        vf scale = load<vf>(tails.scales + i);
        if (tails.shifted) {  // two bfloat16, the scale first
            vi words = as_int(scale);
            store(tails.offsets + i, as_float(words & static_cast<int32_t>(0xffff0000)) * factor);
            scale = as_float(words << 16);
        }
        store(tails.scales + i, scale * factor);
    }
}
