// Query rows of a backward with their scores, and the products that give the gradients.
#pragma once

#include "key_block.h"
#include "tile.h"

namespace {

// Query rows whose scores a backward holds at once: all latents of a published resampler.
constexpr int64_t score_rows = 64;

// Up to score_rows query rows with their scores against one or several blocks of keys.
template <typename Real> struct QueryRows {
    int64_t rows = 0; // at most score_rows
    int64_t padded_dim = 0;
    int64_t block_size = 0;      // scores of a block: score_rows * padded keys
    Real *q = nullptr;           // [score_rows, padded_dim]
    Real *d_out = nullptr;       // [score_rows, padded_dim]
    Real *weights = nullptr;     // [blocks, score_rows, padded keys]
    Real *score_grads = nullptr; // [blocks, score_rows, padded keys]

    QueryRows(Scratch &scratch, int64_t most_keys, int64_t head_dim, int64_t blocks = 1) {
        padded_dim = round_up(head_dim, lanes<Real>);
        block_size = score_rows * round_up(most_keys, lanes<Real>);
        q = scratch.take<Real>(score_rows * padded_dim);
        d_out = scratch.take<Real>(score_rows * padded_dim);
        weights = scratch.take<Real>(blocks * block_size);
        score_grads = scratch.take<Real>(blocks * block_size);
    }
    // Returns these rows with their scores against one of the blocks.
    QueryRows of_block(int64_t block) const {
        QueryRows result = *this;
        result.weights += block * block_size;
        result.score_grads += block * block_size;
        return result;
    }
    // Packs q and d_out of `count` rows as rows `first`, `first` + 1, ...
    template <typename T>
    void pack(int64_t first, Rows<const T> q_rows, Rows<const T> d_out_rows, int64_t count,
              int64_t head_dim) const {
        pack_rows(q_rows, count, head_dim, Real(1), q + first * padded_dim, padded_dim);
        pack_rows(d_out_rows, count, head_dim, Real(1), d_out + first * padded_dim, padded_dim);
    }
    // weights = q k^T, times the scale that the packed keys carry.
    void scores(const KeyBlock<Real> &block, int64_t head_dim) const {
        product<Real>(rows, block.padded_keys, head_dim, {q, padded_dim, 1}, block.k_transposed,
                      block.padded_keys, weights, block.padded_keys, false);
    }
    // score_grads = d_out v^T, the gradients of the weights.
    void weight_gradients(const KeyBlock<Real> &block, int64_t head_dim) const {
        product<Real>(rows, block.padded_keys, head_dim, {d_out, padded_dim, 1}, block.v_transposed,
                      block.padded_keys, score_grads, block.padded_keys, false);
    }
    // d_k, d_v [keys, padded_dim] (+)= score_grads^T q and weights^T d_out, once both are final.
    void key_gradients(const KeyBlock<Real> &block, Real *d_k, Real *d_v, bool accumulate) const {
        product<Real>(block.keys, padded_dim, rows, {weights, 1, block.padded_keys}, d_out,
                      padded_dim, d_v, padded_dim, accumulate);
        product<Real>(block.keys, padded_dim, rows, {score_grads, 1, block.padded_keys}, q,
                      padded_dim, d_k, padded_dim, accumulate);
    }
    // d_q[rows, padded_dim] (+)= score_grads k, times the scale that the packed keys carry.
    void query_gradients(const KeyBlock<Real> &block, Real *d_q, bool accumulate) const {
        product<Real>(rows, padded_dim, block.keys, {score_grads, block.padded_keys, 1}, block.k,
                      padded_dim, d_q, padded_dim, accumulate);
    }
};

} // namespace
