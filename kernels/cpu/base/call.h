// The plain C interface: what the Python side packs, field by field, each eight bytes wide (see backend.py).
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define KVPASS_EXPORT extern "C" __declspec(dllexport)
#else
#define KVPASS_EXPORT extern "C" __attribute__((visibility("default")))
#endif

enum Format : int64_t { kFloat32, kBFloat16, kFloat16, kE4M3, kE5M2, kInt8, kInt4, kK4, kV2, kFormats };

// Why a call was refused; the Python side makes the message.
enum Status : int64_t {
    kDone = 0,
    kBadStarts = 1,       // query_start does not begin with 0, or does not end with T
    kBadLength = 2,       // detail: the sequence whose new tokens, length and blocks do not fit
    kBadBlock = 3,        // detail: the sequence, value: the block id
    kShortBias = 4,       // value: tokens needed
    kBadSlot = 5,         // detail: the token, value: the slot
    kBadGroup = 6,        // detail: the group whose sequences do not share what they should
    kShortTree = 7,       // value: columns needed
    kOutOfMemory = 8,
};

// One of the two tensors of a cache: slabs of P rows, one per block and KV head; see kernels/formats.py.
struct CacheArgument {
    uint8_t* data;
    int64_t format;
    int64_t dim;
    uint8_t* end;  // behind the last slab; where the wide blocks of a settling format are counted from
};

struct AttentionCall {
    // [T, Hq, D], the last dim contiguous; strides in elements
    const uint8_t* query;
    int64_t query_format, tokens, query_token_stride, query_head_stride, heads;
    CacheArgument keys, values;
    int64_t blocks, kv_heads, block_size;
    // block_tables [N, W], seq_lens [N], query_start [N + 1]
    const int64_t* tables;
    int64_t table_stride, table_width;
    const int64_t* lengths;
    const int64_t* starts;
    int64_t sequences;
    // scores; softcap 0, window 0 and chunk 0 mean none
    double scale, softcap;
    int64_t window, chunk;
    const float* slopes;
    const float* sinks;
    const float* bias;
    int64_t bias_heads, bias_length, bias_by_pair;
    const uint8_t* tree;
    int64_t tree_width;
    // cascade: shared_start [groups + 1], shared_lens [groups]
    const int64_t* shared_start;
    const int64_t* shared_lengths;
    int64_t groups;
    // out [T, Hq, Dv] in the query's dtype; lse [T, Hq] and mass [N, Hkv, W * P] or null
    uint8_t* out;
    float* lse;
    float* mass;
    int64_t threads;
    int64_t latent;  // the values are the first elements of the key rows
    // written by the call when it refuses
    int64_t detail, value;
};

struct WriteCall {
    // new keys, values and, for what comes before an attention, queries: [T, H, D], the last dim contiguous; strides in
    // elements
    const uint8_t* source[3];
    int64_t source_format[3], token_stride[3], head_stride[3];
    CacheArgument cache[2];
    int64_t tokens, blocks, kv_heads, block_size;
    const int64_t* slots;
    int64_t query_heads;  // 0 without queries
    uint8_t* query_out;   // [T, Hq, D] in the queries' dtype
    // RMS norm of keys and of queries: weights [D], or null for none
    const float* key_weight;
    const float* query_weight;
    double eps;
    // rotation of keys and queries: [T, rotary], or null for none
    const float* cos;
    const float* sin;
    int64_t rotary, interleaved;
    int64_t threads;
    int64_t detail, value;
};

struct GatherCall {
    CacheArgument cache;
    int64_t blocks, kv_heads, block_size;
    // block_tables [N, W], seq_lens [N]
    const int64_t* tables;
    int64_t table_width;
    const int64_t* lengths;
    int64_t sequences;
    float* out;  // [N, W * P, Hkv, D]
    int64_t threads;
    int64_t detail, value;
};

struct SettleCall {
    CacheArgument cache;
    int64_t blocks, wide_blocks, kv_heads, block_size;
    const int64_t* source;  // [count], wide blocks
    const int64_t* target;  // [count], settled ones
    int64_t count;
    int64_t threads;
    int64_t detail, value;
};

struct CopyCall {
    uint8_t* data;
    int64_t block_bytes, blocks;
    const int64_t* source;
    const int64_t* target;
    int64_t count;
    int64_t threads;
    int64_t detail, value;
};

// The fields of a slab.
struct Layout {
    int64_t row_bytes;    // elements of one token
    int64_t scale_bytes;  // offset of the tails in the slab, 4 bytes for each of P rows; 0 if the format has none
    int64_t slab_bytes;
};

inline bool settles(int64_t format) { return format == kK4 || format == kV2; }

inline Layout layout_of(const CacheArgument& cache, int64_t block_size) {
    static const int64_t kBits[kFormats] = {32, 16, 16, 8, 8, 8, 4, 4, 2};
    Layout layout;
    layout.row_bytes = cache.dim * kBits[cache.format] / 8;
    bool scaled = cache.format == kInt8 || cache.format == kInt4;
    layout.scale_bytes = scaled ? layout.row_bytes * block_size : 0;
    if (settles(cache.format)) {  // 16-bit scales, and for keys a byte for each channel of 16 tokens
        layout.scale_bytes = block_size * (layout.row_bytes + (cache.format == kK4 ? cache.dim / 16 : 0));
        layout.slab_bytes = layout.scale_bytes + 2 * block_size;
        return layout;
    }
    layout.slab_bytes = layout.row_bytes * block_size + (scaled ? 4 * block_size : 0);
    return layout;
}
