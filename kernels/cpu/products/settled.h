// The settling formats, k4 for keys and v2 for values: reading rows of either kind of block. See kernels/settling.py.
#pragma once

#include "base/simd.h"

constexpr int64_t kChannelGroup = 16;  // tokens that share the bytes of their channels
constexpr uint32_t kChannelBias = 761;

// Where the slab of a head lies: settled blocks from the beginning of the cache on, wide ones, of negative number, from
// its end.
INLINE uint8_t* settled_slab(
    const CacheArgument& cache, int64_t slab_bytes, int64_t block, int64_t kv_heads, int64_t head, int64_t block_size
) {
    int64_t slab = block * kv_heads + head;
    return block >= 0 ? cache.data + slab * slab_bytes : cache.end + slab * block_size * cache.dim * 2;
}

INLINE float channel_unit(uint8_t byte) {
    uint32_t bits = (byte + kChannelBias) << 20;
    float unit;
    std::memcpy(&unit, &bits, 4);
    return unit;
}

// A row of a settling format as floats without its token's scale, padded with zeros to a multiple of kLanes. `units`:
// the channels' bytes of its group; null for a row of a wide block. For values, anything but null.
INLINE void expand_settled(int64_t format, const uint8_t* row, const uint8_t* units, int64_t dim, float* out) {
    for (int64_t i = dim; i % kLanes; i++) out[i] = 0.0f;
    if (!units) {
        int64_t i = 0;
        for (; i + kLanes <= dim; i += kLanes) store(out + i, load_elements<kBFloat16>(row, i));
        for (; i < dim; i++) out[i] = from_bfloat16(load<uint16_t>(row + 2 * i));
        return;
    }
    int64_t parts = format == kK4 ? 2 : 4, bits = 8 / parts, width = dim / parts, mask = (1 << bits) - 1;
    float middle = format == kK4 ? 8.0f : 1.5f;
    for (int64_t part = 0; part < parts; part++) {
        int64_t shift = part * bits, i = 0;
        float* to = out + part * width;
        const uint8_t* own = units + part * width;
        for (; i + kLanes <= width; i += kLanes) {
            vi byte = load_bytes<false>(row + i);
            vf number = __builtin_convertvector((byte >> static_cast<int>(shift)) & static_cast<int>(mask), vf) - middle;
            if (format == kK4) {
                vi unit = load_bytes<false>(own + i) + static_cast<int>(kChannelBias);
                number *= as_float(unit << 20);
            }
            store(to + i, number);
        }
        for (; i < width; i++) {
            to[i] = static_cast<float>((row[i] >> shift) & mask) - middle;
            if (format == kK4) to[i] *= channel_unit(own[i]);
        }
    }
}

// Where a row of either kind of block lies, and how far the next ones are from it.
struct SettledRow {
    const uint8_t* codes;
    int64_t row_bytes;
    const uint8_t* units;  // of its group of tokens; null in a wide block
    const uint8_t* scale;  // a bfloat16, those of the next rows behind it; null in a wide block
};

INLINE float settled_scale(const uint8_t* scale) { return scale ? from_bfloat16(load<uint16_t>(scale)) : 1.0f; }

INLINE SettledRow settled_row(
    const CacheArgument& cache, const Layout& layout, const uint8_t* slab, bool wide, int64_t block_size, int64_t offset
) {
    if (wide) return {slab + 2 * offset * cache.dim, 2 * cache.dim, nullptr, nullptr};
    int64_t group = cache.format == kK4 ? offset / kChannelGroup * cache.dim : 0;
    return {
        slab + offset * layout.row_bytes, layout.row_bytes, slab + block_size * layout.row_bytes + group,
        slab + layout.scale_bytes + 2 * offset
    };
}
