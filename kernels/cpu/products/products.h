// The two products of a tile, each in the way that suits format, rows and machine.
#pragma once

#include "base/dispatch.h"
#include "products/tile.h"

class Products {
public:
    Products(const AttentionCall& call, const Workspace& space, int rows)
        : call_(call), w_(space), rows_(rows),
          key_way_(choose_key_way(call, rows)),
          value_row_(call.latent && call.values.format == kInt4 ? call.keys.dim : call.values.dim),
          value_way_(choose_value_way(call, value_row_, rows)),
          pair_parts_(call.query_format == kBFloat16 ? 1 : 2),
          key_parts_(call.keys.format == kInt4 && call.query_format == kBFloat16 ? 1 : 2) {}

    const Workspace& space() const { return w_; }

    // Brings the query, already in floats, into the form that the keys' way multiplies.
    void prepare_query() {
#if KVPASS_DOT
        for (int r = 0; r < rows_; r++) {
            const float* row = w_.query + r * w_.width;
            if (key_way_ == Way::kDirectPairs || key_way_ == Way::kPackPairs) {
                uint16_t* pairs = w_.query_pairs + r * pair_parts_ * w_.width;
                split_row(row, w_.width, pair_parts_, pairs, pairs + w_.width);
            } else if (key_way_ == Way::kDirectBytes || key_way_ == Way::kPackBytes) {
                int8_t* bytes = reinterpret_cast<int8_t*>(w_.query_bytes) + r * key_parts_ * w_.width;
                w_.query_unit[r] =
                    quantise_query(row, call_.keys.dim, key_parts_, bytes, bytes + w_.width, w_.query_sums + 2 * r);
            }
        }
#endif
    }

    // w.scores[r][j] = query[r] . key[j]
    void scores(const ChunkRows& chunk, const Share& share) {
        int columns = static_cast<int>(round_up(chunk.count, 16));
        int64_t dim = call_.keys.dim;
        switch (key_way_) {
            case Way::kDirect: return direct_float_scores(chunk, columns, share);
            case Way::kPackFloats: {
                expand(call_.keys.format, chunk.keys, chunk.key_units, columns, dim, w_.width);
                float* packed = reinterpret_cast<float*>(w_.packed_keys);
                transpose_floats(w_.expanded, w_.width, columns, dim, packed);
                multiply<FloatProduct>(
                    reinterpret_cast<uint32_t*>(w_.query), w_.packed_keys, rows_, dim, columns,
                    {w_.width, kPanel, w_.width * kPanel}, share, Set{w_.scores, kChunk}
                );
                return;
            }
#if KVPASS_DOT
            case Way::kDirectPairs:
                if (pair_parts_ == 1) return direct_pairs<1>(chunk, columns, share);
                return direct_pairs<2>(chunk, columns, share);
            case Way::kDirectBytes:
                if (call_.keys.format == kInt8) return direct_bytes<kInt8, 2>(chunk, columns, share);
                if (key_parts_ == 1) return direct_bytes<kInt4, 1>(chunk, columns, share);
                return direct_bytes<kInt4, 2>(chunk, columns, share);
            case Way::kPackPairs: {
                int64_t padded = round_up(dim, 32);
                const uint8_t* rows[kChunk];
                narrow(call_.keys.format, chunk.keys, chunk.key_units, columns, dim, dim, rows);
                transpose_units(rows, columns, 2 * padded, w_.packed_keys);
                multiply<PairProduct>(
                    reinterpret_cast<uint32_t*>(w_.query_pairs), w_.packed_keys, rows_, padded / 2, columns,
                    {w_.width / 2, kPanel, padded / 2 * kPanel}, share, Set{w_.scores, kChunk}
                );
                return;
            }
            case Way::kPackBytes: return packed_byte_scores(chunk, columns, share);
#endif
            default: return;
        }
    }

    // w.out[r] += weights[r] . values, where the weights stand in w.scores
    void values(const ChunkRows& chunk, const Share& share) {
        int count = static_cast<int>(round_up(chunk.count, 16));
        int64_t dim = call_.values.dim;
        switch (value_way_) {
            case Way::kDirect: return direct_float_values(chunk, share);
            case Way::kPackFloats: {
                // a latent's values are the keys that have just been expanded
                int64_t width = call_.latent ? w_.width : w_.out_width;
                if (!call_.latent || key_way_ != Way::kPackFloats)
                    expand(call_.values.format, chunk.values, chunk.value_units, count, value_row_, width);
                multiply<FloatProduct>(
                    reinterpret_cast<uint32_t*>(w_.scores), reinterpret_cast<uint32_t*>(w_.expanded), rows_, count,
                    round_up(dim, kLanes), {kChunk, width, kPanel}, share, Add{w_.out, w_.out_width}
                );
                return;
            }
#if KVPASS_DOT
            case Way::kDirectPairs: {
                if (settles(call_.values.format) && chunk.start % 2) return direct_float_values(chunk, share);
                split_weights_to_pairs(pair_parts_);
                if (pair_parts_ == 1) return direct_pair_values<1>(chunk, share);
                return direct_pair_values<2>(chunk, share);
            }
            case Way::kDirectBytes:
                if (call_.values.format == kInt4) return direct_nibble_values(chunk, count, share);
                for (int r = 0; r < rows_; r++) {
                    uint8_t* high = w_.weight_bytes + r * kChunk;
                    w_.weight_unit[r] = split_weights(w_.scores + r * kChunk, kChunk, high, high + w_.rows * kChunk);
                }
                return add_byte_values<kInt8, false>(w_.weight_bytes, chunk, count, share);
            case Way::kPackPairs: {
                split_weights_to_pairs(1);
                int64_t padded = round_up(dim, 32);
                const uint8_t* rows[kChunk];
                if (call_.latent && key_way_ == Way::kPackPairs && call_.keys.format != kBFloat16)
                    for (int j = 0; j < count; j++) rows[j] = reinterpret_cast<uint8_t*>(w_.narrow + j * w_.width);
                else
                    narrow(call_.values.format, chunk.values, chunk.value_units, count, value_row_, dim, rows);
                interleave_pairs(rows, count, padded, w_.packed_values);
                multiply<PairProduct>(
                    reinterpret_cast<uint32_t*>(w_.weight_pairs), w_.packed_values, rows_, count / 2, padded,
                    {kChunk / 2, kPanel, count / 2 * kPanel}, share, Add{w_.out, w_.out_width}
                );
                return;
            }
            case Way::kPackBytes: return packed_byte_values(chunk, count, share);
#endif
            default: return;
        }
    }

private:
    int fours() const { return (rows_ + 3) / 4; }  // that rows are served in

    // Up to 16 rows it takes longer to transpose keys than to sum up each product across its vector, where these can be
    // multiplied as they stand.
    static Way choose_key_way(const AttentionCall& call, int rows) {
        bool some = call.keys.format == kBFloat16 && rows <= 2 * kMostDirectRows;
        return choose_way(call.keys.format, call.query_format, call.keys.dim, some ? std::min(rows, kMostDirectRows) : rows);
    }

    static Way choose_value_way(const AttentionCall& call, int64_t row_dim, int rows) {
        Way way = choose_way(call.values.format, call.query_format, row_dim | call.values.dim, rows);
        bool part = row_dim != call.values.dim;  // of the row, whose halves lie apart
        return part && way == Way::kDirectBytes ? Way::kPackBytes : way;
    }

    // The rows as a format that can be loaded in order: what is narrower than a byte is expanded, all else is as it stands.
    int64_t readable(
        int64_t format, const uint8_t* const* from, const uint8_t* const* units, int count, int64_t dim,
        const uint8_t** rows
    ) {
        int64_t width = round_up(dim, 32);
        std::memcpy(rows, from, sizeof(*rows) * kChunk);
        if (format != kInt4 && !settles(format)) return format;
        expand(format, from, units, count, dim, width);
        for (int j = 0; j < kChunk; j++)
            rows[j] = reinterpret_cast<uint8_t*>(w_.expanded + (j < count ? j : count - 1) * width);
        return kFloat32;
    }

    void direct_float_scores(const ChunkRows& chunk, int columns, const Share& share) {
        const uint8_t* rows[kChunk];
        int64_t dim = call_.keys.dim;
        int64_t format = readable(call_.keys.format, chunk.keys, chunk.key_units, chunk.count, dim, rows);
        with_format(format, [&](auto f) {
            if constexpr (f != kInt4)
                with_rows(rows_, [&](int r, auto R) {
                    direct_scores<f, R>(
                        w_.query + r * w_.width, w_.width, rows, columns, dim, w_.scores + r * kChunk,
                        share.part(fours())
                    );
                });
        });
    }

    void direct_float_values(const ChunkRows& chunk, const Share& share) {
        const uint8_t* rows[kChunk];
        int64_t dim = call_.values.dim;
        int64_t format = readable(call_.values.format, chunk.values, chunk.value_units, chunk.count, value_row_, rows);
        with_format(format, [&](auto f) {
            if constexpr (f != kInt4)
                with_rows(rows_, [&](int r, auto R) {
                    direct_values<f, R>(
                        w_.scores + r * kChunk, rows, chunk.count, dim, w_.out + r * w_.out_width, w_.out_width,
                        share.part(fours())
                    );
                });
        });
    }

    void expand(
        int64_t format, const uint8_t* const* from, const uint8_t* const* units, int count, int64_t dim, int64_t width
    ) {
        if (settles(format)) {
            for (int j = 0; j < count; j++) expand_settled(format, from[j], units[j], dim, w_.expanded + j * width);
            return;
        }
        with_format(format, [&](auto f) {
            for (int j = 0; j < count; j++) expand_row<f>(from[j], dim, w_.expanded + j * width);
        });
    }

#if KVPASS_DOT
    // Pointers to the first `dim` elements of the rows in bfloat16, padded: to the cache where it holds whole vectors.
    void narrow(
        int64_t format, const uint8_t* const* from, const uint8_t* const* units, int count, int64_t row_dim,
        int64_t dim, const uint8_t** rows
    ) {
        int64_t padded = round_up(dim, 32);
        if (format == kBFloat16 && dim == padded) {
            for (int j = 0; j < count; j++) rows[j] = from[j];
            return;
        }
        for (int j = 0; j < count; j++) rows[j] = reinterpret_cast<uint8_t*>(w_.narrow + j * padded);
        auto finish = [&](float* row, uint16_t* to) {
            for (int64_t i = dim; i < padded; i++) row[i] = 0.0f;
            split_row(row, padded, 1, to, nullptr);
        };
        if (settles(format)) {
            for (int j = 0; j < count; j++) {
                expand_settled(format, from[j], units[j], row_dim, w_.expanded);
                finish(w_.expanded, w_.narrow + j * padded);
            }
            return;
        }
        with_format(format, [&](auto f) {
            for (int j = 0; j < count; j++) {
                uint16_t* to = w_.narrow + j * padded;
                if constexpr (f == kInt8 || f == kE4M3 || f == kE5M2) {
                    if (dim == padded) {
                        for (int64_t i = 0; i < dim; i += 32) _mm512_storeu_si512(to + i, load_pairs<f>(from[j], i));
                        continue;
                    }
                }
                expand_row<f>(from[j], row_dim, w_.expanded);
                finish(w_.expanded, to);
            }
        });
    }

    template <int Parts>
    void direct_pairs(const ChunkRows& chunk, int columns, const Share& share) {
        int64_t dim = call_.keys.dim;
        const uint16_t* pairs = w_.query_pairs;
        if (settles(call_.keys.format))
            return with_rows(rows_, [&](int r, auto R) {
                settled_scores<R, Parts>(
                    w_.query + r * w_.width, pairs + r * Parts * w_.width, w_.width, chunk.keys, chunk.key_units,
                    chunk.count, dim, w_.narrow, w_.scores + r * kChunk, share.part(fours())
                );
            });
        with_pairs_format(call_.keys.format, [&](auto f) {
            with_rows(rows_, [&](int r, auto R) {
                dot_scores<R, Parts>(
                    RowPairs<f>{}, pairs + r * Parts * w_.width, w_.width, chunk.keys, columns, dim,
                    w_.scores + r * kChunk, share.part(fours())
                );
            });
        });
    }

    template <int F, int Parts>
    void direct_bytes(const ChunkRows& chunk, int columns, const Share& share) {
        const SetScores<Parts> finish{w_.scores, kChunk, w_.query_unit, w_.query_sums, F == kInt4 ? 8 : 128};
        with_rows(rows_, [&](int r, auto R) {
            const int8_t* query = reinterpret_cast<int8_t*>(w_.query_bytes) + r * Parts * w_.width;
            byte_scores<F, R * Parts>(
                query, w_.width, chunk.keys, columns, call_.keys.dim, r, share.part(fours()), finish
            );
        });
    }

    void direct_nibble_values(const ChunkRows& chunk, int count, const Share& share) {
        bool enough = true;
        uint8_t *high = w_.weight_bytes, *low = high + w_.rows * kChunk;
        auto each = [&](const auto& convert) {
            for (int r = 0; r < rows_; r++)
                convert(w_.scores + r * kChunk, r * kChunk, w_.weight_unit[r], w_.shift + r * kLanes);
        };
        each([&](const float* row, int at, float& unit, float* shift) {
            enough &= weights_to_bytes(row, high + at, unit, shift);
        });
        add_byte_values<kInt4, false>(high, chunk, count, share);
        if (enough) return;
        each([&](const float* row, int at, float& unit, float* shift) {
            rest_to_bytes(row, high + at, low + at, unit, shift);
        });
        add_byte_values<kInt4, true>(low, chunk, count, {share.fetcher, 0});
    }

    template <int F, bool Signed>
    void add_byte_values(const uint8_t* weights, const ChunkRows& chunk, int count, const Share& share) {
        int64_t dim = call_.values.dim;
        with_rows(rows_, [&](int r, auto R) {
            const WeightBytes bytes{weights + r * kChunk, w_.rows * kChunk, w_.weight_unit + r};
            float* out = w_.out + r * w_.out_width;
            const Share next = share.part(fours());
            if (dim % (F == kInt4 ? 128 : 64) == 0)
                direct_byte_values<F, R, false, Signed>(bytes, chunk.values, count, dim, out, w_.out_width, next);
            else
                direct_byte_values<F, R, true, Signed>(bytes, chunk.values, count, dim, out, w_.out_width, next);
        });
    }

    void split_weights_to_pairs(int parts) {
        for (int r = 0; r < rows_; r++) {
            uint16_t* pairs = w_.weight_pairs + r * parts * kChunk;
            split_row(w_.scores + r * kChunk, kChunk, parts, pairs, pairs + kChunk);
        }
    }

    template <int Parts>
    void direct_pair_values(const ChunkRows& chunk, const Share& share) {
        int count = static_cast<int>(round_up(chunk.count, 2));
        int64_t dim = call_.values.dim;
        auto each_rows = [&](auto body) {
            with_rows(rows_, [&](int r, auto R) {
                body(
                    R, reinterpret_cast<uint32_t*>(w_.weight_pairs + r * Parts * kChunk), w_.out + r * w_.out_width,
                    share.part(fours())
                );
            });
        };
        if (settles(call_.values.format))
            return each_rows([&](auto R, const uint32_t* weights, float* out, const Share& next) {
                settled_values<R, Parts>(weights, chunk.values, chunk.value_units, count, dim, out, w_.out_width, next);
            });
        with_pairs_format(call_.values.format, [&](auto f) {
            each_rows([&](auto R, const uint32_t* weights, float* out, const Share& next) {
                dot_values<R, Parts>(RowPairs<f>{}, weights, chunk.values, count, dim, out, w_.out_width, next);
            });
        });
    }

    void packed_byte_scores(const ChunkRows& chunk, int columns, const Share& share) {
        int64_t dim = call_.keys.dim;
        bool four = call_.keys.format == kInt4;
        if (four)
            pack_byte_keys<kInt4>(chunk.keys, columns, dim, w_.packed_keys);
        else
            pack_byte_keys<kInt8>(chunk.keys, columns, dim, w_.packed_keys);
        auto product = [&](const auto& finish) {
            multiply<SignedRowProduct>(
                reinterpret_cast<uint32_t*>(w_.query_bytes), w_.packed_keys, rows_ * key_parts_, dim / 4, columns,
                {w_.width / 4, kPanel, dim / 4 * kPanel}, share, finish
            );
        };
        int32_t offset = four ? 8 : 128;
        if (key_parts_ == 2)
            product(SetScores<2>{w_.scores, kChunk, w_.query_unit, w_.query_sums, offset});
        else
            product(SetScores<1>{w_.scores, kChunk, w_.query_unit, w_.query_sums, offset});
    }

    void packed_byte_values(const ChunkRows& chunk, int count, const Share& share) {
        int64_t dim = call_.values.dim;
        bool four = call_.values.format == kInt4;
        if (four)
            pack_byte_values<kInt4>(chunk.values, count, value_row_, w_.packed_values);
        else
            pack_byte_values<kInt8>(chunk.values, count, dim, w_.packed_values);
        for (int r = 0; r < rows_; r++) {
            uint8_t* bytes = w_.weight_bytes + 2 * r * kChunk;
            const float* weights = w_.scores + r * kChunk;
            w_.weight_sums[r] = 0;
            w_.weight_unit[r] =
                four ? split_signed_weights(weights, kChunk, bytes, bytes + kChunk, w_.weight_sums + r)
                     : split_weights(weights, kChunk, bytes, bytes + kChunk);
        }
        const uint32_t* bytes = reinterpret_cast<uint32_t*>(w_.weight_bytes);
        const Strides strides{kChunk / 4, kPanel, count / 4 * kPanel};
        const AddValues finish{w_.out, w_.out_width, w_.weight_unit, w_.weight_sums, 8};
        if (four)  // codes are unsigned bytes, and so weights signed ones
            multiply<SignedRowProduct>(bytes, w_.packed_values, 2 * rows_, count / 4, dim, strides, share, finish);
        else
            multiply<UnsignedRowProduct>(bytes, w_.packed_values, 2 * rows_, count / 4, dim, strides, share, finish);
    }
#endif

    const AttentionCall& call_;
    const Workspace w_;
    const int rows_;
    const Way key_way_;
    const int64_t value_row_;  // elements to unpack of a value row: of a latent in int4 all, as its halves lie apart
    const Way value_way_;
    const int pair_parts_, key_parts_;
};
