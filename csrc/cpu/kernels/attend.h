// Query rows attend to one more block of keys: the step of both forwards.
#pragma once

#include "key_block.h"
#include "softmax.h"
#include "tile.h"

namespace {

// Number of query rows whose scores are all computed before values are summed: the first level of
// cache holds the keys or the values of a block, not both.
constexpr int64_t query_block = 4 * tile_rows;
// Up to this many query rows, packing the keys costs more than it saves.
constexpr int64_t few_rows = 8;

// Adds a block of keys to the attention of q[rows, padded_dim], which is packed. out[rows,
// padded_dim] holds the sums of weighted values, relative to the max of each row's state.
// weights[query_block, padded_keys] is a buffer. hide(scores, first row, rows) makes -inf of the
// scores of keys that a row does not see.
template <typename Real, typename Hide>
void attend_block(const KeyBlock<Real> &block, int64_t head_dim, const Real *q, int64_t rows,
                  RowState<Real> *states, Real *out, Real *weights, bool first_block, Hide hide) {
    for (int64_t i = 0; i < rows; i += query_block) {
        const int64_t count = smaller(query_block, rows - i);
        Real *out_rows = out + i * block.padded_dim;
        Real rescale[query_block];
        product<Real>(count, block.padded_keys, head_dim,
                      {q + i * block.padded_dim, block.padded_dim, 1}, block.k_transposed,
                      block.padded_keys, weights, block.padded_keys, false);
        hide(weights, i, count);
        online_softmax(weights, count, block.keys, block.padded_keys, states + i,
                       first_block ? nullptr : rescale);
        for (int64_t r = 0; r < count && !first_block; ++r) {
            scale_row(out_rows + r * block.padded_dim, block.padded_dim, rescale[r]);
        }
        product<Real>(count, block.padded_dim, block.keys, {weights, block.padded_keys, 1}, block.v,
                      block.padded_dim, out_rows, block.padded_dim, !first_block);
    }
}

// scores[r * padded] = scale * q[r] . key, for ROWS rows q[ROWS, padded_dim].
template <int ROWS, typename Real>
inline void score_key(const Real *q, const Real *key, int64_t padded_dim, Real scale, Real *scores,
                      int64_t padded) {
    vec<Real> sum[ROWS] = {};
    for (int64_t d = 0; d < padded_dim; d += lanes<Real>) {
        const vec<Real> value = load(key + d);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            sum[r] += load(q + r * padded_dim + d) * value;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
        scores[r * padded] = sum_of<Real>(sum[r]) * scale;
    }
}

// out[ROWS, padded_dim] += weights[ROWS] times the rows values[count, padded_dim].
template <int ROWS, typename Real>
inline void add_values(const Real *weights, int64_t padded, const Real *values, int64_t count,
                       int64_t padded_dim, Real *out) {
    for (int64_t d = 0; d < padded_dim; d += lanes<Real>) {
        vec<Real> sum[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            sum[r] = load(out + r * padded_dim + d);
        }
        for (int64_t j = 0; j < count; ++j) {
            const vec<Real> value = load(values + j * padded_dim + d);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                sum[r] += weights[r * padded + j] * value;
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            store(out + r * padded_dim + d, sum[r]);
        }
    }
}

// Calls body(integral_constant<ROWS>, first row) for rows in steps of 4, 2 and 1.
template <typename Body> inline void by_few_rows(int64_t rows, Body body) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
        body(std::integral_constant<int, 4>{}, r);
    }
    for (; r + 2 <= rows; r += 2) {
        body(std::integral_constant<int, 2>{}, r);
    }
    for (; r < rows; ++r) {
        body(std::integral_constant<int, 1>{}, r);
    }
}

// Keys whose values are widened at once, so that sums stay in registers over them.
constexpr int64_t few_keys = 8;

// Does as attend_block for a few rows and keys in memory as they are. buffer[few_keys, padded_dim]
// is a buffer; the order of sums does not depend on `rows`.
template <typename Real, typename Keys, typename Hide>
void attend_unpacked(Keys k, Keys v, int64_t keys, int64_t head_dim, Real scale, const Real *q,
                     int64_t rows, RowState<Real> *states, Real *out, Real *scores, Real *buffer,
                     bool first_block, Hide hide) {
    const int64_t padded_dim = round_up(head_dim, lanes<Real>);
    const int64_t padded = round_up(keys, lanes<Real>);
    for (int64_t i = 0; i < few_keys; ++i) {
        for (int64_t d = head_dim; d < padded_dim; ++d) {
            buffer[i * padded_dim + d] = 0;
        }
    }
    for (int64_t j = 0; j < keys; ++j) {
        widen_row(k[j], buffer, head_dim);
        by_few_rows(rows, [&](auto count, int64_t r) {
            score_key<decltype(count)::value>(q + r * padded_dim, buffer, padded_dim, scale,
                                              scores + r * padded + j, padded);
        });
    }
    hide(scores, 0, rows);
    Real rescale[few_rows];
    online_softmax(scores, rows, keys, padded, states, first_block ? nullptr : rescale);
    for (int64_t r = 0; r < rows; ++r) {
        if (first_block) {
            clear(out + r * padded_dim, padded_dim);
        } else {
            scale_row(out + r * padded_dim, padded_dim, rescale[r]);
        }
    }
    for (int64_t j = 0; j < keys; j += few_keys) {
        const int64_t count = smaller(few_keys, keys - j);
        for (int64_t i = 0; i < count; ++i) {
            widen_row(v[j + i], buffer + i * padded_dim, head_dim);
        }
        by_few_rows(rows, [&](auto rows_at_once, int64_t r) {
            add_values<decltype(rows_at_once)::value>(scores + r * padded + j, padded, buffer,
                                                      count, padded_dim, out + r * padded_dim);
        });
    }
}

// For rows that see all keys.
struct HideNothing {
    template <typename Real> void operator()(Real *, int64_t, int64_t) const {}
};

} // namespace
