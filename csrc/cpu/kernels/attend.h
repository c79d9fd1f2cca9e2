// Query rows attend to one more block of keys: the step of both forwards.
#pragma once

#include "key_block.h"
#include "row_vectors.h"
#include "softmax.h"
#include "tile.h"

namespace {

// Number of query rows whose scores are all computed before values are summed: the first level of
// cache holds the keys or the values of a block, not both.
constexpr int64_t query_block = 4 * tile_rows;
// Up to this many query rows, packing the keys costs more than it saves.
constexpr int64_t few_rows = 8;
// Keys whose weighted values are added at once, while the sums of the rows are in registers.
constexpr int64_t few_keys = 4;
// How far ahead keys are asked for.
constexpr int64_t keys_ahead = 8;

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

// Asks for rows first, first + 1, ..., which are heads * head_dim apart: a stride that the
// processor does not prefetch itself.
template <typename Rows>
inline void prefetch_rows(Rows rows, int64_t first, int64_t count, int64_t head_dim) {
    for (int64_t i = first; i < first + count; ++i) {
        const char *row = reinterpret_cast<const char *>(rows[i]);
        for (int64_t byte = 0; byte < head_dim * int64_t(sizeof(*rows[i])); byte += 64) {
            __builtin_prefetch(row + byte);
        }
    }
}

// scores[r * padded + i] = scale * q[r] . k[j + i], for ROWS rows of q[ROWS, padded_dim] and KEYS
// keys, of which those from `keys` on repeat the last one.
template <int ROWS, int KEYS, typename Real, typename Keys>
inline void score_keys(const Real *q, int64_t padded_dim, Keys k, int64_t j, int64_t keys,
                       int64_t head_dim, Real scale, Real *scores, int64_t padded) {
    decltype(k[0]) key[KEYS];
#pragma GCC unroll 16
    for (int i = 0; i < KEYS; ++i) {
        key[i] = k[smaller(j + i, keys - 1)];
    }
    vec<Real> sums[ROWS * KEYS] = {};
    along_row<Real>(head_dim, [&](int64_t d, auto mask, int) {
#pragma GCC unroll 16
        for (int i = 0; i < KEYS; ++i) {
            const vec<Real> value = fetch(key[i] + d, mask);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                sums[r * KEYS + i] += load(q + r * padded_dim + d) * value;
            }
        }
    });
    Real totals[ROWS * KEYS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS * KEYS; i += lanes<Real>) {
        store(totals + i, sums_of<Real>(sums + i) * scale);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
        memcpy(scores + r * padded, totals + r * KEYS, KEYS * sizeof(Real));
    }
}

// out[ROWS, padded_dim] += weights[ROWS, padded] times `keys` rows of v from row `first` on, for
// VECTORS vectors of elements from d on.
template <int ROWS, int VECTORS, typename Real, typename Keys, typename Mask>
inline void add_values(const Real *weights, int64_t padded, Keys v, int64_t first, int64_t keys,
                       int64_t d, Mask mask, Real *out, int64_t padded_dim) {
    vec<Real> sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; ++i) {
            sums[r][i] = load(out + r * padded_dim + d + i * lanes<Real>);
        }
    }
    for (int64_t j = 0; j < keys; ++j) {
        const auto *value = v[first + j] + d;
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; ++i) {
            const vec<Real> values = fetch(value + i * lanes<Real>, mask);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                sums[r][i] += weights[r * padded + j] * values;
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; ++i) {
            store(out + r * padded_dim + d + i * lanes<Real>, sums[r][i]);
        }
    }
}

// The same for all elements.
template <int ROWS, typename Real, typename Keys>
inline void add_row_values(const Real *weights, int64_t padded, Keys v, int64_t first, int64_t keys,
                           int64_t head_dim, Real *out) {
    constexpr int64_t wide = tile_vectors * lanes<Real>;
    const int64_t padded_dim = round_up(head_dim, lanes<Real>);
    int64_t d = 0;
    for (; d + wide <= head_dim; d += wide) {
        add_values<ROWS, tile_vectors>(weights, padded, v, first, keys, d, AllLanes{}, out,
                                       padded_dim);
    }
    for (; d + lanes<Real> <= head_dim; d += lanes<Real>) {
        add_values<ROWS, 1>(weights, padded, v, first, keys, d, AllLanes{}, out, padded_dim);
    }
    if (d < head_dim) {
        add_values<ROWS, 1>(weights, padded, v, first, keys, d, FirstLanes{head_dim - d}, out,
                            padded_dim);
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

// Does as attend_block for a few rows of each of `heads` heads, and keys in memory as they are, of
// which k(head) and v(head) are the rows. Keys are read in the order of memory, where heads lie
// side by side. q, states, out and scores have `rows` rows for each head; the order of sums depends
// on neither number.
template <typename Real, typename Keys, typename Hide>
void attend_unpacked(Keys k, Keys v, int64_t heads, int64_t keys, int64_t head_dim, Real scale,
                     const Real *q, int64_t rows, RowState<Real> *states, Real *out, Real *scores,
                     bool first_block, Hide hide) {
    const int64_t padded_dim = round_up(head_dim, lanes<Real>);
    const int64_t padded = round_up(keys, lanes<Real>);
    // As few keys as the steps over rows allow, so that few pages are read at a time.
    const int64_t at_once = bigger(lanes<Real> / (rows % 4 == 0 ? 4 : rows % 2 == 0 ? 2 : 1), 1);
    for (int64_t j = 0; j < keys; j += at_once) {
        for (int64_t h = 0; h < heads; ++h) {
            prefetch_rows(k(h), j + keys_ahead, at_once, head_dim);
            by_few_rows(rows, [&](auto count, int64_t r) {
                constexpr int row_count = decltype(count)::value;
                constexpr int key_count = row_count < lanes<Real> ? lanes<Real> / row_count : 1;
                const int64_t row = h * rows + r;
                for (int64_t i = j; i < smaller(j + at_once, keys); i += key_count) {
                    score_keys<row_count, key_count>(q + row * padded_dim, padded_dim, k(h), i,
                                                     keys, head_dim, scale,
                                                     scores + row * padded + i, padded);
                }
            });
        }
    }
    for (int64_t h = 0; h < heads; ++h) {
        const int64_t row = h * rows;
        hide(scores + row * padded, 0, rows);
        Real rescale[few_rows];
        online_softmax(scores + row * padded, rows, keys, padded, states + row,
                       first_block ? nullptr : rescale);
        for (int64_t r = 0; r < rows; ++r) {
            Real *sums = out + (row + r) * padded_dim;
            if (first_block) {
                clear(sums, padded_dim);
            } else {
                scale_row(sums, padded_dim, rescale[r]);
            }
        }
    }
    for (int64_t j = 0; j < keys; j += few_keys) {
        for (int64_t h = 0; h < heads; ++h) {
            prefetch_rows(v(h), j + keys_ahead, few_keys, head_dim);
            by_few_rows(rows, [&](auto count, int64_t r) {
                const int64_t row = h * rows + r;
                add_row_values<decltype(count)::value>(scores + row * padded + j, padded, v(h), j,
                                                       smaller(few_keys, keys - j), head_dim,
                                                       out + row * padded_dim);
            });
        }
    }
}

// For rows that see all keys.
struct HideNothing {
    template <typename Real> void operator()(Real *, int64_t, int64_t) const {}
};

} // namespace
