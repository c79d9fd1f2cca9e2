// LayerNorm over the channels of a row.
#include "../kernels.h"
#include "row_blocks.h"
#include "row_vectors.h"
#include "storage_type.h"

namespace {

// Rows that a backward adds to the sums of their block together.
constexpr int rows_at_once = 4;

template <typename T> struct LayerNorm {
    using Real = real<T>;
    using Params = flamingo_layer_norm_params;

    static Real average(const vec<Real> (&sums)[4], int64_t size) {
        return size > 0 ? total_of<Real>(sums) / Real(size) : Real(0);
    }

    static void forward_row(const Params &p, int64_t row) {
        const T *x = row_of<T>(p.x, row);
        T *out = static_cast<T *>(p.out) + row * p.channels;
        const Real *weight = static_cast<const Real *>(p.weight);
        const Real *bias = static_cast<const Real *>(p.bias);
        vec<Real> sums[4] = {};
        along_row<Real, 4>(p.channels,
                           [&](int64_t i, auto mask, int u)
                               __attribute__((always_inline)) { sums[u] += fetch(x + i, mask); });
        const Real mean = average(sums, p.channels);
        vec<Real> squares[4] = {};
        along_row<Real, 4>(p.channels,
                           [&](int64_t i, auto mask, int u) __attribute__((always_inline)) {
                               const vec<Real> centred = fetch(x + i, mask, mean) - mean;
                               squares[u] += centred * centred;
                           });
        const Real variance = average(squares, p.channels);
        const Real rstd = Real(1 / __builtin_sqrt(double(variance) + p.eps));
        along_row<Real>(p.channels, [&](int64_t i, auto mask, int) __attribute__((always_inline)) {
            vec<Real> value = (fetch(x + i, mask) - mean) * rstd;
            if (weight) {
                value *= fetch(weight + i, mask);
            }
            if (bias) {
                value += fetch(bias + i, mask);
            }
            put(value, out + i, mask);
        });
        if (p.mean) {
            static_cast<Real *>(p.mean)[row] = mean;
        }
        if (p.rstd) {
            static_cast<Real *>(p.rstd)[row] = rstd;
        }
    }

    static bool forward(const Params &p) {
        over_blocks(p.rows, forward_block(p.channels), p.rows * p.channels, p.execution.threads,
                    [&](int64_t, int64_t begin, int64_t end) {
                        for (int64_t r = begin; r < end; ++r) {
                            forward_row(p, r);
                        }
                    });
        return true;
    }

    // Writes d_x of ROWS rows from `row` on, and adds to those of d_weight and d_bias that are not
    // null.
    template <int ROWS>
    static void backward_rows(const Params &p, int64_t row, Real *d_weight, Real *d_bias) {
        const Real *weight = static_cast<const Real *>(p.weight);
        const T *x[ROWS], *d_out[ROWS];
        Real mean[ROWS], rstd[ROWS];
        // Of the gradient of the normalised row, and of its product with the normalised row.
        vec<Real> sums[ROWS], products[ROWS];
        for (int k = 0; k < ROWS; ++k) {
            x[k] = row_of<T>(p.x, row + k);
            d_out[k] = row_of<T>(p.d_out, row + k);
            mean[k] = static_cast<const Real *>(p.mean)[row + k];
            rstd[k] = static_cast<const Real *>(p.rstd)[row + k];
            sums[k] = products[k] = vec<Real>{};
        }
        along_row<Real>(p.channels, [&](int64_t i, auto mask, int) __attribute__((always_inline)) {
            const vec<Real> w = weight ? fetch(weight + i, mask) : broadcast(Real(1));
            vec<Real> w_sum = {}, b_sum = {};
            if (d_weight) {
                w_sum = fetch(d_weight + i, mask);
            }
            if (d_bias) {
                b_sum = fetch(d_bias + i, mask);
            }
#pragma GCC unroll 8
            for (int k = 0; k < ROWS; ++k) {
                const vec<Real> normed = (fetch(x[k] + i, mask) - mean[k]) * rstd[k];
                const vec<Real> d = fetch(d_out[k] + i, mask);
                const vec<Real> d_normed = d * w;
                sums[k] += d_normed;
                products[k] += d_normed * normed;
                w_sum += d * normed;
                b_sum += d;
            }
            if (d_weight) {
                put(w_sum, d_weight + i, mask);
            }
            if (d_bias) {
                put(b_sum, d_bias + i, mask);
            }
        });
        for (int k = 0; k < ROWS; ++k) {
            const Real shift = sum_of<Real>(sums[k]) / Real(p.channels);
            const Real slope = sum_of<Real>(products[k]) / Real(p.channels);
            T *d_x = static_cast<T *>(p.d_x) + (row + k) * p.channels;
            along_row<Real>(
                p.channels, [&](int64_t i, auto mask, int) __attribute__((always_inline)) {
                    const vec<Real> w = weight ? fetch(weight + i, mask) : broadcast(Real(1));
                    const vec<Real> normed = (fetch(x[k] + i, mask) - mean[k]) * rstd[k];
                    const vec<Real> d_normed = fetch(d_out[k] + i, mask) * w;
                    put((d_normed - shift - normed * slope) * rstd[k], d_x + i, mask);
                });
        }
    }

    static bool backward(const Params &p) {
        const int64_t block = backward_block(p.rows);
        const int64_t blocks = blocks_of(p.rows, block);
        BlockSums<Real> weight_sums(p.d_weight, p.channels, blocks);
        BlockSums<Real> bias_sums(p.d_bias, p.channels, blocks);
        if (!weight_sums.ok() || !bias_sums.ok()) {
            return false;
        }
        over_blocks(p.rows, block, p.rows * p.channels, p.execution.threads,
                    [&](int64_t b, int64_t begin, int64_t end) {
                        Real *d_weight = weight_sums.start(b);
                        Real *d_bias = bias_sums.start(b);
                        int64_t r = begin;
                        for (; r + rows_at_once <= end; r += rows_at_once) {
                            backward_rows<rows_at_once>(p, r, d_weight, d_bias);
                        }
                        for (; r < end; ++r) {
                            backward_rows<1>(p, r, d_weight, d_bias);
                        }
                    });
        weight_sums.finish(p.execution.threads);
        bias_sums.finish(p.execution.threads);
        return true;
    }
};

} // namespace

namespace flamingo::FLAMINGO_ISA {

bool layer_norm_forward(const flamingo_layer_norm_params &p) {
    return with_storage_type(p.execution.dtype,
                             [&](auto zero) { return LayerNorm<decltype(zero)>::forward(p); });
}

bool layer_norm_backward(const flamingo_layer_norm_params &p) {
    return with_storage_type(p.execution.dtype,
                             [&](auto zero) { return LayerNorm<decltype(zero)>::backward(p); });
}

} // namespace flamingo::FLAMINGO_ISA
