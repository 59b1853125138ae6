// Threads: those of the OpenMP runtime that torch has loaded, so that there is one pool in the process and
// torch.set_num_threads counts. The Python side hands over its entry point; without one, threads are started per call.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

typedef void (*Body)(void*);
typedef void (*ParallelRegion)(Body, void*, unsigned threads, unsigned flags);  // GOMP_parallel

inline ParallelRegion& parallel_region() {
    static ParallelRegion region = nullptr;
    return region;
}

inline void run_threads(int64_t threads, Body body, void* data) {
    if (threads <= 1) return body(data);
    if (parallel_region()) return parallel_region()(body, data, static_cast<unsigned>(threads), 0);
    std::vector<std::thread> started;
    for (int64_t i = 1; i < threads; i++) started.emplace_back(body, data);
    body(data);
    for (std::thread& each : started) each.join();
}

// Calls work(i) for every i below count, on up to `threads` threads; whoever is free takes the next.
template <class Work>
void for_each(int64_t count, int64_t threads, const Work& work) {
    struct Shared {
        const Work& work;
        std::atomic<int64_t> next;
        int64_t count;
    } shared{work, {0}, count};
    Body body = [](void* data) {
        Shared& all = *static_cast<Shared*>(data);
        for (int64_t i = all.next++; i < all.count; i = all.next++) all.work(i);
    };
    run_threads(threads < count ? threads : count, body, &shared);
}
