// Runs the tasks of a call on threads.
#pragma once

#include "scratch.h"

namespace {

// Multiply-adds below which one thread is faster than waking the others.
constexpr int64_t parallel_work = 1 << 17;

inline int threads_for(int64_t multiply_adds, int32_t threads) {
    return multiply_adds < parallel_work ? 1 : threads;
}

// Calls task(i, layout) for each i below `count`, where each thread has a Layout(scratch,
// arguments...) of its own. Returns false if a thread is out of memory.
template <typename Layout, typename Task, typename... Arguments>
bool run_tasks(int64_t count, int threads, Task task, const Arguments &...arguments) {
    bool ok = true;
#pragma omp parallel num_threads(threads) reduction(&& : ok)
    {
        Allocated<Layout> layout(arguments...);
        ok = layout.ok();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; ++i) {
            if (ok) {
                task(i, *layout);
            }
        }
    }
    return ok;
}

} // namespace
