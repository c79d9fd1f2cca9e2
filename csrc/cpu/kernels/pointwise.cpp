// Gated residual, gated activation and LayerNorm: each direction reads and writes memory once.
#include "../kernels_pointwise.h"

#include <stdlib.h>

#include "elementwise.h"

namespace {

// Elements that are worth waking another thread for.
constexpr int64_t least_work = 16384;
// A task of a forward: about so many elements.
constexpr int64_t task_elements = 8192;
// Rows over which a gradient of a parameter is summed before the sums of blocks are: enough that
// those sums are few bytes beside the rows, few enough to share the work. Their number is bounded
// to bound those bytes. Both depend on the number of rows alone, so that the bits do.
constexpr int64_t shortest_block = 32;
constexpr int64_t most_blocks = 512;
// Columns whose gates are kept at hand while going through the rows of a block.
constexpr int64_t panel = 1024;
// Rows of a LayerNorm backward that are added to the sums of a block at once.
constexpr int tile = 4;

int64_t blocks_of(int64_t rows, int64_t size) { return (rows + size - 1) / size; }

int64_t forward_block(int64_t channels) { return bigger(1, task_elements / bigger(channels, 1)); }

int64_t backward_block(int64_t rows) {
    return bigger(shortest_block, blocks_of(rows, most_blocks));
}

// Calls body(block, first row, end row) for all blocks of `size` rows.
template <typename Body>
void over_blocks(int64_t rows, int64_t size, int64_t elements, int32_t threads, Body body) {
    const int64_t blocks = blocks_of(rows, size);
    const auto used = int(smaller(smaller(threads, blocks), 1 + elements / least_work));
    if (used <= 1) {
        for (int64_t b = 0; b < blocks; ++b) {
            body(b, b * size, smaller(rows, (b + 1) * size));
        }
        return;
    }
#pragma omp parallel for num_threads(used) schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
        body(b, b * size, smaller(rows, (b + 1) * size));
    }
}

template <typename T> inline const T *row_of(const flamingo_rows &rows, int64_t row) {
    const T *data = static_cast<const T *>(rows.data);
    if (rows.inner_rows == 0 || row < rows.inner_rows) {
        return data + row * rows.inner_stride;
    }
    const int64_t outer = row / rows.inner_rows;
    return data + outer * rows.outer_stride + (row - outer * rows.inner_rows) * rows.inner_stride;
}

// Sums over all rows of `size` values per row: one per block, block 0's in the result itself.
template <typename Real> class BlockSums {
  public:
    BlockSums(void *result, int64_t size, int64_t blocks)
        : result_(static_cast<Real *>(result)), size_(size), blocks_(blocks) {
        if (result_ && size > 0 && blocks > 1) {
            others_ = static_cast<Real *>(malloc(size_t((blocks - 1) * size) * sizeof(Real)));
        }
    }
    ~BlockSums() { free(others_); }
    BlockSums(const BlockSums &) = delete;
    BlockSums &operator=(const BlockSums &) = delete;

    bool ok() const { return !result_ || size_ == 0 || blocks_ <= 1 || others_; }

    // [size] zeros of a block; null where there is no result.
    Real *start(int64_t block) const {
        if (!result_) {
            return nullptr;
        }
        Real *sums = block == 0 ? result_ : others_ + (block - 1) * size_;
        memset(sums, 0, size_t(size_) * sizeof(Real));
        return sums;
    }
    void finish(int32_t threads) const {
        if (!result_ || size_ == 0) {
            return;
        }
        if (blocks_ == 0) {
            start(0);
        }
        over_blocks(size_, panel, size_ * blocks_, threads,
                    [&](int64_t, int64_t begin, int64_t end) {
                        for (int64_t b = 0; b < blocks_ - 1; ++b) {
                            const Real *__restrict from = others_ + b * size_;
                            Real *__restrict to = result_;
                            for (int64_t i = begin; i < end; ++i) {
                                to[i] += from[i];
                            }
                        }
                    });
    }

  private:
    Real *result_;
    Real *others_ = nullptr;
    int64_t size_, blocks_;
};

template <typename Real> inline Real total_of(const vec<Real> (&sums)[4]) {
    return sum_of<Real>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename Real> Gate<Real> scalar_gate(const void *gate) {
    if (!gate) {
        return {broadcast(Real(1)), vec<Real>{}};
    }
    return gate_of(broadcast(*static_cast<const Real *>(gate)));
}

// Writes d_gate[0] = slope * the sum of `sums`.
template <typename Real>
void finish_scalar_gate(const Real *sums, int64_t count, Gate<Real> gate, void *d_gate) {
    Real total = 0;
    for (int64_t b = 0; b < count; ++b) {
        total += sums[b];
    }
    if (d_gate) {
        *static_cast<Real *>(d_gate) = total * gate.slope[0];
    }
}

template <typename T> struct GatedResidual {
    using Real = real<T>;
    using Params = flamingo_gated_residual_params;

    static void forward_row(const T *x, const T *y, T *out, int64_t size, vec<Real> gate) {
        along_row<Real>(size, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
            put(fetch(x + i, part) + gate * fetch(y + i, part), out + i, part);
        });
    }
    // `gates` has room for whole vectors.
    static void forward_row(const T *x, const T *y, T *out, int64_t size, const Real *gates) {
        along_row<Real>(size, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
            put(fetch(x + i, part) + load(gates + i) * fetch(y + i, part), out + i, part);
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

    // Calls body(first column, columns, their tanh(gate) padded to whole vectors).
    template <typename Body> static void over_panels(const Params &p, Body body) {
        const Real *gates = static_cast<const Real *>(p.gate);
        Real values[panel];
        for (int64_t c = 0; c < p.channels; c += panel) {
            const int64_t width = smaller(panel, p.channels - c);
            along_row<Real>(width, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
                store(values + i, gate_of(fetch(gates + c + i, part)).value);
            });
            body(c, width, values);
        }
    }

    // Returns the sum of d_out * y.
    static Real backward_row(const T *d_out, const T *y, T *d_y, int64_t size, vec<Real> gate) {
        vec<Real> sums[4] = {};
        along_row<Real, 4>(size, [&](int64_t i, auto part, int u) __attribute__((always_inline)) {
            const vec<Real> d = fetch(d_out + i, part);
            sums[u] += d * fetch(y + i, part);
            put(d * gate, d_y + i, part);
        });
        return total_of<Real>(sums);
    }
    // Adds d_out * y to sums.
    static void backward_row(const T *d_out, const T *y, T *d_y, int64_t size, const Real *gates,
                             Real *sums) {
        along_row<Real>(size, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
            const vec<Real> d = fetch(d_out + i, part);
            put(fetch(sums + i, part) + d * fetch(y + i, part), sums + i, part);
            put(d * load(gates + i), d_y + i, part);
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
        along_row<Real>(size, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
            const vec<Real> slope = gate_of(fetch(gates + i, part)).slope;
            put(fetch(d_gate + i, part) * slope, d_gate + i, part);
        });
        return true;
    }
};

template <typename T> struct GatedActivation {
    using Real = real<T>;
    using Params = flamingo_gated_activation_params;

    template <typename Activation> static void forward_with(const Params &p) {
        const vec<Real> gate = scalar_gate<Real>(p.gate).value;
        const int64_t size = p.channels;
        over_blocks(p.rows, forward_block(size), p.rows * size, p.execution.threads,
                    [&](int64_t, int64_t begin, int64_t end) {
                        for (int64_t r = begin; r < end; ++r) {
                            const T *x = row_of<T>(p.x, r);
                            T *out = static_cast<T *>(p.out) + r * size;
                            along_row<Real>(size, [&](int64_t i, auto part,
                                                      int) __attribute__((always_inline)) {
                                put(Activation::template at<Real>(fetch(x + i, part)).value * gate,
                                    out + i, part);
                            });
                        }
                    });
    }

    template <typename Activation> static void backward_with(const Params &p) {
        const Gate<Real> gate = scalar_gate<Real>(p.gate);
        const int64_t size = p.channels;
        const int64_t block = backward_block(p.rows);
        Real sums[most_blocks];
        over_blocks(p.rows, block, p.rows * size, p.execution.threads,
                    [&](int64_t b, int64_t begin, int64_t end) {
                        Real sum = 0;
                        for (int64_t r = begin; r < end; ++r) {
                            const T *x = row_of<T>(p.x, r);
                            const T *d_out = row_of<T>(p.d_out, r);
                            T *d_x = static_cast<T *>(p.d_x) + r * size;
                            vec<Real> row_sums[4] = {};
                            along_row<Real, 4>(size, [&](int64_t i, auto part,
                                                         int u) __attribute__((always_inline)) {
                                const Activated<Real> activated =
                                    Activation::template at<Real>(fetch(x + i, part));
                                const vec<Real> d = fetch(d_out + i, part);
                                row_sums[u] += d * activated.value;
                                put((d * gate.value) * activated.slope, d_x + i, part);
                            });
                            sum += total_of<Real>(row_sums);
                        }
                        sums[b] = sum;
                    });
        finish_scalar_gate(sums, blocks_of(p.rows, block), gate, p.d_gate);
    }

    static bool forward(const Params &p) {
        switch (p.activation) {
        case FLAMINGO_GELU:
            forward_with<Gelu>(p);
            break;
        case FLAMINGO_SQUARED_RELU:
            forward_with<SquaredRelu>(p);
            break;
        default:
            forward_with<Relu>(p);
        }
        return true;
    }
    static bool backward(const Params &p) {
        switch (p.activation) {
        case FLAMINGO_GELU:
            backward_with<Gelu>(p);
            break;
        case FLAMINGO_SQUARED_RELU:
            backward_with<SquaredRelu>(p);
            break;
        default:
            backward_with<Relu>(p);
        }
        return true;
    }
};

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
                           [&](int64_t i, auto part, int u)
                               __attribute__((always_inline)) { sums[u] += fetch(x + i, part); });
        const Real mean = average(sums, p.channels);
        vec<Real> squares[4] = {};
        along_row<Real, 4>(p.channels,
                           [&](int64_t i, auto part, int u) __attribute__((always_inline)) {
                               const vec<Real> centred = fetch(x + i, part, mean) - mean;
                               squares[u] += centred * centred;
                           });
        const Real variance = average(squares, p.channels);
        const Real rstd = Real(1 / __builtin_sqrt(double(variance) + p.eps));
        along_row<Real>(p.channels, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
            vec<Real> value = (fetch(x + i, part) - mean) * rstd;
            if (weight) {
                value *= fetch(weight + i, part);
            }
            if (bias) {
                value += fetch(bias + i, part);
            }
            put(value, out + i, part);
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

    // Rows row .. row + ROWS: writes d_x, adds to the sums that are wanted.
    template <int ROWS>
    static void backward_rows(const Params &p, int64_t row, Real *d_weight, Real *d_bias) {
        const Real *weight = static_cast<const Real *>(p.weight);
        const T *x[ROWS], *d_out[ROWS];
        Real mean[ROWS], rstd[ROWS];
        vec<Real> sums[ROWS], products[ROWS]; // of the gradient of the normalised row, and times it
        for (int k = 0; k < ROWS; ++k) {
            x[k] = row_of<T>(p.x, row + k);
            d_out[k] = row_of<T>(p.d_out, row + k);
            mean[k] = static_cast<const Real *>(p.mean)[row + k];
            rstd[k] = static_cast<const Real *>(p.rstd)[row + k];
            sums[k] = products[k] = vec<Real>{};
        }
        along_row<Real>(p.channels, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
            const vec<Real> w = weight ? fetch(weight + i, part) : broadcast(Real(1));
            vec<Real> w_sum = {}, b_sum = {};
            if (d_weight) {
                w_sum = fetch(d_weight + i, part);
            }
            if (d_bias) {
                b_sum = fetch(d_bias + i, part);
            }
#pragma GCC unroll 8
            for (int k = 0; k < ROWS; ++k) {
                const vec<Real> normed = (fetch(x[k] + i, part) - mean[k]) * rstd[k];
                const vec<Real> d = fetch(d_out[k] + i, part);
                const vec<Real> d_normed = d * w;
                sums[k] += d_normed;
                products[k] += d_normed * normed;
                w_sum += d * normed;
                b_sum += d;
            }
            if (d_weight) {
                put(w_sum, d_weight + i, part);
            }
            if (d_bias) {
                put(b_sum, d_bias + i, part);
            }
        });
        for (int k = 0; k < ROWS; ++k) {
            const Real shift = sum_of<Real>(sums[k]) / Real(p.channels);
            const Real slope = sum_of<Real>(products[k]) / Real(p.channels);
            T *d_x = static_cast<T *>(p.d_x) + (row + k) * p.channels;
            along_row<Real>(
                p.channels, [&](int64_t i, auto part, int) __attribute__((always_inline)) {
                    const vec<Real> w = weight ? fetch(weight + i, part) : broadcast(Real(1));
                    const vec<Real> normed = (fetch(x[k] + i, part) - mean[k]) * rstd[k];
                    const vec<Real> d_normed = fetch(d_out[k] + i, part) * w;
                    put((d_normed - shift - normed * slope) * rstd[k], d_x + i, part);
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
                        for (; r + tile <= end; r += tile) {
                            backward_rows<tile>(p, r, d_weight, d_bias);
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

template <template <typename> class Op, typename Params> bool run_forward(const Params &p) {
    switch (p.execution.dtype) {
    case FLAMINGO_FLOAT32:
        return Op<float>::forward(p);
    case FLAMINGO_FLOAT64:
        return Op<double>::forward(p);
    case FLAMINGO_BFLOAT16:
        return Op<bfloat16>::forward(p);
    default:
        return Op<float16>::forward(p);
    }
}
template <template <typename> class Op, typename Params> bool run_backward(const Params &p) {
    switch (p.execution.dtype) {
    case FLAMINGO_FLOAT32:
        return Op<float>::backward(p);
    case FLAMINGO_FLOAT64:
        return Op<double>::backward(p);
    case FLAMINGO_BFLOAT16:
        return Op<bfloat16>::backward(p);
    default:
        return Op<float16>::backward(p);
    }
}

} // namespace

namespace flamingo::FLAMINGO_ISA {

bool gated_residual_forward(const flamingo_gated_residual_params &p) {
    return run_forward<GatedResidual>(p);
}
bool gated_residual_backward(const flamingo_gated_residual_params &p) {
    return run_backward<GatedResidual>(p);
}
bool gated_activation_forward(const flamingo_gated_activation_params &p) {
    return run_forward<GatedActivation>(p);
}
bool gated_activation_backward(const flamingo_gated_activation_params &p) {
    return run_backward<GatedActivation>(p);
}
bool layer_norm_forward(const flamingo_layer_norm_params &p) { return run_forward<LayerNorm>(p); }
bool layer_norm_backward(const flamingo_layer_norm_params &p) { return run_backward<LayerNorm>(p); }

} // namespace flamingo::FLAMINGO_ISA
