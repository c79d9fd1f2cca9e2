// Pieces that both attentions are made of: keys packed for the tile products, softmax of score
// rows.
#pragma once

#include <stdlib.h>

#include <algorithm>

#include "bfloat16_tile.h"

namespace {

// Multiply-adds below which one thread is faster than waking the others.
constexpr int64_t parallel_work = 1 << 17;

inline int threads_for(int64_t multiply_adds, int32_t threads) {
    return multiply_adds < parallel_work ? 1 : threads;
}

// Keys handled at once: all latents of a media item in every published resampler.
constexpr int64_t key_block = 128;
// Query rows whose scores are held at once in a backward: all latents of a published resampler.
constexpr int64_t score_rows = 64;
// Rows whose scores are computed before any of their values: the products of keys and of values
// take turns in the first level of cache, which does not hold both.
constexpr int64_t stretch = 4 * tile_rows;
// Up to so many rows, packing keys costs more than it saves.
constexpr int64_t few_rows = 3;

// One allocation, cut into aligned arrays.
class Scratch {
  public:
    explicit Scratch(int64_t bytes) {
        void *memory = nullptr;
        base_ = posix_memalign(&memory, 64, size_t(bytes) + 64) == 0 ? static_cast<char *>(memory)
                                                                     : nullptr;
        next_ = base_;
    }
    ~Scratch() { free(base_); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    bool ok() const { return base_ != nullptr; }

    template <typename Real> static int64_t bytes_of(int64_t count) {
        return round_up(count * int64_t(sizeof(Real)), 64);
    }
    template <typename Real> Real *take(int64_t count) {
        Real *result = reinterpret_cast<Real *>(next_);
        next_ += bytes_of<Real>(count);
        return result;
    }

  private:
    char *base_;
    char *next_;
};

// `count` vectors of `size` values, each `stride` elements after the one before.
template <typename T> struct Rows {
    T *data;
    int64_t stride;
    T *operator[](int64_t i) const { return data + i * stride; }
};

// to[count, padded], each row from[i][:size] * factor and zeros.
template <typename T, typename Real>
void pack_rows(Rows<const T> from, int64_t count, int64_t size, Real factor, Real *to,
               int64_t padded) {
    for (int64_t i = 0; i < count; ++i) {
        Real *row = to + i * padded;
        widen_row(from[i], row, size);
        if (factor != 1) {
            for (int64_t d = 0; d < size; ++d) {
                row[d] *= factor;
            }
        }
        for (int64_t d = size; d < padded; ++d) {
            row[d] = 0;
        }
    }
}

// to[row_size, padded]: the transpose of from[count, row_size], columns from `count` on zero;
// row_size and padded are multiples of the vector length.
template <typename Real>
void transpose(const Real *from, int64_t row_size, int64_t count, Real *to, int64_t padded) {
    for (int64_t i = 0; i < padded; i += lanes<Real>) {
        for (int64_t d = 0; d < row_size; d += lanes<Real>) {
            vec<Real> square[lanes<Real>];
#pragma GCC unroll 16
            for (int64_t j = 0; j < lanes<Real>; ++j) {
                square[j] = i + j < count ? load(from + (i + j) * row_size + d) : vec<Real>{};
            }
            transpose_square<Real>(square);
#pragma GCC unroll 16
            for (int64_t j = 0; j < lanes<Real>; ++j) {
                store(to + (d + j) * padded + i, square[j]);
            }
        }
    }
}

// A block of up to key_block keys and their values, as the products want them.
template <typename Real> struct KeyBlock {
    int64_t keys = 0;        // in the block
    int64_t padded_keys = 0; // rounded up to a vector
    int64_t padded_dim = 0;
    Real *k = nullptr;            // [keys, padded_dim], times the scale
    Real *v = nullptr;            // [keys, padded_dim]
    Real *k_transposed = nullptr; // [padded_dim, padded_keys], times the scale
    Real *v_transposed = nullptr; // [padded_dim, padded_keys]; the backward only

    static int64_t bytes(int64_t most_keys, int64_t head_dim, bool backward) {
        const int64_t rows = most_keys * round_up(head_dim, lanes<Real>);
        const int64_t columns = round_up(head_dim, lanes<Real>) * round_up(most_keys, lanes<Real>);
        return 2 * Scratch::bytes_of<Real>(rows) +
               (backward ? 2 : 1) * Scratch::bytes_of<Real>(columns);
    }
    KeyBlock(Scratch &scratch, int64_t most_keys, int64_t head_dim, bool backward) {
        padded_dim = round_up(head_dim, lanes<Real>);
        k = scratch.take<Real>(most_keys * padded_dim);
        v = scratch.take<Real>(most_keys * padded_dim);
        k_transposed = scratch.take<Real>(padded_dim * round_up(most_keys, lanes<Real>));
        if (backward) {
            v_transposed = scratch.take<Real>(padded_dim * round_up(most_keys, lanes<Real>));
        }
    }

#if defined(FLAMINGO_BFLOAT16_DOT)
    // For pair_product: k_transposed as [(D + 1) / 2, padded_keys] pairs without the scale, v as
    // [(keys + 1) / 2, padded_dim] pairs.
    void pack_pairs(Rows<const bfloat16> k_rows, Rows<const bfloat16> v_rows, int64_t count,
                    int64_t head_dim) {
        keys = count;
        padded_keys = round_up(count, lanes<float>);
        pair *to = reinterpret_cast<pair *>(k_transposed);
        for (int64_t d = 0; d < head_dim; d += 2) {
            for (int64_t i = 0; i < count; ++i) {
                const bfloat16 second = d + 1 < head_dim ? k_rows[i][d + 1] : bfloat16{0};
                to[d / 2 * padded_keys + i] = make_pair(k_rows[i][d], second);
            }
            for (int64_t i = count; i < padded_keys; ++i) {
                to[d / 2 * padded_keys + i] = 0;
            }
        }
        to = reinterpret_cast<pair *>(v);
        for (int64_t i = 0; i < count; i += 2) {
            for (int64_t d = 0; d < head_dim; ++d) {
                const bfloat16 second = i + 1 < count ? v_rows[i + 1][d] : bfloat16{0};
                to[i / 2 * padded_dim + d] = make_pair(v_rows[i][d], second);
            }
            for (int64_t d = head_dim; d < padded_dim; ++d) {
                to[i / 2 * padded_dim + d] = 0;
            }
        }
    }
#endif

    template <typename T>
    void pack(Rows<const T> k_rows, Rows<const T> v_rows, int64_t count, int64_t head_dim,
              Real scale) {
        keys = count;
        padded_keys = round_up(count, lanes<Real>);
        pack_rows(k_rows, count, head_dim, scale, k, padded_dim);
        pack_rows(v_rows, count, head_dim, Real(1), v, padded_dim);
        transpose(k, padded_dim, count, k_transposed, padded_keys);
        if (v_transposed) {
            transpose(v, padded_dim, count, v_transposed, padded_keys);
        }
    }
};

// Running softmax of one row: the weights of keys seen so far are relative to exp(top).
template <typename Real> struct RowState {
    Real top;   // largest score
    Real total; // sum of weights
    static RowState empty() { return {-Real(INFINITY), 0}; }
    Real log_sum() const { return top + logarithm(total); }
};

// States' tops -> the largest of them and of their row of scores[rows, padded]; columns from `keys`
// on become -inf. Maxima come before any weight, all of them: rows do not wait for each other's.
template <typename Real>
inline void raise_tops(Real *scores, int64_t rows, int64_t keys, int64_t padded,
                       RowState<Real> *states) {
    for (int64_t r = 0; r < rows; ++r) {
        Real *row = scores + r * padded;
        for (int64_t j = keys; j < padded; ++j) {
            row[j] = -Real(INFINITY);
        }
        vec<Real> top = load(row);
        for (int64_t j = lanes<Real>; j < padded; j += lanes<Real>) {
            top = largest<Real>(top, load(row + j));
        }
        states[r].top = std::max(largest_of<Real>(top), states[r].top);
    }
}

// scores[rows, padded] -> weights relative to each row's top, which are added to its total.
template <typename Real>
inline void weigh_rows(Real *scores, int64_t rows, int64_t padded, RowState<Real> *states) {
    for (int64_t r = 0; r < rows; ++r) {
        Real *row = scores + r * padded;
        // Where every score so far is -inf all weights are 0; a later block may hold others.
        const Real top = states[r].top == -Real(INFINITY) ? Real(0) : states[r].top;
        vec<Real> total = {};
        for (int64_t j = 0; j < padded; j += lanes<Real>) {
            const vec<Real> weight = exponential(load(row + j) - top);
            total += weight;
            store(row + j, weight);
        }
        states[r].total += sum_of<Real>(total);
    }
}

// scores[rows, padded] -> weights relative to each row's new maximum; columns from `keys` on become
// 0. `shrinks`, if given, receive the factors by which what was summed so far shrinks.
template <typename Real>
inline void soften_rows(Real *scores, int64_t rows, int64_t keys, int64_t padded,
                        RowState<Real> *states, Real *shrinks) {
    for (int64_t r = 0; r < rows && shrinks; ++r) {
        shrinks[r] = states[r].top;
    }
    raise_tops(scores, rows, keys, padded, states);
    for (int64_t r = 0; r < rows && shrinks; ++r) {
        shrinks[r] = states[r].total > 0 ? exponential(shrinks[r] - states[r].top) : Real(0);
        states[r].total *= shrinks[r];
    }
    weigh_rows(scores, rows, padded, states);
}

// scores[padded] -> final weights exp(score - log_sum); columns from `keys` on become 0.
template <typename Real>
inline void weigh_row(Real *scores, int64_t keys, int64_t padded, Real log_sum) {
    for (int64_t j = keys; j < padded; ++j) {
        scores[j] = -Real(INFINITY);
    }
    for (int64_t j = 0; j < padded; j += lanes<Real>) {
        store(scores + j, exponential(load(scores + j) - log_sum));
    }
}

// Sum over a row of weights * d_weights, both [padded].
template <typename Real>
inline Real weighted_sum(const Real *weights, const Real *d_weights, int64_t padded) {
    vec<Real> total = {};
    for (int64_t j = 0; j < padded; j += lanes<Real>) {
        total += load(weights + j) * load(d_weights + j);
    }
    return sum_of<Real>(total);
}

// d_weights[padded] -> factor * weights * (d_weights - delta): the gradient of the scores.
template <typename Real>
inline void score_gradient_row(const Real *weights, Real *d_weights, int64_t padded, Real delta,
                               Real factor) {
    for (int64_t j = 0; j < padded; j += lanes<Real>) {
        store(d_weights + j, factor * load(weights + j) * (load(d_weights + j) - delta));
    }
}

// Weights of one row before their division by the total -> final weights, and d_weights -> the
// gradients of the scores, times `factor`.
template <typename Real>
inline void finish_row(Real *weights, Real *d_weights, int64_t padded, Real inverse_total,
                       Real delta, Real factor) {
    for (int64_t j = 0; j < padded; j += lanes<Real>) {
        const vec<Real> weight = load(weights + j) * inverse_total;
        store(weights + j, weight);
        store(d_weights + j, factor * weight * (load(d_weights + j) - delta));
    }
}

template <typename Real> inline void scale_row(Real *row, int64_t padded, Real factor) {
    for (int64_t d = 0; d < padded; d += lanes<Real>) {
        store(row + d, load(row + d) * factor);
    }
}

// Query rows attend to one more block of keys. q[rows, padded_dim] is packed, out[rows, padded_dim]
// holds weighted sums of values relative to each row's state; `weights` has room for a stretch of
// rows.
template <typename Real>
void attend_block(const KeyBlock<Real> &block, int64_t head_dim, const Real *q, int64_t rows,
                  RowState<Real> *states, Real *out, Real *weights, bool first_block) {
    for (int64_t i = 0; i < rows; i += stretch) {
        const int64_t count = smaller(stretch, rows - i);
        Real *out_rows = out + i * block.padded_dim;
        Real shrinks[stretch];
        product<Real>(count, block.padded_keys, head_dim,
                      {q + i * block.padded_dim, block.padded_dim, 1}, block.k_transposed,
                      block.padded_keys, weights, block.padded_keys, false);
        soften_rows(weights, count, block.keys, block.padded_keys, states + i,
                    first_block ? nullptr : shrinks);
        for (int64_t r = 0; r < count && !first_block; ++r) {
            scale_row(out_rows + r * block.padded_dim, block.padded_dim, shrinks[r]);
        }
        product<Real>(count, block.padded_dim, block.keys, {weights, block.padded_keys, 1}, block.v,
                      block.padded_dim, out_rows, block.padded_dim, !first_block);
    }
}

// One row attends to keys as they lie, without packing. `row` has room for padded_dim values.
template <typename T, typename Real>
void attend_unpacked(Rows<const T> k, Rows<const T> v, int64_t keys, int64_t head_dim, Real scale,
                     const Real *q, RowState<Real> *state, Real *out, Real *scores, Real *row,
                     bool first_block) {
    const int64_t padded_dim = round_up(head_dim, lanes<Real>);
    for (int64_t d = head_dim; d < padded_dim; ++d) {
        row[d] = 0;
    }
    for (int64_t j = 0; j < keys; ++j) {
        widen_row(k[j], row, head_dim);
        vec<Real> sum = {};
        for (int64_t d = 0; d < padded_dim; d += lanes<Real>) {
            sum += load(q + d) * load(row + d);
        }
        scores[j] = sum_of<Real>(sum) * scale;
    }
    Real shrink;
    soften_rows(scores, 1, keys, round_up(keys, lanes<Real>), state, &shrink);
    if (first_block) {
        for (int64_t d = 0; d < padded_dim; ++d) {
            out[d] = 0;
        }
    } else {
        scale_row(out, padded_dim, shrink);
    }
    for (int64_t j = 0; j < keys; ++j) {
        widen_row(v[j], row, head_dim);
        for (int64_t d = 0; d < padded_dim; d += lanes<Real>) {
            store(out + d, load(out + d) + scores[j] * load(row + d));
        }
    }
}

// What the backward of a stretch of query rows needs beside the keys, which may be several blocks.
template <typename Real> struct QueryRows {
    int64_t rows = 0; // at most score_rows
    int64_t padded_dim = 0;
    int64_t block_size = 0;      // score_rows * padded keys
    Real *q = nullptr;           // [score_rows, padded_dim]
    Real *d_out = nullptr;       // [score_rows, padded_dim]
    Real *weights = nullptr;     // [blocks, score_rows, padded keys]
    Real *score_grads = nullptr; // [blocks, score_rows, padded keys]

    static int64_t bytes(int64_t most_keys, int64_t head_dim, int64_t blocks = 1) {
        return 2 * Scratch::bytes_of<Real>(score_rows * round_up(head_dim, lanes<Real>)) +
               2 * Scratch::bytes_of<Real>(blocks * score_rows * round_up(most_keys, lanes<Real>));
    }
    QueryRows(Scratch &scratch, int64_t most_keys, int64_t head_dim, int64_t blocks = 1) {
        padded_dim = round_up(head_dim, lanes<Real>);
        block_size = score_rows * round_up(most_keys, lanes<Real>);
        q = scratch.take<Real>(score_rows * padded_dim);
        d_out = scratch.take<Real>(score_rows * padded_dim);
        weights = scratch.take<Real>(blocks * block_size);
        score_grads = scratch.take<Real>(blocks * block_size);
    }
    QueryRows of_block(int64_t block) const {
        QueryRows result = *this;
        result.weights += block * block_size;
        result.score_grads += block * block_size;
        return result;
    }
    template <typename T>
    void pack(Rows<const T> q_rows, Rows<const T> d_out_rows, int64_t count, int64_t head_dim) {
        rows = count;
        pack_rows(q_rows, count, head_dim, Real(1), q, padded_dim);
        pack_rows(d_out_rows, count, head_dim, Real(1), d_out, padded_dim);
    }
    // Raw scores, into `weights`.
    void scores(const KeyBlock<Real> &block, int64_t head_dim) const {
        product<Real>(rows, block.padded_keys, head_dim, {q, padded_dim, 1}, block.k_transposed,
                      block.padded_keys, weights, block.padded_keys, false);
    }
    // Gradients of the weights, into `score_grads`.
    void weight_gradients(const KeyBlock<Real> &block, int64_t head_dim) const {
        product<Real>(rows, block.padded_keys, head_dim, {d_out, padded_dim, 1}, block.v_transposed,
                      block.padded_keys, score_grads, block.padded_keys, false);
    }
    // d_k, d_v [keys, padded_dim] (+)= what final weights and score gradients give.
    void key_gradients(const KeyBlock<Real> &block, Real *d_k, Real *d_v, bool accumulate) const {
        product<Real>(block.keys, padded_dim, rows, {weights, 1, block.padded_keys}, d_out,
                      padded_dim, d_v, padded_dim, accumulate);
        product<Real>(block.keys, padded_dim, rows, {score_grads, 1, block.padded_keys}, q,
                      padded_dim, d_k, padded_dim, accumulate);
    }
    // d_q[rows, padded_dim] (+)= score gradients times keys (which carry the scale).
    void query_gradients(const KeyBlock<Real> &block, Real *d_q, bool accumulate) const {
        product<Real>(rows, padded_dim, block.keys, {score_grads, block.padded_keys, 1}, block.k,
                      padded_dim, d_q, padded_dim, accumulate);
    }
};

template <typename Real> inline void clear(Real *values, int64_t count) {
    memset(values, 0, size_t(count) * sizeof(Real));
}

} // namespace
