// What a step's tensors say, worked out once per call: what each token sees, and the pieces of work.
#pragma once

#include <algorithm>
#include <vector>

#include "base/call.h"

// What one query token sees, in indices of its sequence's keys.
struct Token {
    int32_t sequence, position;
    int32_t low, high;     // low <= key < high, but for tree masks; empty when it sees nothing
    int32_t step_begin;    // first key of this step
    int32_t slot, parts;   // partial results: where the first lies, and how many there are
    int32_t shared_parts;  // how many of them are of keys read together with other sequences
};

// Some consecutive tokens, some KV heads, some query heads of each, some keys.
struct Item {
    int32_t first, tokens;
    int32_t head, heads, group_first, group_rows;
    int32_t sequence;  // whose block table is followed
    int32_t part;      // among those of its kind: shared keys, or the rest
    int32_t shared;
    int32_t begin, end;
};

struct Plan {
    std::vector<Token> tokens;
    std::vector<Item> items;
    int64_t slots = 0;  // partial results of one head
    int64_t most_rows = 1;
};

constexpr int64_t kFewRows = 16;
constexpr int64_t kWorthThreads = 40000;  // of work below which waking a second thread costs more than it brings

class Planner {
public:
    Planner(AttentionCall& call, Plan& plan) : call_(call), plan_(plan), group_(call.heads / call.kv_heads) {}

    int64_t run() {
        plan_.tokens.clear();
        plan_.items.clear();
        plan_.slots = 0;
        if (int64_t status = read_tokens()) return status;
        // As many rows as keep what they gather in the second-level cache: their keys and values are packed once for all.
        int64_t dims = std::max<int64_t>(call_.keys.dim + call_.values.dim, 1);
        group_rows_ = std::min<int64_t>(group_, 128);
        rows_ = std::max(group_rows_, std::clamp<int64_t>(65536 / dims, 64, 256));
        std::vector<int32_t> shared(call_.sequences, 0);
        if (int64_t status = read_groups(shared)) return status;
        for (int pass = 0; pass < 2; pass++) {  // first to know the whole, then to cut it
            for (int64_t g = 0; g < call_.groups; g++)
                add(call_.starts[call_.shared_start[g]], call_.starts[call_.shared_start[g + 1]],
                    call_.shared_start[g], 0, static_cast<int32_t>(call_.shared_lengths[g]), pass);
            for (Token& token : plan_.tokens) token.shared_parts = token.parts;
            for (int64_t n = 0; n < call_.sequences; n++)
                add(call_.starts[n], call_.starts[n + 1], n, shared[n], INT32_MAX, pass);
            if (work_ < kWorthThreads) call_.threads = 1;
            target_ = std::max<int64_t>(work_ / (4 * call_.threads), 1);
        }
        for (Token& token : plan_.tokens)
            if (token.parts > 1) {
                token.slot = static_cast<int32_t>(plan_.slots);
                plan_.slots += token.parts;
            }
        return kDone;
    }

private:
    int64_t refuse(int64_t status, int64_t detail, int64_t value) {
        call_.detail = detail;
        call_.value = value;
        return status;
    }

    // The number of the first wide block of settling formats that lies in the caches; 0 for other formats.
    int64_t lowest_block() const {
        if (!settles(call_.keys.format)) return 0;
        auto wide = [&](const CacheArgument& cache) {
            return (cache.end - cache.data) / (2 * call_.kv_heads * call_.block_size * cache.dim);
        };
        return -std::min(wide(call_.keys), wide(call_.values));
    }

    int64_t read_tokens() {
        const AttentionCall& c = call_;
        if (c.starts[0] != 0 || c.starts[c.sequences] != c.tokens) return refuse(kBadStarts, 0, c.starts[c.sequences]);
        int64_t needed = 0, lowest = lowest_block();
        for (int64_t n = 0; n < c.sequences; n++) {
            int64_t count = c.starts[n + 1] - c.starts[n], length = c.lengths[n];
            if (count < 0 || c.starts[n + 1] > c.tokens || count > length ||
                (count && length > c.table_width * c.block_size) || length >= INT32_MAX)
                return refuse(kBadLength, n, length);
            if (c.tree && count > c.tree_width) return refuse(kShortTree, n, count);
            int64_t oldest = length;
            for (int64_t i = 0; i < count; i++) {
                Token token{};
                token.sequence = static_cast<int32_t>(n);
                token.step_begin = static_cast<int32_t>(length - count);
                int64_t depth = i;
                if (c.tree) {
                    const uint8_t* row = c.tree + (c.starts[n] + i) * c.tree_width;
                    depth = -1;
                    for (int64_t j = 0; j < count; j++) depth += row[j] != 0;
                }
                int64_t q = length - count + depth;
                token.position = static_cast<int32_t>(q);
                int64_t low = c.window > 0 ? std::max<int64_t>(0, q - c.window + 1) : 0;
                if (c.chunk > 0) low = std::max(low, q / c.chunk * c.chunk);
                token.low = static_cast<int32_t>(std::min(low, length));
                token.high = static_cast<int32_t>(c.tree ? length : q + 1);
                if (c.tree) token.low = std::min(token.low, token.step_begin);
                oldest = std::min<int64_t>(oldest, token.low);
                int64_t reach = q + 1;
                if (!c.bias_by_pair && c.window > 0) reach = std::min(reach, c.window);
                if (!c.bias_by_pair && c.chunk > 0) reach = std::min(reach, c.chunk);
                needed = std::max(needed, reach);
                plan_.tokens.push_back(token);
            }
            if (!count) continue;
            for (int64_t w = oldest / c.block_size; w <= (length - 1) / c.block_size; w++) {
                int64_t block = c.tables[n * c.table_stride + w];
                if (block < lowest || block >= c.blocks) return refuse(kBadBlock, n, block);
            }
        }
        if (c.bias && needed > c.bias_length) return refuse(kShortBias, 0, needed);
        return kDone;
    }

    // `shared` gets, for each sequence, how many of its first keys its group reads together.
    int64_t read_groups(std::vector<int32_t>& shared) {
        const AttentionCall& c = call_;
        for (int64_t g = 0; g < c.groups; g++) {
            int64_t first = c.shared_start[g], last = c.shared_start[g + 1], length = c.shared_lengths[g];
            if (first < 0 || last < first || last > c.sequences || length < 0 || length % c.block_size)
                return refuse(kBadGroup, g, length);
            for (int64_t n = first; n < last; n++) {
                int64_t count = c.starts[n + 1] - c.starts[n];
                if (count && length > c.lengths[n] - count) return refuse(kBadGroup, g, length);
                if (length > c.table_width * c.block_size) return refuse(kBadGroup, g, length);
                for (int64_t w = 0; count && w < length / c.block_size; w++)
                    if (c.tables[n * c.table_stride + w] != c.tables[first * c.table_stride + w])
                        return refuse(kBadGroup, g, length);
                shared[n] = static_cast<int32_t>(length);
            }
        }
        return kDone;
    }

    // The work of tokens [first, last) on keys [from, to) of the table of `sequence`: counted, or cut into items.
    void add(int64_t first, int64_t last, int64_t sequence, int32_t from, int32_t to, int pass) {
        int64_t at_once = std::max<int64_t>(1, rows_ / group_rows_);
        for (int64_t t = first; t < last; t += at_once) {
            int64_t count = std::min(at_once, last - t);
            int32_t begin = INT32_MAX, end = 0;
            for (int64_t i = t; i < t + count; i++) {
                begin = std::min(begin, plan_.tokens[i].low);
                end = std::max(end, plan_.tokens[i].high);
            }
            begin = std::max(begin, from);
            end = std::min(end, to);
            if (begin >= end) {
                if (to != INT32_MAX) continue;  // the rest writes what sees nothing
                begin = end = 0;
            }
            int64_t keys = end - begin;
            int64_t cost = keys * (8 + count * group_rows_);  // reading, and computing
            if (pass == 0) {
                work_ += cost * call_.kv_heads * ((group_ + group_rows_ - 1) / group_rows_);
                continue;
            }
            // Few rows are bound by memory, which is quickest when the heads of a block, its neighbours, are read in
            // turn. Many rows are bound by arithmetic, and each head has its own item to keep what it works on small.
            int64_t heads = count * group_rows_ <= kFewRows ? call_.kv_heads : 1;
            int64_t parts = call_.threads > 1 ? (cost * heads + target_ - 1) / target_ : 1;
            parts = std::max<int64_t>(1, std::min(parts, keys / 256));
            if (heads * parts < 2 * call_.threads && parts < call_.threads && last - first <= at_once)
                heads = std::max<int64_t>(1, heads / call_.threads);
            emit(t, count, sequence, begin, keys, parts, heads, to != INT32_MAX);
        }
    }

    void emit(int64_t t, int64_t count, int64_t sequence, int32_t begin, int64_t keys, int64_t parts,
              int64_t heads, bool shared) {
        int64_t each = (keys / parts + 63) / 64 * 64;
        for (int64_t head = 0; head < call_.kv_heads; head += heads)
            for (int64_t g = 0; g < group_; g += group_rows_) {
                int64_t rows = std::min(group_rows_, group_ - g), taken = std::min(heads, call_.kv_heads - head);
                plan_.most_rows = std::max(plan_.most_rows, rows * count);
                for (int64_t part = 0; part < parts; part++) {
                    Item item{};
                    item.first = static_cast<int32_t>(t);
                    item.tokens = static_cast<int32_t>(count);
                    item.head = static_cast<int32_t>(head);
                    item.heads = static_cast<int32_t>(taken);
                    item.group_first = static_cast<int32_t>(g);
                    item.group_rows = static_cast<int32_t>(rows);
                    item.sequence = static_cast<int32_t>(sequence);
                    item.part = static_cast<int32_t>(part);
                    item.shared = shared;
                    item.begin = begin + static_cast<int32_t>(std::min(keys, part * each));
                    item.end = begin + static_cast<int32_t>(part + 1 == parts ? keys : std::min(keys, (part + 1) * each));
                    plan_.items.push_back(item);
                }
            }
        for (int64_t i = t; i < t + count; i++) plan_.tokens[i].parts += static_cast<int32_t>(parts);
    }

    AttentionCall& call_;
    Plan& plan_;
    int64_t group_, rows_ = 64, group_rows_ = 1, work_ = 0, target_ = 1;
};
