// Measures the ceiling of the attention kernels: multiply-adds on registers alone.
#include <time.h>

#include "../kernels.h"
#include "vector.h"

namespace {

double seconds_now() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

template <typename Real> double rate(int threads, double seconds) {
    constexpr int chains = 12; // enough to hide the latency of two units
    constexpr int64_t steps = 1 << 16;
    double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        vec<Real> sums[chains];
        for (int i = 0; i < chains; ++i) {
            sums[i] = broadcast(Real(i));
        }
        // Volatile, so that the compiler cannot solve the recurrence.
        volatile Real shrink_value = Real(0.999), shift_value = Real(0.001);
        const vec<Real> shrink = broadcast(Real(shrink_value)),
                        shift = broadcast(Real(shift_value));
        const double begin = seconds_now();
        double now = begin;
        int64_t done = 0;
        while (now - begin < seconds) {
            for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
                for (int i = 0; i < chains; ++i) {
                    sums[i] = sums[i] * shrink + shift;
                }
            }
            done += steps;
            now = seconds_now();
        }
        volatile Real sink = 0;
        for (int i = 0; i < chains; ++i) {
            sink = sink + sums[i][0];
        }
        total += 2.0 * chains * lanes<Real> * double(done) / (now - begin);
    }
    return total;
}

} // namespace

double flamingo::FLAMINGO_ISA::multiply_add_rate(const flamingo_execution &execution,
                                                 double seconds) {
    return execution.dtype == FLAMINGO_FLOAT64 ? rate<double>(execution.threads, seconds)
                                               : rate<float>(execution.threads, seconds);
}
