// The entry points. This file is compiled once per instruction set, into one shared object each; see setup.py.

#include "step/attention.h"
#include "step/gather.h"
#include "step/settle.h"
#include "step/store.h"

static Arena& own_arena() {
    static thread_local Arena arena;
    return arena;
}

static int64_t attend(AttentionCall& call) {
    static thread_local Plan plan;
    static thread_local Arena partial_memory;
    if (int64_t status = Planner(call, plan).run()) return status;
    Partials partials{};
    int64_t slots = plan.slots * call.heads;
    partial_memory.restart();
    partial_memory.reserve(slots * (call.values.dim + 2) * 4 + 256);
    partials.out = partial_memory.take<float>(slots * call.values.dim);
    partials.most = partial_memory.take<float>(slots);
    partials.total = partial_memory.take<float>(slots);

    const Attention attention(call, plan, partials);
    const Plan& shared = plan;  // a thread_local would be another thread's own
    std::atomic<bool> failed{false};
    auto guarded = [&](auto work) {
        return [&failed, work](int64_t i) {
            try {
                work(i);
            } catch (const std::bad_alloc&) {
                failed = true;
            }
        };
    };
    for_each(static_cast<int64_t>(shared.items.size()), call.threads,
             guarded([&](int64_t i) { attention.run(shared.items[i], own_arena()); }));
    if (slots)
        for_each(call.tokens, call.threads, guarded([&](int64_t t) {
                     for (int64_t head = 0; head < call.heads; head++) attention.merge(t, head, own_arena());
                 }));
    if (call.mass) {
        int64_t room = call.table_width * call.block_size;
        std::fill(call.mass, call.mass + call.sequences * call.kv_heads * room, 0.0f);
        constexpr int64_t kStretch = 1024;  // keys
        int64_t stretches = (room + kStretch - 1) / kStretch;
        for_each(call.sequences * call.kv_heads * stretches, call.threads, guarded([&](int64_t i) {
                     int64_t begin = i % stretches * kStretch, row = i / stretches;
                     attention.add_mass(row / call.kv_heads, row % call.kv_heads, begin,
                                        std::min(room, begin + kStretch), own_arena());
                 }));
    }
    return failed ? kOutOfMemory : kDone;
}

KVPASS_EXPORT int64_t kvpass_attention(AttentionCall* call) {
    try {
        return attend(*call);
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
}

KVPASS_EXPORT int64_t kvpass_write(WriteCall* call) {
    try {
        return write_cache(*call);
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
}

KVPASS_EXPORT int64_t kvpass_gather(GatherCall* call) {
    try {
        return gather_cache(*call);
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
}

KVPASS_EXPORT int64_t kvpass_settle(SettleCall* call) {
    try {
        return settle_blocks(*call);
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
}

KVPASS_EXPORT int64_t kvpass_copy(CopyCall* call) {
    try {
        return copy_blocks(*call);
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
}

KVPASS_EXPORT void kvpass_share_threads(void* parallel) {
    parallel_region() = reinterpret_cast<ParallelRegion>(parallel);
}

// The best level that this processor and its operating system support; the numbers are those of LEVELS in loader.py.
KVPASS_EXPORT int64_t kvpass_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool second = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    bool third = second && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    bool fourth = third && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    return fourth ? 3 : third ? 2 : second ? 1 : 0;
#else
    return 0;
#endif
}

// Sizes of the calls, which the Python side compares with what it packs.
KVPASS_EXPORT int64_t kvpass_call_bytes(int64_t which) {
    static const int64_t kBytes[] = {sizeof(AttentionCall), sizeof(WriteCall), sizeof(CopyCall),
                                     sizeof(GatherCall), sizeof(SettleCall)};
    return kBytes[which];
}
