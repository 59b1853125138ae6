// From scores to weights: scale, softcap, slopes, bias, what is hidden, and the online softmax.
#pragma once

#include "products/direct.h"
#include "base/step.h"

// The scales of a chunk's rows, and of int4 their offsets; 0 past its end.
struct RowTails {
    alignas(64) float scales[kChunk];
    alignas(64) float offsets[kChunk];
    bool shifted;  // whether there are offsets
};

// The keys [start, start + count) of a chunk.
struct Keys {
    int64_t start;
    int count;
    const RowTails* key_tails;    // times the softmax scale; or null
    const RowTails* value_tails;  // or null
};

// What is kept for a row of scores from chunk to chunk; what has kLanes parts is added up at the end.
struct RowSums {
    float query_total;  // sum of the query's elements
    float& most;        // the score that weighs 1: the greatest so far, or up to kSlack less
    float* total;       // [kLanes], of the online softmax
    float* shift;       // [kLanes], sum of the weights, each times the offset of its value
};

// A score may exceed the one that weighs 1 by as much: exp(8) is far from what overflows, and what was summed up need
// hardly ever be scaled down.
constexpr float kSlack = 8.0f;

class Weigher {
public:
    Weigher(const AttentionCall& call, const Plan& plan)
        : call_(call), plan_(plan), plain_(call.softcap == 0 && !call.slopes && !call.bias && !call.tree) {}

    // One row of scores of head `head` becomes weights, times the values' scales; rows past `count` weigh nothing.
    // The result is the factor of what was summed up before.
    float weigh(float* row, const Token& token, int64_t head, const Keys& keys, const RowSums& sums) const {
        constexpr int kVectors = kChunk / kLanes;
        vf value[kVectors];
        if (plain_ && keys.start >= token.low && keys.start + kChunk <= token.high && keys.count == kChunk) {
#pragma GCC unroll 16
            for (int i = 0; i < kVectors; i++) value[i] = scaled(row, i * kLanes, keys, sums.query_total);
        } else {
            score(row, token, head, keys, sums.query_total);
#pragma GCC unroll 16
            for (int i = 0; i < kVectors; i++) value[i] = load<vf>(row + i * kLanes);
        }
        vf highest = value[0];
#pragma GCC unroll 16
        for (int i = 1; i < kVectors; i++) highest = highest > value[i] ? highest : value[i];
        float factor = 1.0f;
        if (any_above(highest, sums.most + kSlack)) {
            float new_most = max_lanes(highest);
            factor = std::exp(sums.most - new_most);
            sums.most = new_most;
        }
        float base = sums.most == -INFINITY ? 0.0f : sums.most;
        if (!keys.value_tails)
            take<false, false>(value, base, row, keys, factor, sums);
        else if (!keys.value_tails->shifted)
            take<true, false>(value, base, row, keys, factor, sums);
        else
            take<true, true>(value, base, row, keys, factor, sums);
        return factor;
    }

    // The final weights of a row whose log-sum-exp is known, added to mass[0 .. count).
    void add_mass(
        float* row, const Token& token, int64_t head, const Keys& keys, float query_total, float lse, float* mass
    ) const {
        if (lse == -INFINITY) return;
        score(row, token, head, keys, query_total);
        for (int i = 0; i < kChunk; i += kLanes) store(row + i, exp_of(load<vf>(row + i) - lse));
        for (int j = 0; j < keys.count; j++) mass[j] += row[j];
    }

private:
    // The scores `value` become weights in `row`, and are summed up.
    template <bool Scaled, bool Shifted>
    static INLINE void take(
        const vf* value, float base, float* row, const Keys& keys, float factor, const RowSums& sums
    ) {
        vf sum[2] = {vf{}, vf{}}, shift = vf{};
#pragma GCC unroll 16
        for (int i = 0; i < kChunk / kLanes; i++) {
            vf weight = exp_of(value[i] - base);
            sum[i % 2] += weight;
            if constexpr (Shifted) shift += weight * load<vf>(keys.value_tails->offsets + i * kLanes);
            if constexpr (Scaled) weight *= load<vf>(keys.value_tails->scales + i * kLanes);
            store(row + i * kLanes, weight);
        }
        store(sums.total, load<vf>(sums.total) * factor + (sum[0] + sum[1]));
        if constexpr (Shifted) store(sums.shift, load<vf>(sums.shift) * factor + shift);
    }

    // Products, be they with codes, times the softmax scale; `query_total` is the sum of the query's elements.
    INLINE vf scaled(const float* row, int at, const Keys& keys, float query_total) const {
        vf products = load<vf>(row + at);
        if (!keys.key_tails) return products * static_cast<float>(call_.scale);
        products *= load<vf>(keys.key_tails->scales + at);
        if (!keys.key_tails->shifted) return products;
        return products + load<vf>(keys.key_tails->offsets + at) * query_total;
    }

    // Raw products become scores, -inf where the token does not see the key.
    void score(float* row, const Token& token, int64_t head, const Keys& keys, float query_total) const {
        for (int i = 0; i < kChunk; i += kLanes) store(row + i, scaled(row, i, keys, query_total));
        if (!plain_) enrich(row, token, head, keys);
        int64_t high = call_.tree ? token.step_begin : token.high;
        int64_t first = token.low - keys.start, last = high - keys.start;
        if (first <= 0 && last >= kChunk && keys.count == kChunk) return;
        if (call_.tree) {
            show_tree(row, token, keys);
            return;
        }
        if (last > keys.count) last = keys.count;
        int32_t from = static_cast<int32_t>(std::clamp<int64_t>(first, 0, kChunk));
        int32_t to = static_cast<int32_t>(std::clamp<int64_t>(last, 0, kChunk));
        for (int i = 0; i < kChunk; i += kLanes) {
            vi lane = iota() + i;
            store(row + i, select((lane >= from) & (lane < to), load<vf>(row + i), splat(-INFINITY)));
        }
    }

    // Softcap, slopes and bias.
    void enrich(float* row, const Token& token, int64_t head, const Keys& keys) const {
        if (call_.softcap != 0) {
            float cap = static_cast<float>(call_.softcap), inverse = static_cast<float>(1.0 / call_.softcap);
            for (int i = 0; i < kChunk; i += kLanes)
                store(row + i, tanh_of(load<vf>(row + i) * inverse) * cap);
        }
        if (!call_.slopes && !call_.bias) return;
        int64_t table_head = call_.bias_heads > 1 ? head : 0;
        for (int j = 0; j < keys.count; j++) {
            int64_t key = position_of(token, keys.start + j), distance = token.position - key;
            if (distance < 0) continue;  // hidden
            if (call_.slopes) row[j] -= call_.slopes[head] * static_cast<float>(distance);
            if (!call_.bias) continue;
            int64_t length = call_.bias_length;
            if (call_.bias_by_pair)
                row[j] += call_.bias[(table_head * length + token.position) * length + key];
            else
                row[j] += call_.bias[table_head * length + std::min(distance, length - 1)];
        }
    }

    const uint8_t* tree_row(const Token& token) const {
        return call_.tree + (&token - plan_.tokens.data()) * call_.tree_width;
    }

    // A key of this step stands where its own token does, which under a tree mask is not where it is stored.
    int64_t position_of(const Token& token, int64_t key) const {
        if (!call_.tree || key < token.step_begin) return key;
        return plan_.tokens[call_.starts[token.sequence] + key - token.step_begin].position;
    }

    void show_tree(float* row, const Token& token, const Keys& keys) const {
        const uint8_t* mask = tree_row(token);
        int64_t oldest = call_.window > 0 ? token.position - call_.window + 1 : 0;
        if (call_.chunk > 0) oldest = std::max(oldest, token.position / call_.chunk * call_.chunk);
        for (int j = 0; j < kChunk; j++) {
            int64_t key = keys.start + j;
            bool seen = j < keys.count && position_of(token, key) >= oldest;
            if (seen && key >= token.step_begin) seen = mask[key - token.step_begin] != 0;
            if (!seen) row[j] = -INFINITY;
        }
    }

    const AttentionCall& call_;
    const Plan& plan_;
    const bool plain_;
};
