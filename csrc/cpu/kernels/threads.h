// The number of threads of a call.
#pragma once

#include <stdint.h>

namespace {

// Multiply-adds below which one thread is faster than waking the others.
constexpr int64_t parallel_work = 1 << 17;

inline int threads_for(int64_t multiply_adds, int32_t threads) {
    return multiply_adds < parallel_work ? 1 : threads;
}

} // namespace
