// Keys and values of one block, packed for the tile products.
#pragma once

#include "bfloat16_tile.h"
#include "pack.h"
#include "scratch.h"

namespace {

// Most keys of a block: all latents of a media item in every published resampler.
constexpr int64_t key_block = 128;

// Up to key_block keys and their values, packed for the tile products.
template <typename Real> struct KeyBlock {
    int64_t keys = 0;        // in the block
    int64_t padded_keys = 0; // rounded up to a vector
    int64_t padded_dim = 0;
    Real *k = nullptr;            // [keys, padded_dim], times the scale
    Real *v = nullptr;            // [keys, padded_dim]
    Real *k_transposed = nullptr; // [padded_dim, padded_keys], times the scale
    Real *v_transposed = nullptr; // [padded_dim, padded_keys]; the backward only

    // Takes the arrays of a forward.
    KeyBlock(Scratch &scratch, int64_t most_keys, int64_t head_dim)
        : padded_dim(round_up(head_dim, lanes<Real>)),
          k(scratch.take<Real>(most_keys * padded_dim)),
          v(scratch.take<Real>(most_keys * padded_dim)),
          k_transposed(scratch.take<Real>(padded_dim * round_up(most_keys, lanes<Real>))) {}
    // Takes the arrays of a backward, which reads `v` only to transpose it: several blocks may pack
    // their values in one `v_buffer` [most_keys, padded_dim].
    KeyBlock(Scratch &scratch, int64_t most_keys, int64_t head_dim, Real *v_buffer)
        : padded_dim(round_up(head_dim, lanes<Real>)),
          k(scratch.take<Real>(most_keys * padded_dim)), v(v_buffer),
          k_transposed(scratch.take<Real>(padded_dim * round_up(most_keys, lanes<Real>))),
          v_transposed(scratch.take<Real>(padded_dim * round_up(most_keys, lanes<Real>))) {}

#if defined(FLAMINGO_BFLOAT16_DOT)
    // Packs for pair_product: k_transposed holds [(D + 1) / 2, padded_keys] pairs without the
    // scale, v holds [(keys + 1) / 2, padded_dim] pairs.
    template <typename From>
    void pack_pairs(From k_rows, From v_rows, int64_t count, int64_t head_dim) {
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

    // `From`: rows by index.
    template <typename From>
    void pack(From k_rows, From v_rows, int64_t count, int64_t head_dim, Real scale) {
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

} // namespace
