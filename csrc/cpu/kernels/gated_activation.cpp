// Gated activation: tanh(gate) * activation(x).
#include "../kernels.h"
#include "activations.h"
#include "gate.h"
#include "row_blocks.h"
#include "row_vectors.h"
#include "storage_type.h"

namespace {

template <typename T> struct GatedActivation {
    using Real = real<T>;
    using Params = flamingo_gated_activation_params;

    template <typename Activation>
    static void forward_row(const T *x, T *out, int64_t size, vec<Real> gate) {
        along_row<Real>(size, [&](int64_t i, auto mask, int) __attribute__((always_inline)) {
            put(Activation::template at<Real>(fetch(x + i, mask)).value * gate, out + i, mask);
        });
    }

    static bool forward(const Params &p) {
        const vec<Real> gate = scalar_gate<Real>(p.gate).value;
        T *out = static_cast<T *>(p.out);
        const int64_t size = p.channels;
        with_activation(p.activation, [&](auto activation) {
            over_blocks(p.rows, forward_block(size), p.rows * size, p.execution.threads,
                        [&](int64_t, int64_t begin, int64_t end) {
                            for (int64_t r = begin; r < end; ++r) {
                                forward_row<decltype(activation)>(row_of<T>(p.x, r), out + r * size,
                                                                  size, gate);
                            }
                        });
        });
        return true;
    }

    // Writes d_x and returns the sum of d_out * activation(x).
    template <typename Activation>
    static Real backward_row(const T *d_out, const T *x, T *d_x, int64_t size, vec<Real> gate) {
        vec<Real> sums[4] = {};
        along_row<Real, 4>(size, [&](int64_t i, auto mask, int u) __attribute__((always_inline)) {
            const Activated<Real> activated = Activation::template at<Real>(fetch(x + i, mask));
            const vec<Real> d = fetch(d_out + i, mask);
            sums[u] += d * activated.value;
            put((d * gate) * activated.slope, d_x + i, mask);
        });
        return total_of<Real>(sums);
    }

    static bool backward(const Params &p) {
        const Gate<Real> gate = scalar_gate<Real>(p.gate);
        T *d_x = static_cast<T *>(p.d_x);
        const int64_t size = p.channels;
        const int64_t block = backward_block(p.rows);
        Real sums[most_blocks];
        with_activation(p.activation, [&](auto activation) {
            over_blocks(p.rows, block, p.rows * size, p.execution.threads,
                        [&](int64_t b, int64_t begin, int64_t end) {
                            Real sum = 0;
                            for (int64_t r = begin; r < end; ++r) {
                                sum += backward_row<decltype(activation)>(
                                    row_of<T>(p.d_out, r), row_of<T>(p.x, r), d_x + r * size, size,
                                    gate.value);
                            }
                            sums[b] = sum;
                        });
        });
        finish_scalar_gate(sums, blocks_of(p.rows, block), gate, p.d_gate);
        return true;
    }
};

} // namespace

namespace flamingo::FLAMINGO_ISA {

bool gated_activation_forward(const flamingo_gated_activation_params &p) {
    return with_storage_type(
        p.execution.dtype, [&](auto zero) { return GatedActivation<decltype(zero)>::forward(p); });
}

bool gated_activation_backward(const flamingo_gated_activation_params &p) {
    return with_storage_type(
        p.execution.dtype, [&](auto zero) { return GatedActivation<decltype(zero)>::backward(p); });
}

} // namespace flamingo::FLAMINGO_ISA
