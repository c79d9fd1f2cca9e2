// Gated residual: x + tanh(gate) * y, with one gate or one for each channel.
#include "../kernels.h"
#include "gate.h"
#include "row_blocks.h"
#include "row_vectors.h"
#include "storage_type.h"

namespace {

template <typename T> struct GatedResidual {
    using Real = real<T>;
    using Params = flamingo_gated_residual_params;

    static void forward_row(const T *x, const T *y, T *out, int64_t size, vec<Real> gate) {
        along_row<Real>(size, [&](int64_t i, auto mask, int) __attribute__((always_inline)) {
            put(fetch(x + i, mask) + gate * fetch(y + i, mask), out + i, mask);
        });
    }
    // gates[size] are tanh(gate), padded to whole vectors.
    static void forward_row(const T *x, const T *y, T *out, int64_t size, const Real *gates) {
        along_row<Real>(size, [&](int64_t i, auto mask, int) __attribute__((always_inline)) {
            put(fetch(x + i, mask) + load(gates + i) * fetch(y + i, mask), out + i, mask);
        });
    }

    static bool forward(const Params &p) {
        T *out = static_cast<T *>(p.out);
        const int64_t size = p.channels;
        const int64_t elements = p.rows * size;
        if (!p.gate_per_channel) {
            const vec<Real> gate = scalar_gate<Real>(p.gate).value;
            over_blocks(p.rows, forward_block(size), elements, p.execution.threads,
                        [&](int64_t, int64_t begin, int64_t end) {
                            for (int64_t r = begin; r < end; ++r) {
                                forward_row(row_of<T>(p.x, r), row_of<T>(p.y, r), out + r * size,
                                            size, gate);
                            }
                        });
            return true;
        }
        over_blocks(p.rows, bigger(shortest_block, forward_block(size)), elements,
                    p.execution.threads, [&](int64_t, int64_t begin, int64_t end) {
                        over_panels(p, [&](int64_t c, int64_t width, const Real *gates) {
                            for (int64_t r = begin; r < end; ++r) {
                                forward_row(row_of<T>(p.x, r) + c, row_of<T>(p.y, r) + c,
                                            out + r * size + c, width, gates);
                            }
                        });
                    });
        return true;
    }

    // Calls body(first column, columns, their tanh(gate) padded to whole vectors) for every panel.
    template <typename Body> static void over_panels(const Params &p, Body body) {
        const Real *gates = static_cast<const Real *>(p.gate);
        Real values[column_panel];
        for (int64_t c = 0; c < p.channels; c += column_panel) {
            const int64_t width = smaller(column_panel, p.channels - c);
            along_row<Real>(width, [&](int64_t i, auto mask, int) __attribute__((always_inline)) {
                store(values + i, gate_of(fetch(gates + c + i, mask)).value);
            });
            body(c, width, values);
        }
    }

    // Writes d_y and returns the sum of d_out * y.
    static Real backward_row(const T *d_out, const T *y, T *d_y, int64_t size, vec<Real> gate) {
        vec<Real> sums[4] = {};
        along_row<Real, 4>(size, [&](int64_t i, auto mask, int u) __attribute__((always_inline)) {
            const vec<Real> d = fetch(d_out + i, mask);
            sums[u] += d * fetch(y + i, mask);
            put(d * gate, d_y + i, mask);
        });
        return total_of<Real>(sums);
    }
    // Writes d_y and adds d_out * y to sums[size].
    static void backward_row(const T *d_out, const T *y, T *d_y, int64_t size, const Real *gates,
                             Real *sums) {
        along_row<Real>(size, [&](int64_t i, auto mask, int) __attribute__((always_inline)) {
            const vec<Real> d = fetch(d_out + i, mask);
            put(fetch(sums + i, mask) + d * fetch(y + i, mask), sums + i, mask);
            put(d * load(gates + i), d_y + i, mask);
        });
    }

    static bool backward(const Params &p) {
        T *d_y = static_cast<T *>(p.d_y);
        const int64_t size = p.channels;
        const int64_t block = backward_block(p.rows);
        const int64_t blocks = blocks_of(p.rows, block);
        const int64_t elements = p.rows * size;
        if (!p.gate_per_channel) {
            const Gate<Real> gate = scalar_gate<Real>(p.gate);
            Real sums[most_blocks];
            over_blocks(p.rows, block, elements, p.execution.threads,
                        [&](int64_t b, int64_t begin, int64_t end) {
                            Real sum = 0;
                            for (int64_t r = begin; r < end; ++r) {
                                sum += backward_row(row_of<T>(p.d_out, r), row_of<T>(p.y, r),
                                                    d_y + r * size, size, gate.value);
                            }
                            sums[b] = sum;
                        });
            finish_scalar_gate(sums, blocks, gate, p.d_gate);
            return true;
        }
        BlockSums<Real> sums(p.d_gate, size, blocks);
        if (!sums.ok()) {
            return false;
        }
        over_blocks(p.rows, block, elements, p.execution.threads,
                    [&](int64_t b, int64_t begin, int64_t end) {
                        Real *own = sums.start(b);
                        over_panels(p, [&](int64_t c, int64_t width, const Real *gates) {
                            for (int64_t r = begin; r < end; ++r) {
                                backward_row(row_of<T>(p.d_out, r) + c, row_of<T>(p.y, r) + c,
                                             d_y + r * size + c, width, gates, own + c);
                            }
                        });
                    });
        sums.finish(p.execution.threads);
        const Real *gates = static_cast<const Real *>(p.gate);
        Real *d_gate = static_cast<Real *>(p.d_gate);
        along_row<Real>(size, [&](int64_t i, auto mask, int) __attribute__((always_inline)) {
            const vec<Real> slope = gate_of(fetch(gates + i, mask)).slope;
            put(fetch(d_gate + i, mask) * slope, d_gate + i, mask);
        });
        return true;
    }
};

} // namespace

namespace flamingo::FLAMINGO_ISA {

bool gated_residual_forward(const flamingo_gated_residual_params &p) {
    return with_storage_type(p.execution.dtype,
                             [&](auto zero) { return GatedResidual<decltype(zero)>::forward(p); });
}

bool gated_residual_backward(const flamingo_gated_residual_params &p) {
    return with_storage_type(p.execution.dtype,
                             [&](auto zero) { return GatedResidual<decltype(zero)>::backward(p); });
}

} // namespace flamingo::FLAMINGO_ISA
