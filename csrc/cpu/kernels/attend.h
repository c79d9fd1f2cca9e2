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
constexpr int64_t few_rows = 3;

// Adds a block of keys to the attention of q[rows, padded_dim], which is packed. out[rows,
// padded_dim] holds the sums of weighted values, relative to the max of each row's state.
// weights[query_block, padded_keys] is a buffer.
template <typename Real>
void attend_block(const KeyBlock<Real> &block, int64_t head_dim, const Real *q, int64_t rows,
                  RowState<Real> *states, Real *out, Real *weights, bool first_block) {
    for (int64_t i = 0; i < rows; i += query_block) {
        const int64_t count = smaller(query_block, rows - i);
        Real *out_rows = out + i * block.padded_dim;
        Real rescale[query_block];
        product<Real>(count, block.padded_keys, head_dim,
                      {q + i * block.padded_dim, block.padded_dim, 1}, block.k_transposed,
                      block.padded_keys, weights, block.padded_keys, false);
        online_softmax(weights, count, block.keys, block.padded_keys, states + i,
                       first_block ? nullptr : rescale);
        for (int64_t r = 0; r < count && !first_block; ++r) {
            scale_row(out_rows + r * block.padded_dim, block.padded_dim, rescale[r]);
        }
        product<Real>(count, block.padded_dim, block.keys, {weights, block.padded_keys, 1}, block.v,
                      block.padded_dim, out_rows, block.padded_dim, !first_block);
    }
}

// The same for one row and keys in memory as they are. scores[padded keys] and row[padded_dim] are
// buffers.
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
    Real rescale;
    online_softmax(scores, 1, keys, round_up(keys, lanes<Real>), state, &rescale);
    if (first_block) {
        for (int64_t d = 0; d < padded_dim; ++d) {
            out[d] = 0;
        }
    } else {
        scale_row(out, padded_dim, rescale);
    }
    for (int64_t j = 0; j < keys; ++j) {
        widen_row(v[j], row, head_dim);
        for (int64_t d = 0; d < padded_dim; d += lanes<Real>) {
            store(out + d, load(out + d) + scores[j] * load(row + d));
        }
    }
}

} // namespace
