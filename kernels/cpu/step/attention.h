// Attention of one step: items are computed on all threads, and what several items share is merged.
#pragma once

#include <vector>

#include "base/convert.h"
#include "products/products.h"
#include "base/threads.h"

// Partial results of rows that several items share, by slot and query head.
struct Partials {
    float* out;
    float* most;
    float* total;
};

constexpr int64_t kAhead = 2;  // how many steps before it is read memory is fetched

class Attention {
public:
    Attention(const AttentionCall& call, const Plan& plan, const Partials& partials)
        : call_(call), plan_(plan), partials_(partials), weigher_(call, plan), locator_(call),
          group_(call.heads / call.kv_heads) {}

    void run(const Item& item, Arena& arena) const {
        int rows = item.tokens * item.group_rows;
        Workspace space;
        space.lay_out(arena, call_, item.heads, rows);
        std::vector<Products>& products = own_products();
        products.clear();
        for (int64_t h = 0; h < item.heads; h++) {
            start(item, item.head + h, space.of_head(h), rows);
            products.emplace_back(call_, space.of_head(h), rows);
            products.back().prepare_query();
        }
        ChunkRows ring[kAhead + 1];
        auto locate = [&](int64_t index) -> ChunkRows& {
            ChunkRows& chunk = ring[index % (kAhead + 1)];
            locator_.locate(item, item.head + index % item.heads, item.begin + index / item.heads * kChunk, chunk);
            return chunk;
        };
        for (int64_t i = 0; i < kAhead; i++) {
            Fetcher first = fetcher_of(locate(i));
            first.fetch(first.wanted());
            first.fetch(first.wanted());
        }
        int64_t steps = (std::max(item.end - item.begin, 0) + kChunk - 1) / kChunk * item.heads;
        for (int64_t i = 0; i < steps; i++) {
            int64_t h = i % item.heads;
            const ChunkRows& later = locate(i + kAhead);
            step(item, item.head + h, products[h], ring[i % (kAhead + 1)], later);
        }
        for (int64_t h = 0; h < item.heads; h++)
            for (int r = 0; r < rows; r++) finish(item, item.head + h, space.of_head(h), r);
    }

    // Adds the final weights of all rows of a sequence on the keys [begin, end) of one head to call.mass.
    void add_mass(int64_t sequence, int64_t kv_head, int64_t begin, int64_t end, Arena& arena) const {
        int64_t first = call_.starts[sequence], last = call_.starts[sequence + 1];
        int64_t at_once = std::max<int64_t>(1, plan_.most_rows / group_);
        float* mass = call_.mass + (sequence * call_.kv_heads + kv_head) * call_.table_width * call_.block_size;
        for (int64_t t = first; t < last; t += at_once) {
            Item item{};
            item.first = static_cast<int32_t>(t);
            item.tokens = static_cast<int32_t>(std::min(at_once, last - t));
            item.head = static_cast<int32_t>(kv_head);
            item.sequence = static_cast<int32_t>(sequence);
            int64_t low = INT32_MAX, high = 0;
            for (int64_t i = t; i < t + item.tokens; i++) {
                low = std::min<int64_t>(low, plan_.tokens[i].low);
                high = std::max<int64_t>(high, plan_.tokens[i].high);
            }
            item.begin = static_cast<int32_t>(std::max(begin, low));
            item.end = static_cast<int32_t>(std::min(end, high));
            for (int64_t g = 0; g < group_; g += plan_.most_rows) {
                item.group_first = static_cast<int32_t>(g);
                item.group_rows = static_cast<int32_t>(std::min(plan_.most_rows, group_ - g));
                add_mass_of(item, mass, arena);
            }
        }
    }

    // The final result of a token and head whose keys were cut into parts.
    void merge(int64_t t, int64_t head, Arena& arena) const {
        const Token& token = plan_.tokens[t];
        if (token.parts < 2) return;
        int64_t dim = call_.values.dim;
        arena.restart();
        arena.reserve(4 * round_up(dim, 32));
        float* sum = arena.take<float>(dim);
        float most = -INFINITY, total = 0;
        for (int p = 0; p < token.parts; p++) {
            float other = partials_.most[(token.slot + p) * call_.heads + head];
            most = other > most || other != other ? other : most;
        }
        std::fill(sum, sum + dim, 0.0f);
        for (int p = 0; p < token.parts; p++) {
            int64_t slot = (token.slot + p) * call_.heads + head;
            if (partials_.most[slot] == -INFINITY && partials_.total[slot] == 0.0f) continue;
            float factor = std::exp(partials_.most[slot] - most);
            total += partials_.total[slot] * factor;
            const float* part = partials_.out + slot * dim;
            for (int64_t i = 0; i < dim; i++) sum[i] += part[i] * factor;
        }
        write(t, head, sum, most, total);
    }

private:
    Fetcher fetcher_of(const ChunkRows& chunk) const {
        return {{chunk.keys, locator_.key().row_bytes, chunk.count},
                {chunk.values, locator_.value().row_bytes, call_.latent ? 0 : chunk.count}};
    }

    static std::vector<Products>& own_products() {
        static thread_local std::vector<Products> products;
        return products;
    }

    // One chunk of one head; what a later one needs is fetched meanwhile.
    void step(
        const Item& item, int64_t kv_head, Products& products, const ChunkRows& chunk, const ChunkRows& later
    ) const {
        const Workspace& w = products.space();
        RowTails key_tails, value_tails;
        Keys keys{chunk.start, chunk.count, nullptr, nullptr};
        if (locator_.key().scale_bytes) {
            read_tails(chunk, chunk.key_scales, call_.keys.format, call_.scale, key_tails);
            keys.key_tails = &key_tails;
        }
        Fetcher fetcher = fetcher_of(later);
        const Share whole{fetcher, fetcher.wanted()}, eighth = whole.part(8);
        int rows = item.tokens * item.group_rows;
        products.scores(chunk, {fetcher, 3 * eighth.portions});
        if (locator_.value().scale_bytes) {
            read_tails(chunk, chunk.value_scales, call_.values.format, 1.0, value_tails);
            keys.value_tails = &value_tails;
        }
        for (int r = 0; r < rows; r++) {
            eighth.part(rows).fetch();
            float factor = weigher_.weigh(
                w.scores + r * kChunk, token(item, r), head(item, kv_head, r), keys,
                {w.query_total[r], w.most[r], w.total + r * kLanes, w.shift + r * kLanes}
            );
            if (factor == 1.0f) continue;
            float* out = w.out + r * w.out_width;
            for (int64_t i = 0; i < w.out_width; i += kLanes) store(out + i, load<vf>(out + i) * factor);
        }
        products.values(chunk, whole.part(2));
    }

    int64_t index(const Item& item, int row) const { return item.first + row / item.group_rows; }
    const Token& token(const Item& item, int row) const { return plan_.tokens[index(item, row)]; }
    int64_t head(const Item& item, int64_t kv_head, int row) const {
        return kv_head * group_ + item.group_first + row % item.group_rows;
    }

    void start(const Item& item, int64_t kv_head, const Workspace& w, int rows) const {
        int64_t padded = round_up(rows, 4), dim = call_.keys.dim;
        int64_t size = call_.query_format == kFloat32 ? 4 : 2;
        std::fill(w.out, w.out + padded * w.out_width, 0.0f);
        std::fill(w.scores + rows * kChunk, w.scores + padded * kChunk, 0.0f);
        for (int r = 0; r < padded; r++) {
            float* row = w.query + r * w.width;
            w.most[r] = -INFINITY;
            w.query_total[r] = 0.0f;
            store(w.total + r * kLanes, vf{});
            store(w.shift + r * kLanes, vf{});
            std::fill(row, row + w.width, 0.0f);
            if (r >= rows) continue;
            int64_t at = index(item, r) * call_.query_token_stride + head(item, kv_head, r) * call_.query_head_stride;
            read_row(call_.query + at * size, call_.query_format, dim, row);
            if (call_.keys.format != kInt4) continue;
            vf sum = vf{};
            for (int64_t i = 0; i < w.width; i += kLanes) sum += load<vf>(row + i);
            w.query_total[r] = sum_lanes(sum);
        }
    }

    void add_mass_of(const Item& item, float* mass, Arena& arena) const {
        if (item.begin >= item.end) return;
        int rows = item.tokens * item.group_rows;
        Workspace w;
        w.lay_out(arena, call_, 1, rows);
        Products products(call_, w, rows);
        start(item, item.head, w, rows);
        products.prepare_query();
        RowTails key_tails;
        ChunkRows chunk;
        Fetcher fetcher({}, {});
        const Share nothing{fetcher, 0};
        for (int64_t at = item.begin; at < item.end; at += kChunk) {
            locator_.locate(item, item.head, at, chunk);
            Keys keys{at, chunk.count, nullptr, nullptr};
            if (locator_.key().scale_bytes) {
                read_tails(chunk, chunk.key_scales, call_.keys.format, call_.scale, key_tails);
                keys.key_tails = &key_tails;
            }
            products.scores(chunk, nothing);
            for (int r = 0; r < rows; r++)
                weigher_.add_mass(
                    w.scores + r * kChunk, token(item, r), head(item, item.head, r), keys, w.query_total[r],
                    call_.lse[index(item, r) * call_.heads + head(item, item.head, r)], mass + at
                );
        }
    }

    void finish(const Item& item, int64_t kv_head, const Workspace& w, int r) const {
        const Token& row = token(item, r);
        float* out = w.out + r * w.out_width;
        float shift = sum_lanes(load<vf>(w.shift + r * kLanes)), total = sum_lanes(load<vf>(w.total + r * kLanes));
        for (int64_t i = 0; i < w.out_width; i += kLanes) store(out + i, load<vf>(out + i) + shift);
        if (row.parts < 2) return write(index(item, r), head(item, kv_head, r), out, w.most[r], total);
        int64_t part = item.shared ? item.part : row.shared_parts + item.part;
        int64_t slot = (row.slot + part) * call_.heads + head(item, kv_head, r);
        partials_.most[slot] = w.most[r];
        partials_.total[slot] = total;
        std::memcpy(partials_.out + slot * call_.values.dim, out, 4 * call_.values.dim);
    }

    // Divides by the denominator, the sink included, and writes the row in the query's dtype.
    void write(int64_t t, int64_t head, float* sum, float most, float total) const {
        bool blind = most == -INFINITY && total == 0.0f;
        float scale = 0.0f, lse = -INFINITY;
        if (!blind) {
            float highest = most;
            if (call_.sinks) {
                float sink = call_.sinks[head];
                highest = sink > most ? sink : most;
                total = total * std::exp(most - highest) + std::exp(sink - highest);
            }
            scale = std::exp(most - highest) / total;
            lse = highest + std::log(total);
        }
        int64_t dim = call_.values.dim, at = (t * call_.heads + head) * dim;
        for (int64_t i = 0; i < dim; i++) sum[i] = blind ? 0.0f : sum[i] * scale;
        write_row(sum, call_.query_format, dim, call_.out + at * (call_.query_format == kFloat32 ? 4 : 2));
        if (call_.lse) call_.lse[t * call_.heads + head] = lse;
    }

    const AttentionCall& call_;
    const Plan& plan_;
    const Partials& partials_;
    const Weigher weigher_;
    const Locator locator_;
    const int64_t group_;
};
